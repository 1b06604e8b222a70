"""A part of a page: everything its layers keep, bit for bit, in one array."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cache import make_cache
from mlxkv.kv.layout import Cache, Slice
from mlxkv.kv.types import KV_TYPES, CacheSpec
from mlxkv.prefix.on_disk.part import Part

N = 300

MODELS = {
    "equal-layers": [CacheSpec(2, 64, 64)] * 3,
    "one-layer": [CacheSpec(2, 64, 64)],
    "one-head": [CacheSpec(1, 64, 64)] * 2,
    "wider-keys": [CacheSpec(2, 96, 64)] * 2,
    "no-values": [CacheSpec(1, 96, 0)] * 2,
    "no-values-in-one-layer": [CacheSpec(1, 96, 0)],
    "two-shapes": [CacheSpec(2, 32, 32), CacheSpec(1, 64, 64), CacheSpec(2, 32, 32)],
    "padded": [CacheSpec(2, 40, 20)] * 2,
}
FLOATS = (mx.float32, mx.bfloat16, mx.float16)
every_model = pytest.mark.parametrize("specs", MODELS.values(), ids=MODELS)
every_type = pytest.mark.parametrize("kv_type", KV_TYPES)
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=("float32", "bfloat16", "float16"))


def filled(specs: Sequence[CacheSpec], kv_type: str, dtype: mx.Dtype) -> list[Cache]:
    """Caches that hold `N` tokens of random KV."""
    caches = [make_cache(spec, kv_type) for spec in specs]
    for seed, (spec, cache) in enumerate(zip(specs, caches, strict=True)):
        dims = spec.k_dim, spec.v_dim
        shapes = [(1, spec.n_kv_heads, N, dim) for dim in dims]
        cache.update(*(mx.random.normal(s, key=mx.random.key(seed)).astype(dtype) for s in shapes))
    return caches


def read(caches: Sequence[Cache], start: int, stop: int) -> list[Slice]:
    return [cache.read(start, stop) for cache in caches]


def assert_same(got: Sequence[Slice], expected: Sequence[Slice]) -> None:
    assert [(x.start, x.stop) for x in got] == [(x.start, x.stop) for x in expected]
    for a, b in zip(got, expected, strict=True):
        assert [(x.shape, x.dtype) for x in a.arrays] == [(x.shape, x.dtype) for x in b.arrays]
        for x, y in zip(a.arrays, b.arrays, strict=True):
            assert bits(x) == bits(y)


def bits(x: mx.array) -> bytes:
    return np.array(mx.contiguous(x).view(mx.uint8)).tobytes()


@every_float
@every_type
@every_model
def test_what_is_packed_comes_back_bit_for_bit(specs, kv_type, dtype):
    caches = filled(specs, kv_type, dtype)
    part = Part.of(read(caches, 7, 263))
    assert_same(part.slices(), read(caches, 7, 263))
    assert part.nbytes == sum(x.nbytes for piece in read(caches, 7, 263) for x in piece.arrays)
    assert part.words.ndim == 1


@every_type
@every_model
def test_pieces_that_follow_each_other_join_to_the_whole(specs, kv_type):
    caches = filled(specs, kv_type, mx.bfloat16)
    pieces = [Part.of(read(caches, *at)) for at in ((4, 5), (5, 120), (120, 260))]
    whole, joined = Part.of(read(caches, 4, 260)), Part.join(pieces)
    assert (joined.start, joined.stop, joined.layout) == (4, 260, whole.layout)
    assert bits(joined.words) == bits(whole.words)


@every_type
@every_model
def test_what_lies_before_a_position_is_as_if_it_were_all(specs, kv_type):
    caches = filled(specs, kv_type, mx.bfloat16)
    part = Part.of(read(caches, 4, 260))
    for stop in (5, 100, 259):
        assert_same(part.slices(stop), read(caches, 4, stop))
        assert bits(part.before(stop).words) == bits(Part.of(read(caches, 4, stop)).words)
    assert part.before(260) is part
    assert_same(part.slices(1000), read(caches, 4, 260))


@every_type
@every_model
def test_a_part_keeps_no_larger_buffer_alive(specs, kv_type):
    """Up to 16 KiB an array, below which MLX's `contiguous` makes no copy."""
    wide = [CacheSpec(s.n_kv_heads, 32 * s.k_dim, 32 * s.v_dim) for s in specs]
    before = mx.get_active_memory()
    caches = filled(wide, kv_type, mx.float32)
    part = Part.of(read(caches, 0, 64))
    mx.eval(part.words)
    del caches
    assert mx.get_active_memory() - before <= part.nbytes + 2**14
    tip = part.before(16)
    mx.eval(tip.words)
    del part
    assert mx.get_active_memory() - before <= tip.nbytes + 2**14


def test_a_scale_of_two_bytes_behind_codes_of_four_is_found():
    """Codes are views of four bytes in an array of two: each must begin at a multiple of four."""
    specs = [CacheSpec(1, 64, 32), CacheSpec(1, 32, 64)]
    caches = filled(specs, "q8", mx.bfloat16)
    for stop in (1, 2, 3):
        part = Part.of(read(caches, 0, stop))
        assert part.layout.word == mx.uint16
        assert_same(part.slices(), read(caches, 0, stop))
