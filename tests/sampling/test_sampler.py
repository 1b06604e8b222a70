"""Sampling: parameters and their errors, filters against NumPy, draws, seeds, laziness."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxkv.errors import ConfigError, UsageError
from mlxkv.sampling.params import DEFAULTS, SamplingParams, suppressed
from mlxkv.sampling.sampler import AnswerIds, Recent, RowChoice, Sampler, choose
from tests.support.branches import BRANCHES, Branches, gpu_branches

V = 200


def logits_of(seed: int, n_vocab: int = V, rows: int = 1, scale: float = 3.0) -> np.ndarray:
    """Logits [rows, n_vocab] without two equal values in a row."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, n_vocab)) * scale).astype(np.float32)


def reference(
    logits: np.ndarray,
    params: SamplingParams,
    recent: list[int] | None = None,
    answer: list[int] | None = None,
) -> np.ndarray:
    """The distribution [V] of one row, in float64, step by step."""
    p = params.resolved()
    x = logits.astype(np.float64).copy()
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    for token in set((recent or [])[-p.repeat_last_n :] if p.repeat_last_n else []):
        x[token] = x[token] / p.repeat_penalty if x[token] > 0 else x[token] * p.repeat_penalty
    for token in answer or []:
        x[token] -= p.frequency_penalty
    for token in set(answer or []):
        x[token] -= p.presence_penalty
    if p.temperature == 0:
        return (np.arange(len(x)) == x.argmax()).astype(np.float64)
    order = np.argsort(-x)
    if p.top_k:
        order = order[: p.top_k]
    probabilities = np.exp(x[order] - x.max())
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    kept = order[(before < p.top_p) & (probabilities >= p.min_p * probabilities[0])]
    weights = np.zeros_like(x)
    weights[kept] = np.exp((x[kept] - x.max()) / p.temperature)
    return weights / weights.sum()


def distribution(logits: np.ndarray, params: SamplingParams, recent: Any = None) -> np.ndarray:
    """What the sampler draws from: [rows, V]."""
    sampler = Sampler(params, logits.shape[-1])
    return np.array(sampler.probabilities(mx.array(logits), recent))


# Filters ------------------------------------------------------------------------------------------

FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": V - 1},
    {"top_k": V},
    {"top_k": 10**9},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.1},
    {"top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_distribution_is_the_references(filters: dict[str, Any], temperature: float):
    params = SamplingParams(temperature=temperature, **filters)
    logits = logits_of(1, rows=3)
    got = distribution(logits, params)
    for row in range(3):
        expected = reference(logits[row], params)
        # Which tokens are kept is exact; their probabilities are float32.
        assert np.array_equal(got[row] > 0, expected > 0)
        np.testing.assert_allclose(got[row], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("branches", BRANCHES)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    top_k=st.integers(0, V + 5),
    top_p=st.floats(0.01, 0.999) | st.just(1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(0.05, 5.0),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_combination_of_filters_is_the_references(
    branches: Branches,
    seed: int,
    scale: float,
    top_k: int,
    top_p: float,
    min_p: float,
    temperature: float,
):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(seed, scale=scale)
    with branches():
        got = distribution(logits, params)[0]
    expected = reference(logits[0], params)
    # At a low temperature float32 has no room for the tail that float64 still holds.
    moved = ((got > 0) != (expected > 0)) & (np.maximum(got, expected) > 1e-6)
    # A token whose float32 probability lands on a limit may fall on either side of it: at most
    # one at each of the two limits.
    assert moved.sum() <= 2
    if not moved.any():
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("n_vocab", [511, 512, 513, 5000, 49_152, 100_003])
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_the_nucleus_of_a_large_vocabulary_is_exact(n_vocab: int, scale: float):
    logits = logits_of(n_vocab, n_vocab, rows=2, scale=scale)
    for top_p in (0.05, 0.5, 0.9, 0.99):
        got = distribution(logits, SamplingParams(temperature=1, top_p=top_p))
        for row in range(2):
            x = np.exp(logits[row].astype(np.float64))
            x /= x.sum()
            kept = got[row] > 0
            # A prefix of the likeliest, whose mass reaches top_p with its last token. 1e-6 and
            # 3e-6: the rounding of float32 exponentials, and of sums over the vocabulary.
            assert x[kept].min() >= x[~kept].max() * (1 - 1e-6)
            assert x[kept].sum() >= top_p - 3e-6
            assert x[kept].sum() - x[kept].min() < top_p + 3e-6


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
def test_the_nucleus_is_the_same_where_everything_is_sorted_at_once(top_p: float):
    logits, params = logits_of(13, 3000, rows=2), SamplingParams(temperature=1, top_p=top_p)
    selected = distribution(logits, params)
    with gpu_branches():
        assert np.array_equal(distribution(logits, params), selected)


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("n_vocab", [100, 5000])
def test_a_top_p_beyond_float32_keeps_all_but_the_rounding(n_vocab: int):
    logits = logits_of(14, n_vocab)
    got = distribution(logits, SamplingParams(temperature=1, top_p=1 - 1e-12))[0]
    exact = reference(logits[0], SamplingParams(temperature=1))
    # What may be missing is below the rounding of a float32 sum.
    assert exact[got == 0].sum() < 3e-6


@pytest.mark.usefixtures("branches")
def test_tokens_as_likely_as_the_last_of_the_nucleus_stay():
    logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]], dtype=np.float32)
    # exp: 7.39 2.72 2.72 2.72 1 of 16.5; the first two reach 0.5.
    assert (distribution(logits, SamplingParams(temperature=1, top_p=0.5)) > 0).tolist() == [
        [True, True, True, True, False]
    ]
    flat = np.zeros((1, 5000), dtype=np.float32)
    assert (distribution(flat, SamplingParams(temperature=1, top_p=0.1)) > 0).all()


@pytest.mark.usefixtures("branches")
def test_top_k_keeps_k_tokens_where_more_are_equal():
    flat = np.zeros((2, V), dtype=np.float32)
    got = distribution(flat, SamplingParams(temperature=1, top_k=5))
    assert (got > 0).sum(axis=1).tolist() == [5, 5]


@pytest.mark.usefixtures("branches")
def test_tokens_ruled_out_by_the_model_are_never_kept():
    logits = logits_of(3)
    logits[0, 10:] = -np.inf
    choices: list[dict[str, Any]] = [{}, {"top_k": 50}, {"top_p": 0.999}, {"min_p": 1e-9}]
    for filters in choices:
        got = distribution(logits, SamplingParams(temperature=1.5, **filters))
        assert (got[0, 10:] == 0).all()
        assert got.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-9, 1e-4])
def test_a_temperature_near_zero_is_greedy(temperature: float):
    logits = logits_of(4, rows=4)
    got = Sampler(SamplingParams(temperature=temperature, seed=0), V)(mx.array(logits))
    assert got.tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.usefixtures("branches")
def test_greedy_takes_the_first_of_equal_tokens_in_every_dtype():
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        logits = mx.array([[0.0, 3.0, 3.0, 1.0]]).astype(dtype)
        assert Sampler(SamplingParams(), 4)(logits).tolist() == [1]


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sixteen_bit_logits_are_computed_on_in_float32(dtype: mx.Dtype):
    logits = mx.array(logits_of(5)).astype(dtype)
    params = SamplingParams(temperature=0.7, min_p=0.01)
    got = Sampler(params, V).probabilities(logits)
    assert got.dtype == mx.float32
    exact = reference(np.array(logits.astype(mx.float32))[0], params)
    np.testing.assert_allclose(np.array(got)[0], exact, rtol=1e-5, atol=1e-9)


# Penalty and bias ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("recent", [[], [3], [3, 3, 5], list(range(100)), [199] * 70 + [0]])
def test_the_repeat_penalty_is_the_references(temperature: float, recent: list[int]):
    params = SamplingParams(temperature=temperature, repeat_penalty=1.3, repeat_last_n=64)
    logits = logits_of(6)
    expected = reference(logits[0], params, recent)
    for shaped in (mx.array(recent, dtype=mx.uint32), mx.array([recent], dtype=mx.int32)):
        got = distribution(logits, params, shaped)[0]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("branches")
