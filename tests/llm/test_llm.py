"""The Python API: streams, results, and conversations that compute only what is new."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

import mlxkv
from mlxkv.errors import ContextExceeded, TemplateError, UsageError
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.session import Restored, Session
from mlxkv.llm.llm import LLM
from tests.support.chat_templates.cases import TEMPLATES
from tests.support.command_line import TEMPLATE, chat_model
from tests.support.scripted import draft_on_cpu_alone, said

THINK = ("<think>", "</think>")
HARMONY = (
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>"),
    *("<|return|>", "<|call|>"),
)
TOOLS = [{"type": "function", "function": {"name": "now", "description": "", "parameters": {}}}]
USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


def model(folder: Path, name: str, **options: Any) -> Path:
    path = folder / name
    return path if path.exists() else chat_model(path, **options)


@pytest.fixture
def llm(folder) -> LLM:
    return mlxkv.load(model(folder, "llama"))


class Scripted(LLM):
    """Answers what it is told to, on a real model's caches.

    Attributes:
        answers: texts of the next answers; each ends with the end token.
        prompts: what was asked, as token ids.
    """

    def __init__(self, llm: LLM, answers: Sequence[str] = ()):
        super().__init__(llm.model, llm.tokenizer, llm.path)
        self.answers, self.prompts, self.ids_of = list(answers), [], self.encode_text
        real = self.model.last_logits
        draft_on_cpu_alone(self)

        def last_logits(tokens: mx.array, caches: Any) -> mx.array:
            n_prompt, n_vocab = len(self.prompts[-1]), self.config.vocab_size
            return said(real, tokens, caches, n_prompt, self.script, n_vocab)

        self.model.last_logits = last_logits  # pyright: ignore[reportAttributeAccessIssue]

    def session(self, owner: str = "", adapter: Sequence[str] = ()) -> Session:
        """Notes each prompt that it is asked to restore, and takes the next answer for it."""
        session = super().session(owner)
        restore = session.restore

        def noted(tokens: Sequence[int]) -> Restored:
            self.prompts.append(list(tokens))
            self.script = self.ids_of(self.answers.pop(0))
            if not self.script or self.script[-1] not in self.tokenizer.eos_token_ids:
                self.script.append(2)
            return restore(tokens)

        session.restore = noted  # pyright: ignore[reportAttributeAccessIssue]
        return session


def scripted(folder: Path, name: str, *answers: str, **options: Any) -> Scripted:
    return Scripted(mlxkv.load(model(folder, name, **options)), answers)


def last(chunks: Iterator[Chunk]) -> mlxkv.Stats:
    *_, chunk = chunks
    assert chunk.stats is not None
    return chunk.stats


# Streams and results.


def test_a_stream_gives_one_chunk_a_token_and_figures_with_the_last(llm):
    chunks = list(llm.stream("hello", max_tokens=5))
    assert len(chunks) == 5
    assert [chunk.finish_reason for chunk in chunks] == [None] * 4 + ["length"]
    assert all(chunk.stats is None for chunk in chunks[:-1])
    stats = chunks[-1].stats
    assert (stats.prompt_tokens, stats.restored_tokens, stats.computed_tokens) == (5, 0, 5)
    assert stats.generated_tokens == 5
    assert stats.kv_bytes > 0


def test_generate_gives_what_stream_gives(llm):
    chunks = list(llm.stream("hello", max_tokens=6))
    result = llm.generate("hello", max_tokens=6)
    assert result.text == "".join(chunk.text for chunk in chunks)
    assert result.tokens == [chunk.token for chunk in chunks]
    assert (result.finish_reason, result.reasoning, result.tool_calls) == ("length", None, ())


def test_a_text_its_ids_and_its_rendered_messages_are_the_same_prompt(llm):
    rendered = llm.render([USER])
    ids = llm.encode_text(rendered)
    texts = {llm.generate(prompt, max_tokens=6).text for prompt in (rendered, ids, [USER])}
    assert len(texts) == 1
    assert llm.chat([USER], max_tokens=6).text in texts


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(folder):
    result = scripted(folder, "llama", "Hi.").chat([USER])
    assert (result.text, result.finish_reason) == ("Hi.", "stop")
    assert len(result.tokens) == 3
    assert result.stats.generated_tokens == 4


@pytest.mark.parametrize(("stop", "text"), [("b", "a"), (["x", "bc"], "a"), ("cde", "ab")])
def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(folder, stop, text):
    result = scripted(folder, "llama", "abcde").chat([USER], stop=stop)
    assert (result.text, result.finish_reason) == (text, "stop")


def test_the_last_chunk_names_the_stop_text_that_ended_the_answer(folder):
    llm = scripted(folder, "llama", "abcde")
    *chunks, last = llm.stream([USER], stop=["x", "d", "cd"])
    assert last.stopped_by == "cd"
    assert {chunk.stopped_by for chunk in chunks} == {None}
    *_, last = scripted(folder, "llama", "abcde").stream([USER], stop="x")
    assert last.stopped_by is None


def test_what_only_began_like_a_stop_text_is_shown_at_the_end(folder):
    result = scripted(folder, "llama", "abc").chat([USER], stop="cd")
    assert result.text == "abc"


def test_an_answer_goes_no_further_than_the_context(folder):
    llm = mlxkv.load(model(folder, "short", max_position_embeddings=32))
    assert llm.context == 32
    result = llm.generate([5] * 20)
    assert (len(result.tokens), result.finish_reason) == (12, "length")


def test_a_prompt_over_the_context_is_an_error_unless_it_may_be_cut(folder):
    llm = mlxkv.load(model(folder, "short", max_position_embeddings=32))
    prompt = list(range(10, 50))
    with pytest.raises(ContextExceeded, match="40"):
        llm.stream(prompt)
    result = llm.generate(prompt, truncate=True, max_tokens=4)
    assert result.stats.prompt_tokens == 28, "room for the answer is left"
    assert result.tokens == llm.generate(prompt[-28:], max_tokens=4).tokens, "its head was cut"


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([5, 10**6], {}, "token id 1000000 is out of range"),
        ([True], {}, "token id True is out of range"),
        ("x", {"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        ("x", {"tempo": 1}, "unknown option 'tempo'; allowed are .* format, "),
        ("x", {"stop": ""}, "stop must be a text that is not empty"),
        ("x", {"think": True}, "think and tools need messages"),
        ([USER], {"think": "loud"}, "think must be on, off, low, medium, high; got 'loud'"),
        ([USER], {"think": True}, "no switch for reasoning"),
    ],
)
def test_what_cannot_be_answered_is_said_before_anything_is_computed(llm, prompt, options, said):
    with pytest.raises(UsageError, match=said):
        llm.stream(prompt, **options)


def test_a_model_without_a_template_does_not_chat(folder):
    llm = mlxkv.load(model(folder, "base", template=False))
    with pytest.raises(TemplateError, match="chat_template"):
        llm.chat([USER])


# Reasoning and tool calls.

REASONING = TEMPLATES["reasoning"].read_text()


def test_reasoning_comes_apart_from_the_text(folder):
    llm = scripted(
        folder, "qwen", "<think>\nhm\n</think>\n\nHi.", template=REASONING, special=THINK
    )
    chunks = list(llm.stream([USER]))
    assert "".join(chunk.text for chunk in chunks) == "Hi."
    assert "".join(chunk.reasoning or "" for chunk in chunks) == "hm"
    assert chunks[-1].finish_reason == "stop"


def test_reasoning_that_does_not_end_is_all_reasoning(folder):
    llm = scripted(folder, "qwen", "<think>hm, hm", template=REASONING, special=THINK)
    result = llm.chat([USER])
    assert (result.text, result.reasoning) == ("", "hm, hm")


def test_a_stop_text_in_the_reasoning_does_not_stop(folder):
    llm = scripted(folder, "qwen", "<think>a b</think>c b d", template=REASONING, special=THINK)
    result = llm.chat([USER], stop="b")
    assert (result.text, result.reasoning) == ("c ", "a b")


def test_what_continues_a_text_is_all_text(folder):
    llm = scripted(folder, "thinking-chatml", "<think>a</think>b", template=REASONING)
    assert llm.generate("x").text == "<think>a</think>b"


def test_markers_of_the_vocabulary_count_only_as_tokens(folder):
    llm = scripted(folder, "qwen", "", template=REASONING, special=THINK)
    spelled = [llm.tokenizer.id_of(char) for char in "<think>a"]
    llm.answers = ["a"]
    llm.ids_of = lambda text: spelled
    result = llm.chat([USER])
    assert (result.text, result.reasoning) == ("<think>a", None)


def test_thinking_is_switched_by_the_variable_that_the_template_reads(folder):
    llm = scripted(folder, "qwen", *"abc", template=REASONING, special=THINK)
    for think in (None, True, False):
        llm.chat([USER], think=think)
    unset, on, off = (llm.tokenizer.decode(p, skip_special_tokens=False) for p in llm.prompts)
    assert unset == on
    assert off == on + "<think>\n\n</think>\n\n"
    with pytest.raises(UsageError, match=r"'high': .* no reasoning_effort; allowed is on or off"):
        llm.chat([USER], think="high")


def test_effort_is_what_harmony_has_for_a_switch(folder):
    source = TEMPLATES["harmony"].read_text()
    llm = scripted(folder, "harmony", *"abcd", template=source, special=HARMONY)
    for think in (None, True, False, "high"):
        llm.chat([USER], think=think)
    texts = [llm.tokenizer.decode(p) for p in llm.prompts]
    efforts = ["medium", "medium", "low", "high"]
    assert [effort in text for effort, text in zip(efforts, texts, strict=True)] == [True] * 4


def test_a_model_that_always_thinks_says_that_it_has_no_switch(folder):
    llm = mlxkv.load(model(folder, "always", template=TEMPLATE + "{# </think> #}"))
    with pytest.raises(UsageError, match="no switch for reasoning"):
        llm.chat([USER], think=False)


def test_not_to_think_is_granted_by_a_model_that_cannot(llm):
    assert llm.chat([USER], think=False, max_tokens=2).reasoning is None


def test_harmony_gives_reasoning_text_and_calls(folder):
    source = TEMPLATES["harmony"].read_text()
    answers = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi.",
        "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>",
        '<|channel|>commentary to=functions.now<|message|>{"a": "b',
    )
    llm = scripted(folder, "harmony", *answers, template=source, special=HARMONY)
    result = llm.chat([USER])
    assert (result.text, result.reasoning, result.tool_calls) == ("Hi.", "hm", ())
    result = llm.chat([USER], tools=TOOLS)
    assert "type now = () => any" in llm.tokenizer.decode(llm.prompts[-1])
    assert [(call.name, call.arguments, call.error) for call in result.tool_calls] == [
        ("now", {}, None)
    ]
    assert result.text == ""
    cut = llm.chat([USER], tools=TOOLS, max_tokens=30)
    assert cut.finish_reason == "length"
    assert "cut off" in str(cut.tool_calls[0].error)


def test_a_call_ends_with_an_end_token_that_is_its_marker(folder):
    source = TEMPLATES["harmony"].read_text()
    llm = scripted(
        folder,
        "harmony-call",
        "<|channel|>commentary to=functions.now<|message|>{}<|call|>",
        template=source,
        special=HARMONY,
        eos_token_id=[2, 8, 9],
    )
    result = llm.chat([USER])
    assert result.finish_reason == "stop"
    assert result.tool_calls[0].text.endswith("<|call|>")


# Conversations.


def turns(talk: mlxkv.Conversation, *texts: str, **options: Any) -> list[mlxkv.Stats]:
    return [last(talk.send(text, **options)) for text in texts]


def test_a_turn_computes_only_what_is_new(llm):
    talk = llm.conversation("Be brief.")
    first, second = turns(talk, "hello", "and then?", max_tokens=8)
    # The last token of an answer is chosen and not fed.
    assert second.restored_tokens == first.prompt_tokens + 7
    assert second.diverged_at is None
    assert talk.append_only is True
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]


@pytest.mark.parametrize("n_turns", [2, 4])
def test_a_window_model_restores_all_but_the_new_past_its_window(folder, n_turns):
    llm = mlxkv.load(model(folder, "gemma3", family="gemma3"))
    assert min(s.window for s in llm.model.cache_specs() if s and s.window) == 32
    talk = llm.conversation()
    seen = turns(talk, *["tell me more of it"] * n_turns, max_tokens=40)
    for before, after in itertools.pairwise(seen):
        assert after.restored_tokens == before.prompt_tokens + 39
        assert after.prompt_tokens > 2 * 32


def test_a_conversation_answers_as_one_that_computes_everything(folder):
    for family in ("llama", "gemma3"):
        llm = mlxkv.load(model(folder, family, family=family))
        talk = llm.conversation()
        turns(talk, "hello", "go on", max_tokens=30)
        answer = [c.token for c in talk.send("and?", max_tokens=12)]
        prompt = talk._tokens[: -len(answer)]
        assert llm.generate(prompt, max_tokens=12).tokens == answer


def test_an_answer_that_is_left_early_stays_as_far_as_it_came(llm):
    talk = llm.conversation()
    chunks = talk.send("hello")
    said = [next(chunks) for _ in range(6)]
    cast("Generator[Chunk]", chunks).close()
    assert talk.turns[-1]["content"] == "".join(chunk.text for chunk in said)
    # What is held runs at most one token ahead of what was shown.
    held = talk.kv_tokens
    after = turns(talk, "go on", max_tokens=4)[0]
    assert after.restored_tokens >= held - 2
    assert after.computed_tokens < 60


def test_a_window_model_goes_on_after_an_answer_was_left_past_its_window(folder):
    llm = mlxkv.load(model(folder, "gemma3", family="gemma3"))
    talk = llm.conversation()
    turns(talk, "tell me more of it", max_tokens=40)
    chunks = talk.send("go on")
    for _ in range(10):
        next(chunks)
    held = talk.kv_tokens
    cast("Generator[Chunk]", chunks).close()
    assert held > 3 * 32
    assert turns(talk, "and?", max_tokens=4)[0].restored_tokens == held


def test_a_stop_text_is_not_in_the_history(folder):
    llm = scripted(folder, "llama", "ab. cd", "x")
    talk = llm.conversation()
    turns(talk, "hello", stop=". ")
    assert talk.turns[-1]["content"] == "ab"
    second = turns(talk, "go on")[0]
    text = llm.tokenizer.decode(llm.prompts[-1], skip_special_tokens=False)
    assert text == llm.render(
        [USER, {"role": "assistant", "content": "ab"}, {"role": "user", "content": "go on"}]
    )
    assert second.restored_tokens == second.diverged_at == len(llm.prompts[0]) + 2


def test_an_error_leaves_the_conversation_as_it_was(folder):
    llm = mlxkv.load(model(folder, "small", max_position_embeddings=128))
    talk = llm.conversation()
    turns(talk, "hello", max_tokens=4)
    before = list(talk.turns)
    for text, error in (("x" * 200, ContextExceeded), (" ", UsageError)):
        with pytest.raises(error):
            talk.send(text)
    assert talk.turns == before
    assert turns(talk, "go on", max_tokens=4)[0].restored_tokens > 20


def test_a_conversation_that_is_cleared_keeps_what_the_next_prompt_shares(llm):
    talk = llm.conversation("A long system prompt that stays.")
    turns(talk, "hello", max_tokens=4)
    talk.clear()
    assert talk.turns == []
    stats = turns(talk, "hello", max_tokens=4)[0]
    assert stats.computed_tokens == 1
    talk.set_system("Another.")
    talk.clear()
    assert turns(talk, "hello", max_tokens=4)[0].restored_tokens < 30


def test_saved_turns_go_on(llm):
    talk = llm.conversation()
    turns(talk, "hello", max_tokens=4)
    other = llm.conversation()
    other.restore_turns(talk.turns)
    assert other.messages == talk.messages
    turns(other, "go on", max_tokens=4)
    assert len(other.turns) == 4
    with pytest.raises(UsageError, match="needs 'role' and 'content'"):
        other.restore_turns([{"role": "user"}])


ANSWER = "<think>\nhm\n</think>\n\nHi."


def test_a_template_that_drops_reasoning_is_computed_from_the_first_change(folder):
    llm = scripted(folder, "qwen", ANSWER, "Well.", "So.", template=REASONING, special=THINK)
    talk = llm.conversation()
    _, second = turns(talk, "hello", "go on")
    assert talk.append_only is False
    assert talk.turns[1] == {"role": "assistant", "content": "Hi.", "reasoning_content": "hm"}
    assert "hm" not in llm.tokenizer.decode(llm.prompts[1])
    assert second.restored_tokens == second.diverged_at == len(llm.prompts[0])


def test_reasoning_that_the_template_keeps_is_not_computed_again(folder):
    source = TEMPLATES["glm_moe"].read_text()
    assert "clear_thinking" in source
    answers = ("\n<think>hm</think>\nHi.", "\n<think>\nhm, hm\n</think>\n\nHo.", "So.")
    markers = (*THINK, "<tool_call>", "</tool_call>")
    llm = scripted(folder, "glm", *answers, template=source, special=markers)
    talk = llm.conversation()
    first, second, third = turns(talk, "hello", "go on", "and?")
    assert talk.append_only is True
    assert [turn.get("reasoning_content") for turn in talk.turns[1::2]] == ["hm", "hm, hm", None]
    for before, after in ((first, second), (second, third)):
        # All but the end token, which this template does not repeat.
        assert after.restored_tokens == before.prompt_tokens + before.generated_tokens - 1


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_reasoning_stays_inside_the_text_where_the_template_leaves_it_there(folder, opened):
    # This template knows nothing of reasoning, so the text is all that it can be kept in.
    source = TEMPLATE.replace("assistant\n{% endif %}", f"assistant\n{opened}{{% endif %}}")
    name = f"chatml-{bool(opened)}"
    answers = [ANSWER.removeprefix(opened), "So."]
    llm = scripted(folder, name, *answers, template=source, special=THINK)
    talk = llm.conversation()
    first, second = turns(talk, "hello", "go on")
    assert talk.turns[1] == {"role": "assistant", "content": "Hi.", "reasoning_content": "hm"}
    assert talk.append_only is True
    assert second.restored_tokens == first.prompt_tokens + first.generated_tokens
    assert second.diverged_at is None
    prompt = llm.tokenizer.decode(llm.prompts[1], skip_special_tokens=False)
    assert f"assistant\n{ANSWER}<|im_end|>" in prompt


def test_harmony_goes_on_where_nothing_was_thought_and_else_drops_it(folder):
    source = TEMPLATES["harmony"].read_text()
    final = "<|channel|>final<|message|>Hi."
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    options = {"template": source, "special": HARMONY}
    for answer, append_only in ((final, True), (thought + final, False)):
        llm = scripted(folder, "harmony", answer, final, final, **options)
        talk = llm.conversation()
        first, second = turns(talk, "hello", "go on", draft="off")  # a last token held or not
        assert talk.append_only is append_only
        # Where the answer ended with another token than the template writes, that one differs.
        n_kept = first.generated_tokens - 1 if append_only else 0
        assert second.restored_tokens == second.diverged_at
        assert second.restored_tokens >= first.prompt_tokens + n_kept
        assert talk.turns[1]["content"] == "Hi."


def test_calls_are_in_the_history_as_the_template_writes_them(folder):
    source = TEMPLATES["tools"].read_text()
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    llm = scripted(folder, "hermes", call, "So.", template=source)
    talk = llm.conversation()
    turns(talk, "hello", "go on", tools=TOOLS)
    made = talk.turns[1]["tool_calls"][0]["function"]
    assert made == {"name": "now", "arguments": {}}
    assert talk.append_only is True
    assert call in llm.tokenizer.decode(llm.prompts[1])


def test_another_way_to_think_between_turns_is_not_the_templates_fault(folder):
    llm = scripted(folder, "qwen", "Hi.", "Ho.", "So.", template=REASONING, special=THINK)
    talk = llm.conversation()
    turns(talk, "hello", think=False)
    turns(talk, "go on", think=True)
    assert talk.append_only is None
