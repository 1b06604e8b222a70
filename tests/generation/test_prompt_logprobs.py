"""Log-probabilities of a prompt: those of one pass over all of it, however much is restored."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.errors import ContextExceeded, UsageError
from mlxkv.generation.prompt_logprobs import MAX_PROMPTS, PromptLogprobs, Scores
from mlxkv.nn.model import POSITIONS
from tests.support.command_line import chat_model

QUESTION = "The weir was built in 1874 of granite from the upper quarry, and mended twice. " * 5
CHOICES = ["In 1874.", "In 1901.", "Never.", "In 1874, of granite."]
# float32, and products of other shapes where a part is restored.
CLOSE = 2e-4


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def llm(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / request.param
    with mlxkv.load(chat_model(path, family=request.param, max_position_embeddings=2048)) as llm:
        yield llm


@pytest.fixture(autouse=True)
def forget(llm):
    """Each test begins with nothing known."""
    llm._scores.clear()
    llm.pages.clear()


def expected(llm, tokens: Sequence[int]) -> np.ndarray:
    """[L, V], of one pass without a cache; row i is the token at i + 1's."""
    logits = np.array(llm.model(mx.array([list(tokens)]))[0].astype(mx.float32), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def check(llm, result, tokens: Sequence[int], n_top: int) -> None:
    told = result.prompt_logprobs
    assert [each.token for each in told] == list(tokens)
    assert told[0].logprob is None and told[0].top == ()
    rows = expected(llm, tokens)
    for i, each in enumerate(told[1:]):
        assert each.logprob == pytest.approx(rows[i, each.token], abs=CLOSE)
        best = np.sort(rows[i])[::-1][:n_top]
        assert [top.logprob for top in each.top] == pytest.approx(list(best), abs=CLOSE)
        for top in each.top:
            assert top.logprob == pytest.approx(rows[i, top.token], abs=CLOSE)
        assert llm.tokenizer.bytes_of(each.token) == each.bytes


@pytest.mark.parametrize("n_top", [0, 1, 5])
def test_they_are_those_of_one_pass(llm, n_top):
    tokens = llm.encode(QUESTION)
    assert len(tokens) > 2 * POSITIONS
    check(llm, llm.generate(tokens, max_tokens=1, prompt_logprobs=n_top), tokens, n_top)


def test_of_the_choices_of_a_question_only_the_choice_is_computed(llm):
    answers = [llm.generate(QUESTION + c, max_tokens=1, prompt_logprobs=1) for c in CHOICES]
    for choice, answer in zip(CHOICES, answers, strict=True):
        check(llm, answer, llm.encode(QUESTION + choice), 1)
    # The first computes all; "In 1901." begins as "In 1874." does.
    computed = [answer.stats.computed_tokens for answer in answers]
    assert computed[0] == len(QUESTION + CHOICES[0])
    slack = 1 + (32 if llm.config.model_type.startswith("gemma3") else 0)  # of a window's page
    assert all(n <= len(c) + slack for n, c in zip(computed[1:], CHOICES[1:], strict=True))


def test_the_same_prompt_again_computes_one_token(llm):
    first = llm.generate(QUESTION, max_tokens=1, prompt_logprobs=2)
    again = llm.generate(QUESTION, max_tokens=1, prompt_logprobs=2)
    assert again.stats.computed_tokens == 1
    assert again.prompt_logprobs == first.prompt_logprobs


def test_kv_without_log_probabilities_is_computed_again(llm):
    llm.generate(QUESTION, max_tokens=1)
    answer = llm.generate(QUESTION, max_tokens=1, prompt_logprobs=0)
    assert answer.stats.computed_tokens == len(QUESTION) and answer.stats.miss is None
    check(llm, answer, llm.encode(QUESTION), 0)
    fewer = llm.generate(QUESTION, max_tokens=1, prompt_logprobs=3)
    assert fewer.stats.computed_tokens == len(QUESTION)
    check(llm, fewer, llm.encode(QUESTION), 3)


def test_a_batch_has_those_of_each_prompt(llm):
    prompts = [QUESTION + choice for choice in CHOICES]
    answers = llm.generate(prompts, max_tokens=2, prompt_logprobs=1)
    for prompt, answer in zip(prompts, answers, strict=True):
        check(llm, answer, llm.encode(prompt), 1)


def test_the_answer_is_the_one_without_them(llm):
    plain = llm.generate(QUESTION, max_tokens=8)
    scored = llm.generate(QUESTION, max_tokens=8, prompt_logprobs=0, logprobs=1)
    assert scored.tokens == plain.tokens and len(scored.logprobs) == 8
    assert plain.prompt_logprobs == ()


def test_a_prompt_of_one_token_has_none(llm):
    answer = llm.generate([5], max_tokens=1, prompt_logprobs=2)
    assert [(each.token, each.logprob) for each in answer.prompt_logprobs] == [(5, None)]


def test_a_prompt_that_does_not_fit_is_not_cut(llm):
    for options in ({"truncate": True}, {"overflow": "shift"}):
        with pytest.raises(ContextExceeded):
            llm.generate(QUESTION, context=100, prompt_logprobs=0, **options)


@pytest.mark.parametrize("value", [-1, 21, True, "1"])
def test_how_many_has_bounds(llm, value):
    with pytest.raises(UsageError, match="prompt_logprobs must be 0 to 20"):
        llm.generate(QUESTION, prompt_logprobs=value)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_prompt_that_starts_over_has_all_of_them(llm, short_chunks, monkeypatch, at):
    take, calls = PromptLogprobs._take, []

    def failing(self, rows, position):
        calls.append(position)
        if len(calls) == at + 1:
            raise RuntimeError("[malloc] Unable to allocate 4096 bytes.")
        take(self, rows, position)

    monkeypatch.setattr(PromptLogprobs, "_take", failing)
    answer = llm.generate(QUESTION, max_tokens=1, prompt_logprobs=1)
    assert len(calls) > at + 1 and answer.stats.rungs
    check(llm, answer, llm.encode(QUESTION), 1)


def test_a_step_of_logits_is_asked_of_the_budget(llm, monkeypatch):
    asked = []
    grant = llm.budget.grant

    def noting(sequence, n_new, **options):
        asked.append(options["beside"])
        return grant(sequence, n_new, **options)

    monkeypatch.setattr(llm.budget, "grant", noting)
    llm.generate(QUESTION, max_tokens=1, prompt_logprobs=1)
    assert asked[0] >= POSITIONS * llm.config.vocab_size * 4
    asked.clear()
    llm.generate(QUESTION[::-1], max_tokens=1)
    assert asked[0] == 0


def known(tokens: Sequence[int], n_top: int = 0) -> PromptLogprobs:
    made = PromptLogprobs(tokens, n_top)
    made.n_known = len(tokens)
    return made


def test_a_prompt_takes_from_the_one_that_shares_most():
    scores = Scores()
    for tokens in ([1, 2, 3], [1, 2, 9, 9], [7]):
        scores.join(known(tokens))
    new = PromptLogprobs([1, 2, 9, 4], 0)
    scores.join(new)
    assert new.n_known == 3
    other = PromptLogprobs([8, 2], 0)
    scores.join(other)
    assert other.n_known == 1


def test_what_knows_less_or_is_not_to_be_shared_is_not_taken():
    scores = Scores()
    scores.join(known([1, 2, 3], n_top=1))
    more, fewer = PromptLogprobs([1, 2, 3], 2), PromptLogprobs([1, 2, 3], 0)
    scores.join(more)
    scores.join(fewer)
    assert (more.n_known, fewer.n_known) == (1, 3)
    alone = Scores()
    hidden = known([1, 2])
    hidden.is_shared = False
    alone.join(hidden)
    last = PromptLogprobs([1, 2], 0)
    alone.join(last)
    assert last.n_known == 1


def test_only_recent_prompts_are_kept(monkeypatch):
    scores = Scores()
    for i in range(MAX_PROMPTS + 5):
        scores.join(known([i, 1]))
    old, recent = PromptLogprobs([2, 1], 0), PromptLogprobs([MAX_PROMPTS, 1], 0)
    scores.join(old)
    scores.join(recent)
    assert (old.n_known, recent.n_known) == (1, 2)
    monkeypatch.setattr("mlxkv.generation.prompt_logprobs.MAX_VALUES", 3)
    scores.join(known([1, 2, 3]))
    after = PromptLogprobs([MAX_PROMPTS, 1], 0)
    scores.join(after)
    assert after.n_known == 1