def test_only_the_last_n_tokens_are_penalized_and_each_row_by_its_own():
    logits = np.array([[2.0, 1.9, -1.0], [2.0, 1.9, -1.0]], dtype=np.float32)
    recent = mx.array([[1, 0], [0, 1]])
    one = Sampler(SamplingParams(repeat_penalty=2.0, repeat_last_n=1), 3)
    assert one(mx.array(logits), recent).tolist() == [1, 0]
    off = Sampler(SamplingParams(repeat_penalty=2.0, repeat_last_n=0), 3)
    assert not off.needs_recent
    assert off(mx.array(logits), recent).tolist() == [0, 0]
    # A negative logit becomes more so.
    negative = Sampler(SamplingParams(repeat_penalty=2.0, temperature=1.0), 3)
    got = negative.probabilities(mx.array(logits[:1]), mx.array([[2, 2]]))
    np.testing.assert_allclose(got[0, 2] / got[0, 0], math.exp(-2 - 2), rtol=1e-5)


@pytest.mark.usefixtures("branches")
def test_a_bias_is_added_before_anything_else():
    params = SamplingParams(temperature=1.0, top_k=2, logit_bias={7: 100.0, 3: -100.0, 8: 0.5})
    logits = logits_of(7, rows=2)
    got = distribution(logits, params)
    for row in range(2):
        np.testing.assert_allclose(got[row], reference(logits[row], params), atol=1e-6)
    assert Sampler(SamplingParams(logit_bias={7: 100}), V)(mx.array(logits)).tolist() == [7, 7]


@pytest.mark.parametrize("bias", [{V: 1.0}, {0: 1.0, 10**9: 1.0}])
def test_a_bias_past_the_vocabulary_is_a_usage_error(bias: dict[int, float]):
    with pytest.raises(UsageError, match=rf"token ids must be from 0 to {V - 1}; got {max(bias)}"):
        Sampler(SamplingParams(logit_bias=bias), V)


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("bias", [None, {7: 100.0, 3: 2.0}])
def test_a_suppressed_token_is_never_chosen(filters: dict[str, Any], bias: Any):
    logits = logits_of(7, rows=2)
    best = sorted({int(row.argmax()) for row in logits} | {7, V + 5})
    params = SamplingParams(temperature=1.0, logit_bias=bias, **filters)
    sampler = Sampler(params, V, best)
    without = logits.copy()
    without[:, best[:-1]] = -np.inf
    got = np.array(sampler.probabilities(mx.array(logits)))
    kept = {token: x for token, x in (bias or {}).items() if token not in best}
    wanted = distribution(without, dataclasses.replace(params, logit_bias=kept or None))
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert not got[:, best[:-1]].any()
    greedy = Sampler(SamplingParams(logit_bias=bias), V, best)
    assert not {int(x) for x in np.array(greedy(mx.array(logits)))} & set(best)
    assert greedy.rule != Sampler(SamplingParams(logit_bias=bias), V).rule


def test_the_tokens_that_a_model_suppresses_are_read(tmp_path: Path):
    file = tmp_path / "generation_config.json"
    assert suppressed(tmp_path) == frozenset()
    for said, ids in (
        ({}, []),
        ({"suppress_tokens": None}, []),
        ({"suppress_tokens": [3, 5]}, [3, 5]),
    ):
        file.write_text(json.dumps(said))
        assert suppressed(tmp_path) == frozenset(ids)
    for bad in (3, [-1], ["a"], [True]):
        file.write_text(json.dumps({"suppress_tokens": bad}))
        with pytest.raises(ConfigError, match="suppress_tokens must be a list of token ids"):
            suppressed(tmp_path)


# Draws --------------------------------------------------------------------------------------------

