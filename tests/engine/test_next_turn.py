"""What is known of a next turn is computed before it is asked for, and requests go first."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlxkv
from benchmarks.scripted import scripted
from mlxkv.base.power import Power
from mlxkv.engine.ahead import choice as idle
from mlxkv.engine.ahead import next_turn
from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.ahead.next_turn import Answered, next_messages, reply_forms
from mlxkv.engine.engine import ThreadedEngine
from mlxkv.engine.messages import Ask
from mlxkv.engine.model_pool import key_of
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Chunk, Stats, join_parts, reply_message
from mlxkv.generation.request import Request
from tests.support.chat_templates.cases import TEMPLATES
from tests.support.command_line import chat_model

TEMPLATE = TEMPLATES["reasoning"].read_text()
CALLS = TEMPLATES["tools"].read_text()
SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")
THOUGHT = "<think>\n" + "Let me see. " * 10 + "\n</think>\n\n"
TEXT = "It is the answer. " * 8
CALL = '<tool_call>\n{"name": "look", "arguments": {"b": [1, 2], "a": "x"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
FRAME = len("<|im_end|>\n<|im_start|>assistant\n") - len("<|im_end|><|im_start|>") + 2


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


FIRST = [user("What is it? " * 20)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("next_turn")

    def made(family: str, template: str = TEMPLATE) -> Path:
        path = root / f"{family}-{len(template)}"
        if not path.exists():
            options = {"special": SPECIAL, "max_position_embeddings": 4096}
            chat_model(path, family=family, template=template, **options)
        return path

    return made


class Chat:
    """One model's scheduler, and the answers that it gives."""

    def __init__(self, path: Path, is_on: bool = True):
        llm = mlxkv.load(path, dtype="float32")
        idle = IdleCompute("full" if is_on else "off")
        self.scheduler, self.runtime = Scheduler(llm, 4, idle), llm

    def encode(self, text: str) -> list[int]:
        return self.runtime.tokenizer.encode(text, add_special_tokens=False)

    def ask(self, messages: Sequence[Any], answer: str, **options: Any) -> list[Chunk]:
        told: list[Any] = []
        owner, client = options.pop("owner", ""), options.pop("client", "")
        request = Request.of(messages, **options)
        with scripted(deque([self.encode(answer + "<|im_end|>")])):
            task = Task(request, told.append, lambda: False, owner, client=client)
            self.scheduler.add(task)
            while not self.scheduler.is_idle:
                self.scheduler.step()
        errors = [item for item in told if isinstance(item, BaseException)]
        assert errors == []
        return [chunk for chunk in told if isinstance(chunk, Chunk)]

    def prepare(self) -> int:
        """Compute the next turns; how many tokens that took."""
        before = self.scheduler.counts.next_turn_tokens
        while not self.scheduler.next_turns.is_empty:
            self.scheduler.next_turns.step()
        assert self.runtime.budget.kv_bytes == self.scheduler.next_turns.kept.nbytes
        return self.scheduler.counts.next_turn_tokens - before


@pytest.fixture
def chat(models) -> Iterator[Callable[..., Chat]]:
    made: list[Chat] = []

    def open_chat(family: str = "llama", template: str = TEMPLATE, **options: Any) -> Chat:
        made.append(Chat(models(family, template), **options))
        return made[-1]

    yield open_chat
    for each in made:
        each.scheduler.stop()
        each.runtime.close()


def stats(chunks: Sequence[Chunk]) -> Stats:
    last = chunks[-1].stats
    assert last is not None
    return last


def answered(messages: Sequence[Any], text: str) -> list[Any]:
    return [*messages, {"role": "assistant", "content": text}]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_behind_reasoning_only_the_new_message_is_computed(chat, family):
    served, without = chat(family), chat(family, is_on=False)
    messages: list[Any] = FIRST
    for turn in range(2):
        one, other = (stats(each.ask(messages, THOUGHT + TEXT)) for each in (served, without))
        new = str(messages[-1]["content"])
        if turn:
            assert other.computed_tokens >= len(TEXT) + len(new)
            assert one.computed_tokens <= len(new) + FRAME + 2
        assert served.prepare() > len(TEXT)
        messages = [*answered(messages, TEXT), user(f"And then, number {turn}?")]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_next_answer_is_the_one_of_a_prompt_that_is_computed_whole(models, chat, family):
    served = chat(family)
    served.ask(FIRST, THOUGHT + TEXT)
    assert served.prepare() > len(TEXT)
    messages = [*answered(FIRST, TEXT), user("And?")]
    with mlxkv.load(models(family), dtype="float32") as llm:
        expected = llm.chat(messages, max_tokens=12, logprobs=0)
    told: list[Any] = []
    request = Request.of(messages, max_tokens=12, logprobs=0)
    served.scheduler.add(Task(request, told.append, lambda: False))
    while not served.scheduler.is_idle:
        served.scheduler.step()
    chunks = [chunk for chunk in told if isinstance(chunk, Chunk)]
    assert [chunk.token for chunk in chunks] == expected.tokens
    assert stats(chunks).restored_tokens > len(TEXT)
    for chunk, one in zip(chunks, expected.logprobs, strict=True):
        assert chunk.logprobs is not None
        assert chunk.logprobs.logprob == pytest.approx(one.logprob, abs=1e-4)


