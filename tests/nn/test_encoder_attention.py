"""Attention with runs of tokens that see each other, and of encoders: against plain sums."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cache import make_cache
from mlxkv.kv.layout import TwoWayMask, two_way_mask
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.attention import SPLIT_QUERIES, attend
from mlxkv.nn.encoder_attention import QUERY_BLOCK, attend_all

D = 32


def heads(n_heads: int, length: int, seed: int) -> mx.array:
    rng = np.random.RandomState(seed)
    return mx.array(rng.standard_normal((1, n_heads, length, D)).astype(np.float32))


def plain(q: mx.array, k: mx.array, v: mx.array, scale: float, seen: np.ndarray) -> np.ndarray:
    """The definition, in float64."""
    queries, keys, values = (np.array(x, np.float64) for x in (q, k, v))
    n_shared = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(x, n_shared, axis=1) for x in (keys, values))
    scores = np.where(seen, scale * queries @ keys.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def seen_by(L: int, n_before: int, window: int | None, runs: list[tuple[int, int]]) -> np.ndarray:
    q, k = np.arange(n_before, n_before + L)[:, None], np.arange(n_before + L)[None]
    seen = k <= q
    for start, stop in runs:
        first, end = n_before + start, n_before + stop
        seen |= (q >= first) & (q < end) & (k >= first) & (k < end)
    return seen & (k > q - (window or n_before + L))


RUNS = ([], [(0, 1)], [(0, 100)], [(3, 49), (49, 51), (60, 100)], [(40, 70)], [(10, 50), (51, 99)])


@pytest.mark.parametrize("window", [None, 20, 130])
@pytest.mark.parametrize("runs", RUNS)
def test_a_two_way_mask_shows_a_run_to_its_end(runs, window):
    mask = two_way_mask(100, 30, window, runs)
    np.testing.assert_array_equal(np.array(mask.array), seen_by(100, 30, window, runs))
    # What the queries up to anywhere see ends where it says.
    for stop in range(1, 101):
        last = np.flatnonzero(np.array(mask.array)[:stop].any(axis=0))[-1]
        assert mask.n_seen(stop) == last - 30 + 1


@pytest.mark.parametrize("runs", RUNS[2:])
@pytest.mark.parametrize("kv_type", ["native", "q8"])
def test_a_chunk_divided_over_the_cores_sees_all_of_a_run(runs, kv_type):
    L, n_before = 100, 30
    assert L > SPLIT_QUERIES
    q, k, v = heads(4, L, 0), heads(2, n_before + L, 1), heads(2, n_before + L, 2)
    cache = make_cache(CacheSpec(2, D, D), kv_type)
    cache.update(k[:, :, :n_before], v[:, :, :n_before])
    rows = cache.update(k[:, :, n_before:], v[:, :, n_before:])
    mask = two_way_mask(L, n_before, None, runs)
    got = np.array(attend(q, *rows, D**-0.5, mask))
    expected = plain(q, k, v, D**-0.5, seen_by(L, n_before, None, runs))
    np.testing.assert_allclose(got, expected, atol=1e-5 if kv_type == "native" else 0.02)


def test_a_two_way_mask_of_a_short_chunk_is_followed():
    q, k, v = heads(4, 9, 0), heads(2, 12, 1), heads(2, 12, 2)
    mask = two_way_mask(9, 3, 5, [(2, 8)])
    assert isinstance(mask, TwoWayMask)
    expected = plain(q, k, v, 1.0, seen_by(9, 3, 5, [(2, 8)]))
    np.testing.assert_allclose(np.array(attend(q, k, v, 1.0, mask)), expected, atol=1e-5)


@pytest.mark.parametrize("L", [1, QUERY_BLOCK, QUERY_BLOCK + 1, 5 * QUERY_BLOCK + 3])
def test_every_query_of_an_encoder_sees_every_key(L):
    q, k, v = heads(4, L, 0), heads(2, L, 1), heads(2, L, 2)
    expected = plain(q, k, v, 0.3, np.ones((L, L), bool))
    np.testing.assert_allclose(np.array(attend_all(q, k, v, 0.3)), expected, atol=1e-5)


def test_an_encoder_sums_more_values_than_16_bits_hold():
    L = 4096
    v = mx.full((1, 1, L, D), 20, mx.float16)  # 20 * L is more than float16's 65,504
    q = k = mx.zeros((1, 1, L, D), mx.float16)
    np.testing.assert_allclose(np.array(attend_all(q[:, :, :1], k, v, 1.0)), 20, rtol=1e-3)