N_DRAWS = 4000


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 12},
        {"top_p": 0.9},
        {"min_p": 0.02},
        {"top_k": 30, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_vocab", [60, 6000])
def test_drawn_tokens_follow_the_distribution(filters: dict[str, Any], n_vocab: int):
    params = SamplingParams(temperature=0.8, seed=11, **filters)
    logits = logits_of(8, n_vocab)
    expected = reference(logits[0], params)
    rows = 500
    sampler = Sampler(params, n_vocab)
    batch = mx.broadcast_to(mx.array(logits), (rows, n_vocab))
    drawn = np.concatenate([np.array(sampler(batch)) for _ in range(N_DRAWS // rows)])
    counts = np.bincount(drawn, minlength=n_vocab)
    assert (counts[expected == 0] == 0).all()
    # Pearson's statistic over the tokens expected five times or more, the others as one group.
    often = expected * N_DRAWS >= 5
    seen = [*counts[often], counts[~often].sum()]
    due = np.array([*expected[often], expected[~often].sum()]) * N_DRAWS
    seen, due = np.array(seen)[due > 0], due[due > 0]
    statistic, freedom = ((seen - due) ** 2 / due).sum(), len(due) - 1
    # Its mean is `freedom` and its variance twice that. The seed is fixed: this passes or fails
    # the same way every time, and five sigma would fail by chance for one seed in a million.
    assert statistic < freedom + 5 * math.sqrt(2 * max(freedom, 1))


def drawn(sampler: Sampler, logits: mx.array, n: int = 24) -> list[int]:
    return [token for _ in range(n) for token in np.array(sampler(logits)).tolist()]


@pytest.mark.parametrize("filters", [{}, {"top_k": 40}, {"top_p": 0.9}], ids=str)
def test_the_same_seed_draws_the_same_tokens(filters: dict[str, Any]):
    logits = mx.array(logits_of(9, 5000))

    def with_seed(seed: int | None) -> list[int]:
        return drawn(Sampler(SamplingParams(temperature=1.5, seed=seed, **filters), 5000), logits)

    first = with_seed(5)
    mx.random.seed(123)
    expected_state = np.array(mx.random.randint(0, 2**31 - 1, (4,)))
    mx.random.seed(123)
    assert with_seed(5) == first
    # MLX's own random state was neither read nor moved on.
    assert np.array_equal(np.array(mx.random.randint(0, 2**31 - 1, (4,))), expected_state)
    assert with_seed(6) != first
    assert with_seed(None) != with_seed(None)
    assert len(set(first)) > 4


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("filters", [{}, {"top_k": 40}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_logits_that_were_rounded_otherwise_draw_the_same_tokens(filters: dict[str, Any]):
    """A batch, a longer chunk and restored KV give the same logits but for their last bits."""
    logits, params = logits_of(9, 49_152, scale=1.0), SamplingParams(seed=3, temperature=0.8)
    params = dataclasses.replace(params, **filters)
    ours, theirs = Sampler(params, 49_152), Sampler(params, 49_152)
    for seed in range(40):
        other = logits + logits_of(seed, 49_152, scale=1e-5)
        assert ours(mx.array(logits)).item() == theirs(mx.array(other)).item()


def test_an_unset_seed_can_be_read_and_used_again():
    logits = mx.array(logits_of(10))
    one = Sampler(SamplingParams(temperature=2.0), V)
    two = Sampler(SamplingParams(temperature=2.0, seed=one.seed), V)
    assert drawn(one, logits) == drawn(two, logits)


@pytest.mark.usefixtures("branches")
def test_rows_are_drawn_independently():
    sampler = Sampler(SamplingParams(temperature=1, seed=0), V)
    assert len(set(drawn(sampler, mx.zeros((64, V)), 1))) > 20


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("filters", FILTERS[:8], ids=str)
def test_logits_that_are_not_numbers_give_some_id_in_range(filters: dict[str, Any]):
    for bad in (np.nan, np.inf, -np.inf):
        for temperature in (0.0, 1.0):
            sampler = Sampler(SamplingParams(temperature=temperature, seed=0, **filters), V)
            assert all(0 <= token < V for token in drawn(sampler, mx.full((2, V), bad), 1))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_nothing_is_evaluated_before_the_token_is_asked_for(filters: dict[str, Any]):
    logits, recent = mx.array(logits_of(12)), mx.array([[1, 2, 3]])
    params = SamplingParams(
        temperature=0.9,
        repeat_penalty=1.1,
        logit_bias={1: 1.0},
        seed=1,
        presence_penalty=1,
        **filters,
    )
    sampler = Sampler(params, V)
    # While mx.vmap traces a function, whatever evaluates raises. (mx.compile does not trace where
    # there is no C++ compiler.)
    with pytest.raises(ValueError, match="eval"):
        mx.vmap(lambda x: sampler(x[None], recent, recent).item())(logits)
    mx.vmap(lambda x: sampler(x[None], recent, recent))(logits)


COUNTING = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.75},
    {"presence_penalty": -2, "frequency_penalty": 2},
    {"frequency_penalty": -0.5, "repeat_penalty": 1.3, "logit_bias": {4: 1.5}},
]


@pytest.mark.usefixtures("branches")
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("penalties", COUNTING, ids=str)
@pytest.mark.parametrize("answer", [[], [5], [4, 9, 4, 4, V - 1, 0, 9], [*range(V)] * 3])
def test_penalties_that_count_are_the_references(
    penalties: dict[str, Any], temperature: float, answer: list[int]
):
    params = SamplingParams(temperature=temperature, top_k=30, top_p=0.9, **penalties)
    logits, recent = logits_of(21, rows=2), [4, 8]
    given = mx.array(AnswerIds(V, answer).first((), 0))
    got = np.array(Sampler(params, V).probabilities(mx.array(logits), mx.array(recent), given))
    for row in range(2):
        expected = reference(logits[row], params, recent, answer)
        assert np.array_equal(got[row] > 0, expected > 0)
        np.testing.assert_allclose(got[row], expected, rtol=1e-5, atol=1e-9)


def test_an_answers_ids_are_uploaded_and_not_a_vocabulary():
    answer, tokens = AnswerIds(100_000, [7, 7]), [*range(600)]
    for n in (0, 1, 1, 253, 254, 255, 600):
        ids = answer.first(tokens[: n + 1], n)
        assert len(ids) == (256 if n + 2 <= 256 else 512 if n + 2 <= 512 else 1024)
        assert ids[ids < 100_000].tolist() == [7, 7, *tokens[:n]]


def test_without_penalties_a_choice_has_no_more_operations():
    logits, fed = mx.array(logits_of(15)), mx.array([3])
    recent = Recent(range(9), fed, 0, AnswerIds(V, [1, 2]).first((), 0))
    n = {}
    for value in (None, 0, 0.5):
        sampler = Sampler(SamplingParams(presence_penalty=value, frequency_penalty=value), V)
        rows = {0: RowChoice(sampler, recent)}
        n[value] = n_primitives(*[tokens for _, tokens in choose(logits, rows)])
    assert n[None] == n[0] <= n_primitives(mx.argmax(logits, axis=-1)) < n[0.5]


# Rows together ------------------------------------------------------------------------------------

RULES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "top_k": 3},
    {"temperature": 0.0, "logit_bias": {3: 4.0, 7: -4.0}},
    {"temperature": 0.0, "repeat_penalty": 1.4, "repeat_last_n": 5},
    {"temperature": 0.9},
    {"temperature": 0.9, "top_k": 12},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 600, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.9, "repeat_penalty": 1.4, "logit_bias": {1: 2.0}},
    {"temperature": 0.0, "presence_penalty": 1.5},
    {"temperature": 0.8, "frequency_penalty": -0.4, "top_p": 0.9},
    {"temperature": 0.9, "presence_penalty": 2, "frequency_penalty": 1, "repeat_penalty": 1.2},
]
"""What rows of a batch may ask for; a seed comes with each."""


@pytest.mark.parametrize("branches", BRANCHES)
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from(RULES),
            st.integers(0, 3),
            st.integers(0, 8),
            st.integers(0, 10**6) | st.none(),
        ),
        min_size=1,
        max_size=7,
    ),
    left_out=st.sets(st.integers(0, 6)),
    n_vocab=st.sampled_from([200, 512, 1300]),
    dtype=st.sampled_from([mx.float32, mx.bfloat16]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_each_row_of_a_batch_gets_the_token_that_it_gets_alone(
    branches: Branches,
    asked: list[tuple[dict[str, Any], int, int, int | None]],
    left_out: set[int],
    n_vocab: int,
    dtype: mx.Dtype,
):
    """Parameters, seeds, tokens before and masks mixed; some rows are not asked for."""
    logits = mx.array(logits_of(len(asked), n_vocab, rows=len(asked))).astype(dtype)

    fed = mx.array([*range(50, 50 + len(asked))])
    barred = (7, 11)

    def choices() -> dict[int, RowChoice]:
        found = {}
        for i, (rule, seed, n_recent, masked) in enumerate(asked):
            if i in left_out:
                continue
            sampler = Sampler(SamplingParams(seed=seed, **rule), n_vocab)
            known = [token * (i + 1) % n_vocab for token in range(n_recent)]
            answer = AnswerIds(n_vocab, known[:2]).first(known[2:], max(n_recent - 2, 0))
            recent = Recent(known, fed if n_recent % 2 else None, i, answer)
            mask = None
            if masked is not None:
                mask = np.random.default_rng(masked).random(n_vocab) < 0.1
                mask[i] = True
            is_on = sampler.needs_recent or sampler.needs_answer
            found[i] = RowChoice(sampler, recent if is_on else None, mask, barred[: seed % 3])
        return found

    with branches():
        together, alone = choices(), choices()
        for _ in range(3):
            got: dict[int, int] = {}
            for rows, tokens in choose(logits, together):
                got |= dict(zip(rows, np.array(tokens).tolist(), strict=True))
            assert got.keys() == alone.keys()
            for i, (sampler, recent, mask, never, _) in alone.items():
                row = logits[i : i + 1]
                assert got[i] not in never
                if never:
                    row = mx.where(mx.array([t in never for t in range(n_vocab)]), -mx.inf, row)
                if mask is not None:
                    row = mx.where(mx.array(mask), row, mx.array(-mx.inf, dtype))
                    assert mask[got[i]]
                before = [] if recent is None else [*recent.known]
                if recent is not None and recent.fed is not None:
                    before.append(50 + i)
                before = mx.array(before, mx.uint32)
                assert got[i] == sampler(row, before, before).item()
                assert together[i].sampler.n_chosen == sampler.n_chosen


def n_primitives(*arrays: mx.array) -> int:
    """Operations of a graph, views included."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue().count("shape=rectangle")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_of_one_rule_are_chosen_in_one_call(rule: dict[str, Any]):
    logits, fed = mx.array(logits_of(15, 1300, rows=16)), mx.arange(16)
    mx.eval(fed)

    def graph(n: int, mixed: bool = False) -> int:
        rows = {}
        for i in range(n):
            params = SamplingParams(seed=i, **rule)
            if mixed:
                params = dataclasses.replace(params, logit_bias={i: 1.0})
            sampler = Sampler(params, 1300)
            recent = None
            if sampler.needs_recent or sampler.needs_answer:
                # Answers of other lengths: they do not part the rows.
                answer = AnswerIds(1300, range(i * 30))
                recent = Recent(range(9), fed, i, answer.first((), 0))
            rows[i] = RowChoice(sampler, recent, np.arange(1300) % 3 != 0)
        return n_primitives(*[tokens for _, tokens in choose(logits[:n], rows)])

    assert graph(16) <= graph(1)
    assert graph(16, mixed=True) > 10 * graph(1, mixed=True)


# Parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more; got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 or more; got nan"),
        ({"temperature": math.inf}, "temperature must be 0 or more; got inf"),
        ({"temperature": "1"}, "temperature must be 0 or more; got '1'"),
        ({"temperature": True}, "temperature must be 0 or more; got True"),
        ({"top_k": -1}, "top_k must be a whole number, 0 (all) or more; got -1"),
        ({"top_k": 1.5}, "top_k must be a whole number, 0 (all) or more; got 1.5"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
        ({"top_p": -1}, "top_p must be above 0 and at most 1; got -1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1; got 0"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1; got nan"),
        ({"min_p": 1.01}, "min_p must be between 0 and 1; got 1.01"),
        ({"min_p": -0.01}, "min_p must be between 0 and 1; got -0.01"),
        ({"repeat_penalty": 0}, "repeat_penalty must be above 0; got 0"),
        ({"repeat_penalty": math.inf}, "repeat_penalty must be above 0; got inf"),
        ({"presence_penalty": 2.01}, "presence_penalty must be between -2 and 2; got 2.01"),
        ({"frequency_penalty": -3}, "frequency_penalty must be between -2 and 2; got -3"),
        ({"repeat_last_n": -1}, "repeat_last_n must be a whole number, 0 (off) or more; got -1"),
        ({"seed": -1}, "seed must be a whole number, from 0 to 2^64 - 1; got -1"),
        ({"seed": 2**64}, f"seed must be a whole number, from 0 to 2^64 - 1; got {2**64}"),
        ({"seed": 1.0}, "seed must be a whole number, from 0 to 2^64 - 1; got 1.0"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers; got [1]"),
        ({"logit_bias": {-1: 1.0}}, "a token id that is no whole number, 0 or more: -1"),
        ({"logit_bias": {"1": 1.0}}, "a token id that is no whole number, 0 or more: '1'"),
        ({"logit_bias": {1: math.inf}}, "must be a finite number for token 1; got inf"),
        ({"logit_bias": {1: None}}, "must be a finite number for token 1; got None"),
    ],
    ids=str,
)
def test_a_value_out_of_range_says_what_is_allowed(values: dict[str, Any], said: str):
    with pytest.raises(UsageError) as caught:
        SamplingParams(**values)
    assert str(caught.value).endswith(said)
    assert "\n" not in str(caught.value)


def test_values_at_the_limits_are_taken():
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, repeat_last_n=0, seed=0)
    SamplingParams(top_p=1e-9, min_p=1, repeat_penalty=1e-3, seed=2**64 - 1, logit_bias={})
    numpy: dict[str, Any] = {"top_k": np.int64(3), "top_p": np.float32(0.5)}
    SamplingParams(**numpy)


def test_what_is_unset_comes_from_the_model_and_then_from_the_defaults():
    asked = SamplingParams(temperature=0.0, top_k=5)
    model = SamplingParams(temperature=0.7, top_p=0.9)
    merged = asked.merged(model)
    assert (merged.temperature, merged.top_k, merged.top_p, merged.min_p) == (0.0, 5, 0.9, None)
    assert merged.resolved() == SamplingParams(0.0, 5, 0.9, 0.0, 1.0, 64, None, None, 0.0, 0.0)
    assert SamplingParams().resolved() == DEFAULTS


def test_a_models_generation_config_is_read():
    raw = {"temperature": 0.6, "top_k": 64, "top_p": 0.95, "repetition_penalty": 1.1, "eos": 1}
    assert SamplingParams.from_generation_config(raw, "x") == SamplingParams(
        temperature=0.6, top_k=64, top_p=0.95, repeat_penalty=1.1
    )
    greedy = SamplingParams.from_generation_config({"do_sample": False, "temperature": 0.6}, "x")
    assert greedy.temperature == 0
    assert SamplingParams.from_generation_config({"top_k": None}, "x") == SamplingParams()
    with pytest.raises(ConfigError, match=r"dir/generation_config.json: top_p must be above 0"):
        SamplingParams.from_generation_config({"top_p": 3}, "dir/generation_config.json")


def test_the_callers_bias_cannot_change_afterwards():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 5.0
    assert params.logit_bias == {1: 2.0}
