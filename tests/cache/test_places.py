"""A token that a kernel writes (`next_place`, `stepped`) leaves a cache as an update does."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cache import KVCache, RotatingKVCache
from mlxkv.kv.sliding import ROOM
from mlxkv.kv.storage import dense
from mlxkv.kv.types import STEP, CacheSpec

H, D = 2, 16


def tokens(n: int, seed: int, dim: int = D) -> tuple[mx.array, mx.array]:
    keys, shape = mx.random.split(mx.random.key(seed), 2), (1, H, n, dim)
    return mx.random.normal(shape, key=keys[0]), mx.random.normal(shape, key=keys[1])


def write(buffer: mx.array, column: int, x: mx.array) -> mx.array:
    at = mx.broadcast_to(mx.array(column), x.shape)
    return mx.put_along_axis(buffer, at, x, axis=2)


@pytest.mark.parametrize("make", [KVCache, lambda: RotatingKVCache(5), lambda: RotatingKVCache(9)])
@pytest.mark.parametrize("n_prompt", [1, 4, 7])
def test_a_step_in_place_is_an_update(make, n_prompt):
    updated, stepped, n_stepped = make(), make(), 0
    for cache in (updated, stepped):
        assert cache.next_place() is None, "an empty cache has no buffers yet"
        cache.update(*tokens(n_prompt, 0))
    for i in range(14):
        k, v = tokens(1, i + 1)
        all_k, _ = updated.update(k, v)
        if (place := stepped.next_place()) is None:
            stepped.update(k, v)
        else:
            n_stepped += 1
            (column,), (length,) = place.columns, place.lengths
            assert place.positions == (stepped.offset,) and length == all_k.shape[2]
            stepped.stepped(write(place.keys, column, k), write(place.values, column, v))
        assert (stepped.offset, len(stepped)) == (updated.offset, len(updated))
        for one, other in zip(
            stepped.read(stepped.first, stepped.offset).arrays,
            updated.read(updated.first, updated.offset).arrays,
            strict=True,
        ):
            assert np.array_equal(np.array(one), np.array(other))
    assert n_stepped >= 12, "but for growth and what a chunk left over"


@pytest.mark.parametrize("kv_type", ["native", "q8"])
@pytest.mark.parametrize("size", [1, 5, 9])
def test_a_draft_behind_a_full_window_is_taken_back(size, kv_type):
    chance = random.Random(size)
    spec = CacheSpec(H, 64, 64, size)
    usual, roomy = (RotatingKVCache(size, spec, kv_type) for _ in range(2))
    for i in range(60):
        n, n_new = chance.choice((1, 1, 2, 5)), chance.choice((1, 1, 1, 2, 4))
        if n > 1:
            roomy.make_room(n)
        if size < usual.offset < 30 and kv_type == "native":
            assert (roomy.next_place(n) is None) is (n > 1 and not roomy._has_behind(n))
        found = [cache.update(*tokens(n, i, 64)) for cache in (usual, roomy)]
        ours, theirs = ([dense(rows) for rows in kv] for kv in found)
        for one, other in zip(ours, theirs, strict=True):  # a token sees them in any order
            axis = 2 if n == 1 else 0
            assert np.array_equal(np.sort(np.array(one), axis), np.sort(np.array(other), axis))
        for cache in (usual, roomy):
            assert cache.rewind(cache.offset - max(0, n - n_new))
        for one, other in zip(usual.state, roomy.state, strict=True):
            assert one.shape == other.shape
        first = max(usual.first, roomy.first)
        parts = [cache.read(first, cache.offset).arrays for cache in (usual, roomy)]
        for one, other in zip(*parts, strict=True):
            assert np.array_equal(np.array(one), np.array(other))
        assert str(usual.mask(3)) == str(roomy.mask(3))
    assert roomy.capacity in (size, size + ROOM), "it is a ring again in time"


def test_full_quantized_and_shared_buffers_have_no_place():
    full = KVCache()
    full.update(*tokens(STEP, 0))
    assert full.next_place() is None
    quantized = KVCache(kv_type="q8")
    k, v = mx.zeros((1, H, 3, 64)), mx.zeros((1, H, 3, 64))
    quantized.update(k, v)
    assert quantized.next_place() is None
    two = KVCache()
    two.update(mx.zeros((2, H, 3, D)), mx.zeros((2, H, 3, D)))
    assert two.next_place() is None
