"""`echo` with log-probabilities, as lm-eval asks for them: their shape, and a real model's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.engine.engine import ThreadedEngine
from mlxkv.generation.outputs import Chunk, TokenLogprobs
from mlxkv.server.model_names import LocalModel
from mlxkv.server.openai.completions import CompletionReply, CompletionRequest
from tests.support.command_line import chat_model
from tests.support.fake_engine import stats
from tests.support.threaded_engine import running


def token(text: str, logprob: float | None = -0.5) -> TokenLogprobs:
    top = () if logprob is None else (TokenLogprobs(3, "t", b"t", -0.25),)
    return TokenLogprobs(7, text, text.encode(), logprob, top)


class Written:
    """An answer that is known already."""

    def __init__(self, chunks: Sequence[Chunk]):
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        for chunk in self._chunks:
            yield chunk

    def cancel(self) -> None:
        pass


def answer(prompt: Sequence[TokenLogprobs] | None) -> Written:
    first = Chunk(" x", 1, logprobs=token(" x"), prompt_tokens=2,
                  prompt_logprobs=None if prompt is None else tuple(prompt))  # fmt: skip
    last = Chunk("y", 2, "length", stats(prompt_tokens=2, generated_tokens=2), logprobs=token("y"))
    return Written([first, last])


def whole(body: dict[str, Any], *answers: Written) -> dict[str, Any]:
    reply = CompletionReply(CompletionRequest(model="m", **body))
    return asyncio.run(reply.whole(list(answers)))


PROMPT = [token("a", None), token(" b")]


def test_the_prompts_tokens_come_before_the_answers():
    found = whole({"prompt": [1, 2], "echo": True, "logprobs": 1}, answer(PROMPT))["choices"][0]
    assert found["text"] == "a b xy" and found["finish_reason"] == "length"
    assert found["logprobs"] == {
        "tokens": ["a", " b", " x", "y"],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"t": -0.25}, {"t": -0.25}, {"t": -0.25}],
        "text_offset": [0, 1, 3, 5],
    }


def test_a_token_that_the_text_does_not_have_takes_no_room():
    prompt = [token("<s>", None), token(" a"), token(" b")]
    found = whole({"prompt": "a b", "echo": True, "logprobs": 0}, answer(prompt))["choices"][0]
    assert found["text"] == "a b xy"
    assert found["logprobs"]["text_offset"] == [0, 0, 1, 3, 5]


def test_an_answer_of_no_tokens_is_the_prompt():
    found = whole({"prompt": [1, 2], "echo": True, "logprobs": 1, "max_tokens": 0}, answer(PROMPT))
    assert found["choices"][0]["text"] == "a b"
    assert found["choices"][0]["logprobs"]["tokens"] == ["a", " b"]
    assert found["usage"]["completion_tokens"] == 0 and found["usage"]["total_tokens"] == 2


def test_without_log_probabilities_the_text_is_echoed_alone():
    for prompt, told in (("a b", None), ([1, 2], PROMPT)):
        found = whole({"prompt": prompt, "echo": True}, answer(told))["choices"][0]
        assert (found["text"], found["logprobs"]) == ("a b xy", None)


def test_each_answer_has_its_own_prompt():
    body = {"prompt": ["a", "c"], "n": 2, "echo": True}
    found = whole(body, *(answer(None) for _ in range(4)))["choices"]
    assert [choice["text"] for choice in found] == ["a xy", "a xy", "c xy", "c xy"]


def test_a_stream_begins_with_the_prompt():
    body = {"prompt": [1, 2], "echo": True, "logprobs": 1, "stream": True}
    reply = CompletionReply(CompletionRequest(model="m", **body))

    async def read() -> list[bytes]:
        return [event async for event in reply.events([answer(PROMPT)])]

    events = [json.loads(e.decode().removeprefix("data: ")) for e in asyncio.run(read())[:-1]]
    choices = [event["choices"][0] for event in events]
    assert [choice["text"] for choice in choices] == ["a b x", "y"]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 1, 3], [5]]


QUESTION = "The weir was built in 1874 of granite, and mended twice. " * 6
CHOICES = ["In 1874.", "In 1901.", "Never."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("echo") / "m", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def engine() -> Iterator[ThreadedEngine]:
    with running() as made:
        yield made


def ask(engine: ThreadedEngine, model: Any, **fields: Any) -> dict[str, Any]:
    body = CompletionRequest(model=str(model), **fields)

    async def read() -> dict[str, Any]:
        asks = body.asks(LocalModel(str(model)), "")
        return await CompletionReply(body).whole([engine.submit(each) for each in asks])

    return asyncio.run(read())


def test_lm_evals_choices_are_scored_and_only_the_choice_is_computed(engine, model):
    with mlxkv.load(model, dtype="float32") as llm:
        question = llm.encode(QUESTION)
        prompts = [question + llm.encode(choice) for choice in CHOICES]
        rows = [np.array(llm.model(mx.array([p]))[0], np.float64) for p in prompts]
    # As lm-eval sends them: token ids, one token of an answer, the likeliest of each place.
    options = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0.0, "seed": 1234}
    for prompt, logits in zip(prompts, rows, strict=True):
        found = ask(engine, model, prompt=[prompt], **options)
        told = found["choices"][0]["logprobs"]
        assert len(told["token_logprobs"]) == len(prompt) + 1 and told["token_logprobs"][0] is None
        expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        chosen = [expected[i, t] for i, t in enumerate(prompt[1:])]
        assert told["token_logprobs"][1:-1] == pytest.approx(chosen, abs=2e-4)
        tops = [next(iter(each.values())) for each in told["top_logprobs"][1:]]
        assert tops == pytest.approx(expected.max(-1), abs=2e-4)
        if prompt is not prompts[0]:
            n_choice = len(prompt) - len(question)
            details = found["usage"]["prompt_tokens_details"]
            assert details["computed_tokens"] <= n_choice + 1


def test_prompts_of_one_request_are_scored_as_well(engine, model):
    options = {"max_tokens": 1, "logprobs": 0, "echo": True}
    prompts = [QUESTION + choice for choice in CHOICES]
    together = ask(engine, model, prompt=prompts, **options)["choices"]
    for i, prompt in enumerate(prompts):
        alone = ask(engine, model, prompt=prompt, **options)["choices"][0]
        assert together[i]["text"].startswith(prompt)
        assert together[i]["logprobs"]["token_logprobs"][1:] == pytest.approx(
            alone["logprobs"]["token_logprobs"][1:], abs=2e-4
        )
