"""Shared buffers: whatever joins, leaves, grows or wraps, each sequence gets what it gets alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cache import KVCache, RotatingKVCache
from mlxkv.kv.layout import Cache, Positions
from mlxkv.nn.batch import batch, kv_order
from mlxkv.nn.blocks import Block, Row, growth_bytes, sliceable
from mlxkv.nn.model import CausalLM
from mlxkv.nn.slots import go_together, place
from tests.nn.test_batch import alone, assert_same, every_model, load, prefilled

H, D, WINDOW = 2, 16, 24


@pytest.fixture
def model(case, families) -> CausalLM:
    return load(families, case)


def rows(n: int, seed: int) -> tuple[mx.array, mx.array]:
    k, v = mx.random.normal((2, 1, H, n, D), key=mx.random.key(seed))
    return k, v


def filled(n: int, seed: int = 0, window: int | None = None, kv_type: str = "native") -> Cache:
    cache = KVCache(None, kv_type) if window is None else RotatingKVCache(window, None, kv_type)
    for start in range(0, n, 16):
        cache.update(*rows(min(16, n - start), 1000 * seed + start))
    return cache


def everything(n_bytes: int) -> bool:
    return True


def nothing(n_bytes: int) -> bool:
    return False


def held(cache: Cache) -> list[np.ndarray]:
    """What a cache holds, oldest first; of a window what its next token sees of it."""
    window = getattr(cache, "max_size", None)
    first = cache.first if window is None else max(cache.first, cache.offset - (window - 1))
    return [np.array(x) for x in cache.read(first, cache.offset).arrays]


def assert_holds_the_same(a: Cache, b: Cache) -> None:
    assert a.offset == b.offset
    for x, y in zip(held(a), held(b), strict=True):
        np.testing.assert_array_equal(x, y)


def block_of(cache: Cache) -> Block | None:
    return cache.row.block if isinstance(cache.row, Row) else None


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("n", [1, 23, 24, 25, 255, 256, 257])
def test_a_cache_holds_the_same_in_a_shared_row(n, window):
    caches = [filled(n, 1, window), filled(n + 1, 2, window)]
    twins = [filled(n, 1, window), filled(n + 1, 2, window)]
    (both,) = batch([[cache] for cache in caches])
    for cache, twin in zip(caches, twins, strict=True):
        assert isinstance(cache.row, Row)
        assert_holds_the_same(cache, twin)
    for step in range(30):
        new = [rows(1, 7000 + 10 * step + i) for i in range(2)]
        both.update(*(mx.concatenate(list(x)) for x in zip(*new, strict=True)))
        for cache, twin, (k, v) in zip(caches, twins, new, strict=True):
            twin.update(k, v)
            assert_holds_the_same(cache, twin)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_cache_that_is_written_alone_leaves_and_the_others_stay_as_they_are(window):
    caches = [filled(40, i, window) for i in range(3)]
    twins = [filled(40, i, window) for i in range(3)]
    (layer,) = batch([[cache] for cache in caches])
    new = [rows(1, 50 + i) for i in range(3)]
    layer.update(*(mx.concatenate(list(x)) for x in zip(*new, strict=True)))
    for twin, (k, v) in zip(twins, new, strict=True):
        twin.update(k, v)
    for L in (1, 5):
        more = rows(L, 90 + L)
        caches[1].update(*more)
        twins[1].update(*more)
    assert caches[1].row is None
    for cache, twin in zip(caches, twins, strict=True):
        assert_holds_the_same(cache, twin)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("n", [20, 24, 25, 60])
def test_a_rewind_in_a_shared_row_is_the_one_of_a_cache_alone(n, window):
    for back in (1, 2, 5):
        caches = [filled(n, i, window) for i in range(2)]
        twins = [filled(n, i, window) for i in range(2)]
        (layer,) = batch([[cache] for cache in caches])
        new = rows(1, 5)
        layer.update(*(mx.concatenate([x, x]) for x in new))
        for twin in twins:
            twin.update(*new)
        assert caches[0].rewind(n + 1 - back) == twins[0].rewind(n + 1 - back)
        if caches[0].offset == twins[0].offset:
            assert_holds_the_same(caches[0], twins[0])
        (layer,) = batch([[cache] for cache in caches])
        more = rows(1, 6)
        layer.update(*(mx.concatenate([x, x]) for x in more))
        for cache, twin in zip(caches, twins, strict=True):
            twin.update(*more)
            assert_holds_the_same(cache, twin)


@pytest.mark.parametrize("rewound", [0, 1])
def test_every_layer_follows_a_rewind_of_any_sequence_between_steps(rewound):
    layers = [[filled(40, i), filled(43, i)] for i in range(2)]
    twins = [[filled(40, i), filled(43, i)] for i in range(2)]
    both = batch([list(caches) for caches in zip(*layers, strict=True)])
    for step in range(2):
        k, v = (mx.concatenate(list(x)) for x in zip(rows(1, step), rows(1, 9), strict=True))
        for layer, own in zip(both, twins, strict=True):
            assert layer.offset == Positions(tuple(cache.offset for cache in own))
            layer.update(k, v)
            for i, twin in enumerate(own):
                twin.update(k[i : i + 1], v[i : i + 1])
        for caches, own in zip(layers, twins, strict=True):
            for cache, twin in zip(caches, own, strict=True):
                assert_holds_the_same(cache, twin)
            offset = own[rewound].offset - 1
            assert caches[rewound].rewind(offset) and own[rewound].rewind(offset)


def test_a_layer_that_an_interrupted_step_has_not_reached_is_written_behind_its_own_tokens():
    layers = [[filled(40, i), filled(43, i)] for i in range(2)]
    twins = [filled(40, 1), filled(43, 1)]
    both = batch([list(caches) for caches in zip(*layers, strict=True)])
    k, v = (mx.concatenate(list(x)) for x in zip(rows(1, 5), rows(1, 6), strict=True))
    both[0].update(k, v)
    for layer in both:
        layer.update(k, v)
    assert [cache.offset for cache in layers[0]] == [42, 45]
    for i, (cache, twin) in enumerate(zip(layers[1], twins, strict=True)):
        twin.update(k[i : i + 1], v[i : i + 1])
        assert_holds_the_same(cache, twin)


def test_a_window_that_was_loaded_one_token_short_goes_on_in_a_shared_row():
    long = filled(60, 3, WINDOW)
    part = filled(60, 3).read(60 - (WINDOW - 1), 60)
    loaded, twin = RotatingKVCache(WINDOW), RotatingKVCache(WINDOW)
    loaded.load([part])
    twin.load([part])
    (layer,) = batch([[loaded], [long]])
    for step in range(3):
        new = rows(1, step)
        k, _ = layer.update(*(mx.concatenate([x, x]) for x in new))
        assert k.masks[0] is None and k.parts[0].shape[2] == WINDOW
        twin.update(*new)
        assert_holds_the_same(loaded, twin)


@every_model
def test_sequences_join_and_leave_at_random(model):
    draw = random.Random(4)
    lengths = [draw.choice((3, 20, 27, 100, 104, 110, 254, 256)) for _ in range(8)]
    sequences = [prefilled(model, n) for n in lengths]
    expected = [alone(model, *prefilled(model, n), 12) for n in lengths]
    tokens = [token for _, token in sequences]
    n_done = [0] * len(lengths)
    for _ in range(9):
        members = draw.sample(range(len(lengths)), draw.randint(2, 6))
        layers = batch([sequences[i][0] for i in members])
        for _ in range(draw.randint(1, 2)):
            if max(n_done[i] for i in members) >= 12:
                break
            got = np.array(model.last_logits(mx.array([[tokens[i]] for i in members]), layers))
            for row, i in zip(got, members, strict=True):
                assert_same([row], [expected[i][n_done[i]]], f"{i} of {lengths[i]} tokens")
                tokens[i], n_done[i] = int(row.argmax()), n_done[i] + 1


@every_model
def test_buffers_grow_for_all_when_the_longest_needs_it(model):
    lengths = [253, 240, 250]
    expected = [alone(model, *prefilled(model, n), 6) for n in lengths]
    sequences = [prefilled(model, n) for n in lengths]
    layers = batch([caches for caches, _ in sequences])
    before = growth_bytes(sliceable(sequences[0][0]), 257)
    assert before > 0 or all(c.max_rows is not None for c in sliceable(sequences[0][0]))
    tokens = [token for _, token in sequences]
    for step in range(6):
        got = np.array(model.last_logits(mx.array(tokens)[:, None], layers))
        for i, row in enumerate(got):
            assert_same([row], [expected[i][step]], str(lengths[i]))
        tokens = [int(row.argmax()) for row in got]
    assert growth_bytes(sliceable(sequences[0][0]), 260) == 0


def test_similar_lengths_share_and_others_do_not():
    lengths = [64] * 7 + [2048]
    sequences = [[filled(n, i)] for i, n in enumerate(lengths)]
    parts = place([sliceable(caches) for caches in sequences], everything)
    assert sorted(len(part.sequences) for part in parts) == [1, 7]
    assert [part.is_shared for part in parts] == [True, False]


@pytest.mark.parametrize("seed", range(5))
def test_a_step_reads_at_most_a_quarter_more_than_is_held(seed):
    draw = random.Random(seed)
    wide = 2**20  # a token takes so many bytes that nothing is let through for being small
    lengths = sorted(draw.randint(1, 3000) for _ in range(16))
    groups: list[list[int]] = []
    for n in lengths:
        for group in groups:
            if go_together([*group, n], wide):
                group.append(n)
                break
        else:
            groups.append([n])
    read = sum(len(group) * max(group) for group in groups)
    assert read <= 1.25 * sum(lengths)


def test_a_step_reads_no_column_that_no_sequence_has():
    sequences = [[filled(n, n)] for n in (60, 64, 62)]
    (layer,) = batch(sequences)
    k, _ = layer.update(*(mx.concatenate([x] * 3) for x in rows(1, 0)))
    assert [part.shape for part in k.parts] == [(3, H, 65, D)]
    seen = np.array(k.masks[0])[:, 0, 0].sum(axis=-1)
    assert sorted(seen) == [61, 63, 65]


def test_the_parts_of_all_sequences_are_the_bytes_of_the_buffers():
    sequences = [[filled(50 + i, i), filled(50 + i, i, WINDOW)] for i in range(5)]
    batch(sequences)
    block = block_of(sequences[0][0])
    assert block is not None
    total = sum(cache.nbytes for caches in sequences for cache in caches)
    assert 0 <= total - block.nbytes <= 10  # rounded up for each
    sequences.pop()
    total = sum(cache.nbytes for caches in sequences for cache in caches)
    assert 0 <= total - block.nbytes <= 10


def test_where_there_is_no_room_sequences_keep_their_own_buffers():
    asked: list[int] = []
    sequences = [[filled(100, i)] for i in range(3)]
    (layer,) = batch(sequences, lambda n_bytes: bool(asked.append(n_bytes)))
    assert asked and asked[0] >= 3 * 256 * 2 * H * D * 4
    assert all(caches[0].row is None for caches in sequences)
    k, _ = layer.update(*(mx.concatenate([x] * 3) for x in rows(1, 0)))
    assert len(k.parts) == 3


def test_what_an_earlier_sequence_left_in_a_slot_is_never_read():
    broken, other = filled(100, 1), filled(100, 2)
    nan = mx.full((1, H, 100, D), mx.nan)
    broken.reset()
    broken.update(nan, nan)
    batch([[broken], [other]])
    slot = broken.row.slot
    broken.reset()
    late = filled(80, 3)
    (layer,) = batch([[other], [late]])
    assert late.row.slot == slot
    k, _ = layer.update(*(mx.concatenate([x] * 2) for x in rows(1, 0)))
    assert not mx.isnan(k.parts[0]).any()


def test_the_arranged_order_needs_no_rearranging():
    sequences = [[filled(n, i)] for i, n in enumerate((900, 64, 880, 60, 910))]
    order = kv_order(sequences, everything)
    (layer,) = batch([sequences[i] for i in order])
    k, _ = layer.update(*(mx.concatenate([x] * 5) for x in rows(1, 0)))
    assert k.order is None
    (layer,) = batch(sequences[::-1])
    k, _ = layer.update(*(mx.concatenate([x] * 5) for x in rows(1, 0)))
    assert k.order is not None


def test_all_share_where_a_model_wants_one_array():
    sequences: Sequence[Sequence[Cache]] = [[filled(n, n)] for n in (5, 600)]
    (layer,) = batch(sequences, one_part=True)
    k, _ = layer.update(*(mx.concatenate([x] * 2) for x in rows(1, 0)))
    assert [part.shape[2] for part in k.parts] == [601]
