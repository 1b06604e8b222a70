"""The cache of a layer that keeps a state: the rules of all caches, where they apply to it."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxkv.cache import RecurrentCache, make_caches
from mlxkv.errors import UsageError
from mlxkv.kv.types import KV_TYPES, CacheSpec, KVFormat, RecurrentSpec
from mlxkv.nn.state_batch import BatchStates

SPEC = RecurrentSpec(n_channels=5, n_tail=3, n_heads=2, key_dim=4, value_dim=6)


def arrays(seed: int, B: int = 1) -> tuple[mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(seed))
    tail = mx.random.normal((B, 3, 5), key=keys[0])
    return tail, mx.random.normal((B, 2, 4, 6), key=keys[1])


def same(found, wanted) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(a.shape == b.shape and mx.array_equal(a, b).item() for a, b in pairs)


class Specs:
    def cache_specs(self) -> list[CacheSpec | None]:
        return [SPEC, CacheSpec(2, 8, 8), None]


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_spec_makes_its_own_cache_in_every_format(kv_type):
    state, kv = make_caches(Specs(), kv_type)
    assert type(state) is RecurrentCache
    assert not hasattr(kv, "arrays") or kv.spec == CacheSpec(2, 8, 8)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_its_bytes_are_those_of_the_spec_for_any_number_of_tokens(kv_type):
    cache, kv = RecurrentCache(SPEC), KVFormat(kv_type, 4)
    assert cache.nbytes == 0 and cache.state == []
    for n in (1, 300, 4000):
        cache.store(arrays(n), n)
        assert cache.nbytes == SPEC.nbytes(n, kv) == 4 * (3 * 5 + 2 * 4 * 6)
        assert SPEC.token_bytes(kv) == 0


def test_a_stored_view_does_not_keep_what_it_is_a_part_of():
    tail, state = mx.zeros((1, 20_000, 5))[:, -3:], arrays(0)[1]
    cache = RecurrentCache(SPEC)
    mx.eval(tail, state)
    before = mx.get_active_memory()
    cache.store((tail, state), 1)
    mx.eval(cache.state)
    del tail
    assert mx.get_active_memory() < before


def test_what_was_read_is_loaded_bit_for_bit_and_stays_as_it_was():
    cache, other = RecurrentCache(SPEC), RecurrentCache(SPEC)
    cache.store(arrays(0), 7)
    taken = cache.read(6, 7)
    assert [x.shape for x in taken.arrays] == [(1, 3, 1, 5), (1, 2, 1, 24)]
    cache.store(arrays(1), 2)
    other.load([taken])
    assert (other.offset, len(other), other.first) == (7, 7, 6)
    assert same(other.arrays, arrays(0))
    cache.load([taken])  # back, as behind a draft
    assert cache.offset == 7 and same(cache.arrays, arrays(0))


def test_it_rewinds_to_its_tip_and_to_the_start_alone():
    cache = RecurrentCache(SPEC)
    assert cache.rewind(0)
    cache.store(arrays(0), 7)
    assert cache.rewind(7) and not cache.rewind(6)
    assert cache.offset == 7 and same(cache.arrays, arrays(0))
    assert cache.rewind(0) and cache.offset == 0 and cache.state == []
    with pytest.raises(UsageError, match="allowed is 0 to 0"):
        cache.rewind(1)


def test_it_rewinds_within_the_last_draft_until_more_is_stored():
    cache, between = RecurrentCache(SPEC), [arrays(n) for n in range(4)]
    cache.store(between[0], 7)
    assert not cache.is_drafted
    cache.begin_draft()
    assert cache.is_drafted
    n_bytes = cache.nbytes
    cache.store(between[3], 3, lambda n: between[n])
    assert cache.nbytes == 2 * n_bytes  # of the state before as well
    assert cache.rewind(10) and same(cache.arrays, between[3])
    assert cache.rewind(9) and cache.offset == 9 and same(cache.arrays, between[2])
    assert cache.rewind(7) and same(cache.arrays, between[0])  # an answer that ends before it
    assert not cache.rewind(6)
    cache.store(between[1], 1)
    assert not cache.is_drafted and not cache.rewind(7) and cache.nbytes == n_bytes


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (5, 6), (7, 8), (7, 7)])
def test_it_is_read_at_its_last_token_alone(start, stop):
    cache = RecurrentCache(SPEC)
    cache.store(arrays(0), 7)
    with pytest.raises(UsageError, match="read at its last token"):
        cache.read(start, stop)


def test_a_state_of_another_shape_is_not_loaded():
    other = RecurrentCache(RecurrentSpec(n_channels=5, n_tail=3, n_heads=2, key_dim=6, value_dim=6))
    other.store((arrays(0)[0], mx.zeros((1, 2, 6, 6))), 3)
    cache = RecurrentCache(SPEC)
    cache.store(arrays(1), 7)
    with pytest.raises(UsageError, match="this layer's are"):
        cache.load([other.read(2, 3)])
    assert cache.offset == 7 and same(cache.arrays, arrays(1))


def test_it_takes_no_keys_and_values():
    with pytest.raises(UsageError, match="no keys and values"):
        RecurrentCache(SPEC).update(mx.zeros((1, 1, 1, 4)), mx.zeros((1, 1, 1, 4)))


def test_states_of_a_batch_lie_in_the_same_arrays_until_one_leaves():
    caches = [RecurrentCache(SPEC) for _ in range(3)]
    for i, cache in enumerate(caches):
        cache.store(arrays(i), 10 * i + 1)
    layer = BatchStates(caches)
    tails, states = layer.arrays
    assert same([tails[1:2], states[1:2]], arrays(1))
    new = arrays(9, B=3)
    layer.store(new, 1)
    assert all(a is b for a, b in zip(layer.arrays, layer.arrays, strict=True))
    assert [cache.offset for cache in caches] == [2, 12, 22]
    assert [cache.nbytes for cache in caches] == [SPEC.nbytes(1, KVFormat("native", 4))] * 3
    # One is looked at, which takes its row out, and goes on alone.
    assert same(caches[0].arrays, [x[:1] for x in new])
    caches[0].store(arrays(5), 4)
    assert same([x[:1] for x in layer.arrays], arrays(5))
    assert same([x[1:] for x in layer.arrays], [x[1:] for x in new])
    # The first leaves; the others go on.
    rest = BatchStates(caches[1:])
    rest.store([x + 1 for x in rest.arrays], 1)
    assert [cache.offset for cache in caches] == [6, 13, 23]
    assert same(caches[0].arrays, arrays(5))
    assert same(caches[2].arrays, [x[2:] + 1 for x in new])


def test_a_batch_needs_sequences_that_have_begun():
    caches = [RecurrentCache(SPEC), RecurrentCache(SPEC)]
    caches[0].store(arrays(0), 1)
    with pytest.raises(UsageError, match="without tokens"):
        _ = BatchStates(caches).arrays
