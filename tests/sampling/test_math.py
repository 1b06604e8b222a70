"""Rows of logits: broken ones, sums over large vocabularies, and draws at a given place."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.base import device
from mlxkv.sampling.math import draw, log_normalizer, log_probabilities, rows_of, soundness
from tests.support.branches import gpu_branches

pytestmark = pytest.mark.usefixtures("branches")
DTYPES = (mx.float32, mx.bfloat16, mx.float16)
LARGE = 262_144


def broken_rows(n_vocab: int) -> np.ndarray:
    """Two sound rows, then one of each kind of broken ones."""
    rows = np.random.RandomState(0).standard_normal((10, n_vocab)).astype(np.float32) * 3
    rows[1, : n_vocab // 2] = -np.inf
    rows[2, 0], rows[3, -1], rows[4, 7], rows[5, :] = np.nan, np.nan, np.inf, -np.inf
    rows[6, :], rows[7, :] = np.nan, np.inf
    rows[8, 3], rows[8, 5] = np.inf, -np.inf
    rows[9, 3], rows[9, 5] = np.inf, np.nan
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_vocab", [40, 512, 1300])
def test_broken_logits_are_told_from_sound_ones(n_vocab: int, dtype: mx.Dtype):
    logits = mx.array(broken_rows(n_vocab)).astype(dtype)
    for found in (soundness(logits), log_normalizer(logits)[:, 0]):
        assert mx.isfinite(found).tolist() == [True] * 2 + [False] * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_of_a_type_are_sound(dtype: mx.Dtype):
    for value in (mx.finfo(dtype).max, mx.finfo(dtype).min):
        assert math.isfinite(soundness(mx.full((1, 5000), value, dtype)).item())


def test_soundness_is_lazy():
    # While mx.compile traces a function, whatever evaluates raises.
    mx.enable_compile()  # the result is not evaluated: nothing is compiled
    try:
        mx.compile(soundness)(mx.zeros((2, 5)))
    finally:
        if not device.can_compile():
            mx.disable_compile()


@pytest.mark.parametrize("n_vocab", [LARGE, 128_256, 100_003])
def test_log_probabilities_over_a_large_vocabulary_are_exact(n_vocab: int):
    logits = np.random.RandomState(0).standard_normal((2, n_vocab)).astype(np.float32)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    given = mx.array(logits)
    ids = mx.broadcast_to(mx.arange(n_vocab), logits.shape)
    got = np.array(log_probabilities(given, ids, log_normalizer(given)))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_sixteen_bit_logits_have_log_probabilities_in_float32():
    logits = mx.array(np.random.RandomState(1).standard_normal((2, 5000))).astype(mx.bfloat16)
    wide = np.array(logits.astype(mx.float32)).astype(np.float64)
    ids = mx.array([[0, 4999], [7, 7]])
    expected = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    got = log_probabilities(logits, ids, log_normalizer(logits))
    assert got.dtype == mx.float32
    np.testing.assert_allclose(got, np.take_along_axis(expected, np.array(ids), 1), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_draws_over_a_large_vocabulary_fall_where_exact_sums_say(scale: float):
    """The bound on running sums: a draw is off by less than 3e-6 of all probability."""
    values = np.random.RandomState(2).standard_normal(LARGE) * scale
    weights = np.exp(values - values.max()).astype(np.float32)
    u = np.random.RandomState(3).randint(0, 2**24, (64, 2)) * 2.0**-24
    u[0], u[1] = 0, 1 - 2.0**-24
    got = draw(
        mx.broadcast_to(mx.array(weights), (64, LARGE)),
        mx.array(u.astype(np.float32)),
        mx.array(LARGE - 1, mx.uint32),
    )
    rows, inside = np.divmod(np.array(got), 512)
    exact = weights.astype(np.float64).reshape(-1, 512)
    sums = exact.sum(axis=1)
    until = np.cumsum(sums) / sums.sum()
    within = np.cumsum(exact, axis=1) / sums[:, None]
    for row, i, (u_row, u_in) in zip(rows, inside, u, strict=True):
        assert until[row] - sums[row] / sums.sum() - 3e-6 <= u_row <= until[row] + 3e-6
        assert within[row, i] - exact[row, i] / sums[row] - 3e-6 <= u_in <= within[row, i] + 3e-6


def test_a_draw_never_lands_on_what_weighs_nothing():
    weights = np.zeros((3, 1024), np.float32)
    weights[0, 600], weights[1, 0], weights[2, [511, 512]] = 1e-30, 1, 1e-3
    last = mx.array(1023, mx.uint32)
    for u in (0.0, 0.5, 1 - 2.0**-24):
        got = draw(mx.array(weights), mx.full((3, 2), u), last)
        assert np.array(got).tolist() == [600, 0, 511 if u < 0.5 else 512]


def test_a_gpu_draws_the_same_tokens():
    rng = np.random.RandomState(4)
    weights = mx.array(np.exp(rng.standard_normal((200, 5120)).astype(np.float32)))
    u, last = mx.array(rng.randint(0, 2**24, (200, 2)) * 2.0**-24), mx.array(5119, mx.uint32)
    own = draw(weights, u, last)
    with gpu_branches():
        assert mx.array_equal(draw(weights, u, last), own)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 2], [3], [2, 0], [0, 2, 3]], ids=str)
def test_rows_are_taken_in_their_order(rows: list[int]):
    x = np.arange(12).reshape(4, 3)
    assert np.array_equal(rows_of(mx.array(x), rows), x[rows])