def test_nothing_is_computed_where_the_template_leaves_the_answer_as_it_is(chat):
    served = chat()
    served.ask(FIRST, TEXT)
    assert served.prepare() == 0
    again = stats(served.ask([*answered(FIRST, TEXT), user("And?")], TEXT))
    assert again.computed_tokens <= len("And?") + 2 * FRAME


def test_a_call_is_computed_as_the_template_writes_it(chat):
    served = chat(template=CALLS)
    chunks = served.ask(FIRST, CALL, tools=TOOLS)
    (call,) = [call for chunk in chunks for call in chunk.tool_calls]
    assert 0 < served.prepare() < 200
    reply = reply_message("", "", [call])
    result = {"role": "tool", "tool_call_id": call.id, "name": "look", "content": "7" * 30}
    next_one = stats(served.ask([*FIRST, reply, result], TEXT, tools=TOOLS))
    assert next_one.computed_tokens <= 30 + len("\n</tool_response>") + FRAME + 1


def test_reasoning_is_part_of_the_next_turn_where_earlier_reasoning_came_back():
    reply = {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    bare = {"role": "assistant", "content": "b"}
    assert reply_forms([user("a")], reply) == [bare, reply]
    assert reply_forms([user("a")], bare) == [bare]
    assert reply_forms([user("a"), bare, user("c")], reply) == [bare]
    assert reply_forms([user("a"), reply, user("c")], reply) == [reply]
    assert next_messages([user("a")], bare, "c") == [user("a"), bare, user("c")]


@pytest.mark.parametrize("is_back", [True, False])
def test_a_first_reply_may_come_back_with_reasoning_or_without(chat, is_back):
    template = TEMPLATE.replace("loop.index0 > ns.last_user", "true")
    served = chat(template=template)
    chunks = served.ask(FIRST, THOUGHT + TEXT)
    reply = reply_message(*join_parts(chunks))
    served.prepare()
    if not is_back:
        del reply["reasoning_content"]
    again = stats(served.ask([*FIRST, reply, user("And?")], TEXT))
    assert again.computed_tokens <= len("And?") + FRAME + 2


def test_a_request_pauses_it_and_it_goes_on_from_what_was_computed(chat, monkeypatch):
    served = chat()
    monkeypatch.setattr(served.scheduler.next_turns._pace, "n_tokens", 16)
    monkeypatch.setattr(served.scheduler.next_turns._pace, "record", lambda n, seconds: None)
    served.ask(FIRST, THOUGHT + TEXT)
    for _ in range(8):
        served.scheduler.next_turns.step()
    counts = served.scheduler.counts
    assert served.runtime.budget.kv_bytes > 0 and counts.next_turn_tokens == 0
    served.ask([user("Something else")], TEXT)
    done = counts.next_turn_tokens
    assert 16 <= done < len(TEXT) and not served.scheduler.next_turns.is_empty
    assert served.runtime.budget.kv_bytes == 0
    rest = served.prepare()
    assert len(TEXT) <= done + rest <= len(TEXT) + FRAME + next_turn.MIN_CHUNK
    again = stats(served.ask([*answered(FIRST, TEXT), user("And?")], TEXT))
    assert again.computed_tokens <= len("And?") + FRAME + 2


def test_the_next_turn_itself_ends_what_is_computed_for_it(chat):
    served = chat()
    served.ask(FIRST, THOUGHT + TEXT)
    served.ask(FIRST, THOUGHT + TEXT, owner="another")
    served.ask([*answered(FIRST, TEXT), user("And?")], TEXT)
    waiting = served.scheduler.next_turns._waiting
    assert [each.owner for each in waiting] == ["another", "another", ""]
    assert len(waiting[-1].messages) == 3


def test_no_more_than_the_limit_is_computed(chat, monkeypatch):
    monkeypatch.setattr(idle, "FULL", 64)
    served = chat()
    served.ask(FIRST, THOUGHT + TEXT)
    assert served.prepare() == 64


def test_light_computes_a_chunk_of_one_form(chat, monkeypatch):
    monkeypatch.setattr(idle, "LIGHT", 48)
    template = TEMPLATE.replace("loop.index0 > ns.last_user", "true")  # two forms that differ
    served = chat(template=template)
    served.scheduler.next_turns._idle = IdleCompute("light")
    served.ask(FIRST, THOUGHT + TEXT)
    assert served.prepare() == 48


def test_off_computes_nothing(chat):
    served = chat(is_on=False)
    served.ask(FIRST, THOUGHT + TEXT)
    assert served.scheduler.next_turns.is_empty


def test_without_a_choice_it_is_full_and_light_on_battery():
    times, found = iter(range(0, 1000, 40)), [True]
    power = Power(lambda: found[0], lambda: next(times))
    chosen = IdleCompute(power=power)
    power.settle()
    assert (chosen.choice, chosen.limit) == ("light", idle.LIGHT)
    found[0] = False
    power.refresh()  # more than a minute later
    power.settle()
    assert (chosen.choice, chosen.limit) == ("full", idle.FULL)
    assert [IdleCompute(x, power).limit for x in idle.CHOICES] == [0, idle.LIGHT, idle.FULL]
    with pytest.raises(UsageError, match="idle_compute must be one of off, light, full"):
        IdleCompute("some")


def test_tokens_that_a_prompt_used_are_counted_once_for_model_key_and_client(chat):
    served = chat()
    scheduler = served.scheduler
    served.ask(FIRST, THOUGHT + TEXT, owner="a", client="agent")
    n = served.prepare()
    messages = [*answered(FIRST, TEXT), user("And?")]
    assert stats(served.ask(messages, TEXT, owner="b")).ahead_tokens == 0
    one = stats(served.ask(messages, TEXT, owner="a", client="agent"))
    assert len(TEXT) <= one.ahead_tokens <= n and one.ahead_saved_s > 0
    assert one.ahead_tokens <= one.restored_tokens
    assert stats(served.ask(messages, TEXT, owner="a", client="agent")).ahead_tokens == 0
    for counts in (
        scheduler.tally.shown(None),
        scheduler.tally.shown("a"),
        *scheduler.clients.figures(),
    ):
        assert counts.next_turn_tokens == n
        assert counts.next_turn_used_tokens == one.ahead_tokens
        assert counts.next_turn_saved_s == one.ahead_saved_s
    assert scheduler.tally.shown("b").next_turn_tokens == 0


def test_the_client_gets_one_call_where_it_asked_for_no_more(chat):
    served = chat(template=CALLS)
    chunks = served.ask(FIRST, CALL + "\n" + CALL, tools=TOOLS, parallel=False)
    first, _ = [call for chunk in chunks for call in chunk.tool_calls]
    assert 0 < served.prepare()
    reply = reply_message("", "", [first])
    result = {"role": "tool", "tool_call_id": first.id, "name": "look", "content": "7" * 30}
    next_one = stats(served.ask([*FIRST, reply, result], TEXT, tools=TOOLS))
    assert next_one.computed_tokens <= 30 + len("\n</tool_response>") + FRAME + 1


def test_several_calls_are_computed_up_to_the_first_result(chat):
    served = chat(template=CALLS)
    chunks = served.ask(FIRST, CALL + "\n" + CALL, tools=TOOLS)
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    assert len(calls) == 2 and 0 < served.prepare()
    results = [
        {"role": "tool", "tool_call_id": call.id, "name": "look", "content": "7" * 30}
        for call in calls
    ]
    reply = reply_message("", "", calls)
    next_one = stats(served.ask([*FIRST, reply, *results], TEXT, tools=TOOLS))
    one = 30 + len("\n</tool_response>\n<tool_response>\n")
    assert next_one.computed_tokens <= 2 * one + FRAME + 1


def test_a_very_long_conversation_is_not_rendered_for_it(chat, monkeypatch):
    monkeypatch.setattr(next_turn, "MAX_CHARS", 8)
    served = chat()
    served.ask(FIRST, THOUGHT + TEXT)
    assert served.scheduler.next_turns.is_empty


def test_nothing_gives_way_for_it(chat):
    served = chat()
    budget = served.runtime.budget
    served.ask(FIRST, THOUGHT + TEXT)
    budget.limit_bytes = budget.used_bytes + 2**16
    pages = budget.pages_bytes
    assert served.prepare() == 0
    assert budget.pages_bytes == pages > 0


@pytest.mark.parametrize("options", [{"max_tokens": 20}, {"stop": "thing"}])
def test_an_answer_that_was_cut_is_what_the_client_has_of_it(chat, options):
    served = chat()
    chunks = served.ask(FIRST, THOUGHT + "Something else.", **options)
    if chunks[-1].finish_reason == "length":
        assert served.prepare() == 0
        return
    assert 0 < served.prepare() <= len("Some") + FRAME


def test_a_prompt_that_is_no_conversation_has_no_next_turn(chat):
    served = chat()
    told: list[Any] = []
    with scripted(deque([served.encode("Well.<|im_end|>")])):
        served.scheduler.add(Task(Request.of("Once upon"), told.append, lambda: False))
        while not served.scheduler.is_idle:
            served.scheduler.step()
    assert served.scheduler.next_turns.is_empty
    served.ask([*FIRST, {"role": "assistant", "content": "It"}], THOUGHT + TEXT)
    assert served.scheduler.next_turns.is_empty


def test_each_key_has_its_next_turn_and_its_figures_whatever_another_computed(chat):
    served = chat()
    tokens, adapter = list(range(3, 60)) * 6, ("a",)
    request = Request.of([{"role": "user", "content": "hi"}])
    answers = [
        Answered(request, owner, "", {"role": "assistant"}, [], 4096, tokens) for owner in "ab"
    ]
    turns = served.scheduler.next_turns
    turns._waiting += answers
    while not turns.is_empty:
        turns.step()
    for owner in "ab":
        pages = served.runtime.pages_of(owner)
        assert pages is not None and pages.match(tokens, len(tokens)).n_tokens == len(tokens)
    n = len(tokens)
    assert turns._records.use("a", tokens, n, adapter) == (0, 0.0)
    assert [turns._records.use(owner, tokens, n)[0] for owner in "aab"] == [n, 0, n]


def test_stopping_forgets_all(chat):
    served = chat()
    served.ask(FIRST, THOUGHT + TEXT)
    for _ in range(4):
        served.scheduler.next_turns.step()
    served.scheduler.stop()
    assert served.scheduler.next_turns.is_empty and served.runtime.budget.kv_bytes == 0


@pytest.mark.parametrize("is_on", [True, False])
def test_an_engine_computes_next_turns_when_it_has_no_requests(models, is_on):
    path = models("llama", TEMPLATE)
    engine = ThreadedEngine(dtype="float32", next_turns=is_on)
    engine.start()

    async def ask(messages: Sequence[Any]) -> list[Chunk]:
        answer = engine.submit(Ask(str(path), Request.of(messages)))
        return [chunk async for chunk in answer]

    try:
        asyncio.run(engine.load(str(path)))
        loaded = engine._pool.find(key_of(str(path)))
        assert loaded is not None
        runtime, counts = loaded.scheduler.runtime, loaded.scheduler.counts
        ids = runtime.tokenizer.encode(THOUGHT + TEXT + "<|im_end|>", add_special_tokens=False)
        with scripted(deque([ids, ids])):
            asyncio.run(ask(FIRST))
            until = time.monotonic() + (20 if is_on else 0.5)
            while time.monotonic() < until and not counts.next_turn_tokens:
                time.sleep(0.01)
            until = time.monotonic() + 5
            while time.monotonic() < until and mx.get_cache_memory():
                time.sleep(0.01)
            assert not mx.get_cache_memory(), "what it took is given back"
            again = asyncio.run(ask([*answered(FIRST, TEXT), user("And?")]))
        assert (stats(again).computed_tokens < len(TEXT)) == is_on == bool(counts.next_turn_tokens)
    finally:
        engine.close()


def test_a_request_that_comes_within_a_chunk_is_next(models, monkeypatch):
    path = models("llama", TEMPLATE)
    engine = ThreadedEngine(dtype="float32", idle_compute="full")
    steps: list[str] = []
    own, chunk = Scheduler.step, next_turn.NextTurns.step
    answers: list[Any] = []
    question = Ask(str(path), Request.of([user("Something else")]))

    def request_step(scheduler: Scheduler) -> None:
        steps.append("request")
        own(scheduler)

    def idle_step(turns: next_turn.NextTurns) -> None:
        turns._pace.n_tokens = 16
        steps.append("idle")
        chunk(turns)
        if turns._records._records or steps.count("idle") == 6:
            answers.append(engine.submit(question))
            steps.append("asked")

    async def ask(answer: Any) -> list[Chunk]:
        return [each async for each in answer]

    engine.start()
    try:
        asyncio.run(engine.load(str(path)))
        loaded = engine._pool.find(key_of(str(path)))
        assert loaded is not None
        encode = loaded.scheduler.runtime.tokenizer.encode
        ids = encode(THOUGHT + TEXT + "<|im_end|>", add_special_tokens=False)
        monkeypatch.setattr(Scheduler, "step", request_step)
        monkeypatch.setattr(next_turn.NextTurns, "step", idle_step)
        with scripted(deque([ids, ids])):
            asyncio.run(ask(engine.submit(Ask(str(path), Request.of(FIRST)))))
            until = time.monotonic() + 20
            while time.monotonic() < until and not answers:
                time.sleep(0.01)
            assert stats(asyncio.run(ask(answers[0]))).generated_tokens > 0
        assert steps[steps.index("asked") + 1] == "request"
        assert loaded.scheduler.counts.next_turn_tokens >= 16  # what was computed is kept
    finally:
        engine.close()
