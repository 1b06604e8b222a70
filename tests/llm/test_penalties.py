"""Penalties that count an answer's tokens, and where an answer may end, through a whole model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.errors import UsageError
from mlxkv.generation.context_shift import Bound
from mlxkv.generation.decoder import Decoder
from mlxkv.generation.flight import Flight
from mlxkv.generation.request import Request
from mlxkv.llm.llm import LLM
from tests.support.command_line import chat_model

BOTH = {"presence_penalty": 1.5, "frequency_penalty": 0.4}
PENALTIES = [{"presence_penalty": 2}, {"frequency_penalty": 0.9}, BOTH, {"frequency_penalty": -2}]
PROMPT = "hello there, hello again"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("penalties") / "llama", ascii=True)


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return mlxkv.load(folder, dtype="float32")


def logits_after(llm: LLM, tokens: list[int]) -> np.ndarray:
    """Logits [V] of a whole forward pass, in float64."""
    caches = llm.session().caches
    return np.array(llm.model.last_logits(mx.array([tokens]), caches)[0], np.float64)


def by_whole_passes(
    llm: LLM, prompt: str, n: int, bound: Bound | None = None, presence_penalty: float = 0,
    frequency_penalty: float = 0,
) -> list[int]:  # fmt: skip
    """The likeliest tokens under the penalties; each step computes all that the context holds."""
    tokens = llm.encode(prompt)
    answer: list[int] = []
    for _ in range(n):
        whole = [*tokens, *answer]
        x = logits_after(llm, whole if bound is None else bound.remaining(whole))
        for token, count in Counter(answer).items():
            x[token] -= frequency_penalty * count + presence_penalty
        answer.append(int(x.argmax()))
    return answer


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_an_answer_is_the_one_that_whole_passes_give(llm, penalties):
    expected = by_whole_passes(llm, PROMPT, 40, **penalties)
    assert llm.generate(PROMPT, max_tokens=40, **penalties).tokens == expected
    assert expected != llm.generate(PROMPT, max_tokens=40).tokens


def test_tokens_of_the_prompt_are_not_counted(llm):
    prompt = PROMPT * 3
    first = llm.generate(prompt, max_tokens=1).tokens
    said = prompt + llm.tokenizer.decode(first)
    assert llm.generate(said, max_tokens=1).tokens == (
        llm.generate(said, max_tokens=1, presence_penalty=2, frequency_penalty=2).tokens
    )


def test_each_row_of_a_batch_has_its_own(llm):
    seeds = [{}, {"temperature": 0.9, "seed": 4}]
    asked = [{**penalties, **seed} for penalties in (*PENALTIES, {}) for seed in seeds]
    asked = [{"max_tokens": 8 + 5 * i, **options} for i, options in enumerate(asked)]
    scheduler, told = Scheduler(llm, len(asked)), [[] for _ in asked]
    for options, chunks in zip(asked, told, strict=True):
        scheduler.add(Task(Request.of(PROMPT, **options), chunks.append, lambda: False))
    while not scheduler.is_idle:
        scheduler.step()
    for options, chunks in zip(asked, told, strict=True):
        assert [chunk.token for chunk in chunks[:-1]] == llm.generate(PROMPT, **options).tokens


def test_the_same_seed_gives_the_same_answer(llm):
    options: dict[str, Any] = {**BOTH, "temperature": 1.2, "max_tokens": 30}
    first = llm.generate(PROMPT, seed=3, **options).tokens
    assert llm.generate(PROMPT, seed=3, **options).tokens == first
    assert llm.generate(PROMPT, seed=4, **options).tokens != first


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 8}], ids=str)
def test_a_restart_goes_on_with_the_counts(llm, monkeypatch, sampling):
    options = {**BOTH, **sampling, "max_tokens": 30, "min_tokens": 12, "draft": "off"}
    expected = llm.generate(PROMPT, **options).tokens
    feed, steps = Decoder._next, []

    def failing(self: Decoder, flight: Flight | None) -> Flight | None:
        steps.append(1)
        if len(steps) in (9, 21):
            raise RuntimeError("[malloc] Unable to allocate 1 bytes.")
        return feed(self, flight)

    monkeypatch.setattr(Decoder, "_next", failing)
    assert llm.generate(PROMPT, **options).tokens == expected
    assert len(steps) > 21


def test_tokens_that_a_shift_dropped_still_count(llm):
    options: dict[str, Any] = {"context": 48, "overflow": "shift", "max_tokens": 60, **BOTH}
    result = llm.generate(PROMPT, logit_bias={}, **options)
    assert result.stats.shifted_tokens > 0
    # Behind a shift the model is as if it had never seen what was dropped.
    assert result.tokens == by_whole_passes(llm, PROMPT, 60, Bound(48, lambda: 0), **BOTH)


def test_log_probabilities_stay_the_models_own(llm):
    result = llm.generate(PROMPT, max_tokens=12, logprobs=2, **BOTH)
    tokens = llm.encode(PROMPT)
    for said in result.logprobs:
        x = logits_after(llm, tokens)
        tokens.append(said.token)
        assert abs(said.logprob - (x - np.logaddexp.reduce(x))[said.token]) < 1e-4


# Where an answer may end.


@pytest.fixture(scope="module")
def ends(llm) -> dict[int, float]:
    """A bias by which the model ends at once."""
    return dict.fromkeys(llm.tokenizer.eos_token_ids, 100.0)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 8}, BOTH], ids=str)
@pytest.mark.parametrize("n", [0, 1, 5, 300])
def test_no_end_token_comes_before_the_least_length(llm, ends, n, sampling):
    result = llm.generate(PROMPT, min_tokens=n, max_tokens=400, logit_bias=ends, **sampling)
    assert (len(result.tokens), result.finish_reason) == (n, "stop")
    assert ends.keys().isdisjoint(result.tokens)


def test_rows_of_a_batch_have_their_own_least_lengths(llm, ends):
    scheduler, told = Scheduler(llm, 8), [[] for _ in range(5)]
    for i, chunks in enumerate(told):
        request = Request.of(PROMPT, min_tokens=3 * i, max_tokens=50, logit_bias=ends)
        scheduler.add(Task(request, chunks.append, lambda: False))
    while not scheduler.is_idle:
        scheduler.step()
    assert [len(chunks) - 2 for chunks in told] == [3 * i for i in range(5)]


def test_no_stop_text_begins_before_the_least_length(llm):
    whole = llm.generate(PROMPT, max_tokens=40)
    assert len(whole.text) == 40, "a letter a token"
    letter = whole.text[0]
    for n in (0, 1, 7, 30):
        result = llm.generate(PROMPT, max_tokens=40, min_tokens=n, stop=letter)
        at = whole.text.find(letter, n)
        assert result.text == (whole.text if at < 0 else whole.text[:at])
        assert len(result.tokens) == (40 if at < 0 else at + 1)


def test_end_tokens_are_ignored_on_request(llm, ends):
    result = llm.generate(PROMPT, max_tokens=9, logit_bias=ends, ignore_eos=True)
    assert (len(result.tokens), result.finish_reason, result.text) == (9, "length", "")
    assert set(result.tokens) <= ends.keys()
    both = llm.generate(PROMPT, max_tokens=9, logit_bias=ends, ignore_eos=True, min_tokens=4)
    assert [token in ends for token in both.tokens] == [False] * 4 + [True] * 5


@pytest.mark.parametrize("options", [{"min_tokens": 2}, {"ignore_eos": True}])
def test_a_format_says_itself_where_it_ends(llm, options):
    with pytest.raises(UsageError, match="a format says itself"):
        llm.generate(PROMPT, format="json", max_tokens=9, **options)


def test_the_least_length_is_at_most_the_greatest(llm):
    with pytest.raises(UsageError, match="min_tokens must be 0 to max_tokens; got 5"):
        llm.generate(PROMPT, max_tokens=4, min_tokens=5)
