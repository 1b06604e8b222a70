"""A chat's next prompt is computed while its user reads, where the template rewrites answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.eventloop import InputHookContext

import mlxkv
from benchmarks.scripted import scripted
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Chunk, Stats
from mlxkv.llm.conversation import Conversation
from mlxkv.llm.llm import LLM
from mlxkv.terminal.repl import _Idle
from tests.support.command_line import chat_model

KEPT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITTEN = KEPT.replace("{{ m.content }}", "{{ m.content | replace('Hm. ', '') }}")
ANSWER = "Hm. " + "It is the answer. " * 8
FRAME = len("\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("ahead")
    made = chat_model(path / "m", template=REWRITTEN, max_position_embeddings=4096)
    with mlxkv.load(made, dtype="float32") as found:
        yield found


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[LLM]:
    with mlxkv.load(chat_model(tmp_path / "m", template=KEPT), dtype="float32") as found:
        yield found


def send(talk: Conversation, text: str, answer: str = ANSWER) -> Stats:
    ids = talk.llm.tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False)
    with scripted(deque([ids])):
        chunks: list[Chunk] = list(talk.send(text))
    found = chunks[-1].stats
    assert found is not None
    return found


def ahead(talk: Conversation, *choice: Any) -> int:
    """Compute all that is known; in how many steps."""
    return sum(1 for _ in talk.computing_ahead(*choice))


def test_the_rewritten_answer_is_computed_before_the_next_message(llm):
    talk, without = llm.conversation(), llm.conversation()
    send(talk, "What is it? One.")
    ahead(talk, "full")
    one = send(talk, "And?")
    assert len(ANSWER) - 4 <= one.ahead_tokens <= one.restored_tokens and one.ahead_saved_s > 0
    assert one.computed_tokens <= FRAME + 2
    send(without, "What is it? Two.")
    other = send(without, "And?")
    assert other.computed_tokens >= len(ANSWER) and other.ahead_tokens == 0
    assert [m["content"] for m in talk.messages[1:]] == [m["content"] for m in without.messages[1:]]
    assert talk.append_only is without.append_only is False


def test_the_next_answer_is_the_one_of_a_prompt_that_is_computed_whole(llm):
    talk = llm.conversation()
    send(talk, "What is it? Three.")
    ahead(talk, "full")
    messages = [*talk.messages, {"role": "user", "content": "And?"}]
    tokens = [chunk.token for chunk in talk.send("And?", max_tokens=12)]
    with mlxkv.load(llm.path, dtype="float32") as fresh:
        assert tokens == fresh.chat(messages, max_tokens=12).tokens


def test_it_may_be_closed_after_any_step(llm):
    for n_steps in (0, 1, 2):
        talk = llm.conversation()
        send(talk, f"What is it? Four, {n_steps}.")
        steps = talk.computing_ahead("full")
        for _ in range(n_steps):
            next(steps)
        steps.close()
        messages = [*talk.messages, {"role": "user", "content": "And?"}]
        tokens = [chunk.token for chunk in talk.send("And?", max_tokens=4)]
        assert tokens == llm.chat(messages, max_tokens=4).tokens


def test_nothing_is_computed_where_answers_stay_or_it_is_off(llm, kept):
    talk = kept.conversation()
    assert ahead(talk, "full") == 0  # no turn yet
    send(talk, "What is it?")
    held = talk.kv_tokens
    ahead(talk, "full")
    assert talk.kv_tokens == held
    talk = llm.conversation()
    send(talk, "What is it? Five.")
    assert ahead(talk, "off") == 0
    with pytest.raises(UsageError, match="off, light, full"):
        talk.computing_ahead("some")


def keys(n: int) -> InputHookContext:
    """A terminal on which a key is pressed after so many looks."""
    looks = iter([False] * n)
    return InputHookContext(0, lambda: next(looks, True))


def test_a_key_pauses_it_and_a_line_ends_it(llm):
    talk, idle = llm.conversation(), _Idle()
    idle(keys(9))  # nothing yet
    send(talk, "What is it? Six.")
    idle.begin(talk, "full")
    idle(keys(0))
    assert idle._steps is not None
    idle(keys(1))
    assert idle._steps is not None
    idle(keys(1000))
    assert idle._steps is None
    assert send(talk, "And?").ahead_tokens >= len(ANSWER) - 4
    idle.begin(talk, "full")
    idle(keys(2))
    idle.end()
    assert idle._steps is None
