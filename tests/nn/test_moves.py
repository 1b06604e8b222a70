"""Sequences that join and leave copy nothing but themselves; what is copied when buffers grow."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.kv.layout import Cache, LayerCache
from mlxkv.kv.storage import Ragged
from mlxkv.kv.types import STEP
from mlxkv.nn.batch import SETTLED, batch, is_current, is_settled
from mlxkv.nn.blocks import AT_ONCE, Row, copying_bytes, growth_bytes, sliceable
from mlxkv.nn.shared_buffers import SharedBuffers
from mlxkv.nn.slots import KEPT, SLACK, SMALL_BYTES, SPARE, place
from tests.nn.test_slots import (
    WINDOW,
    D,
    H,
    assert_holds_the_same,
    block_of,
    everything,
    filled,
    nothing,
    rows,
)

windows = pytest.mark.parametrize("window", [None, WINDOW])
Sequences = list[list[Cache]]


def sequence(n: int, seed: int, window: int | None = None) -> list[Cache]:
    """Two layers, the second of them with a window if there is one."""
    return [filled(n, seed), filled(n, 100 + seed, window)]


def step(layers: Sequence[LayerCache], seed: int) -> list[Ragged]:
    """Write a token of each sequence, and have it computed; the keys that are seen."""
    n = len(layers[0].caches) if hasattr(layers[0], "caches") else 1
    k, v = (mx.concatenate([x * (i + 1) for i in range(n)]) for x in rows(1, seed))
    seen = [layer.update(k, v) for layer in layers]
    parts = [part for pair in seen for side in pair for part in getattr(side, "parts", (side,))]
    mx.eval(parts)
    return [keys for keys, _ in seen]


def step_alone(twins: Sequences, seed: int) -> None:
    """Write what `step` writes into each sequence's twin, by itself."""
    for own, twin in enumerate(twins):
        k, v = rows(1, seed)
        for cache in twin:
            cache.update(k * (own + 1), v * (own + 1))


def assert_all_hold_the_same(sequences: Sequences, twins: Sequences) -> None:
    for caches, twin in zip(sequences, twins, strict=True):
        for a, b in zip(caches, twin, strict=True):
            assert_holds_the_same(a, b)


def places(caches: Sequence[Cache]) -> list[object]:
    """Where each layer's KV lies in memory: addresses, and the row."""
    found: list[object] = []
    for cache in caches:
        row = cache.row
        arrays = cache.buffers if row is None else row.shared.arrays
        mx.eval(arrays)
        at = [np.asarray(memoryview(x)).__array_interface__["data"][0] for x in arrays]
        found.append((at, row.slot if isinstance(row, Row) else None))
    return found


@pytest.fixture
def put_bytes(monkeypatch) -> Counter[int]:
    """Bytes that are copied into slots, by the layers' buffers."""
    found: Counter[int] = Counter()
    put = SharedBuffers.put

    def counted(self: SharedBuffers, slot: int, own: Sequence[mx.array]) -> None:
        found[id(self)] += sum(x.nbytes for x in own)
        put(self, slot, own)

    monkeypatch.setattr(SharedBuffers, "put", counted)
    return found


def bytes_of(caches: Sequence[Cache]) -> int:
    return sum(x.nbytes for cache in caches for x in cache.read(cache.first, cache.offset).arrays)


@windows
def test_joining_copies_only_the_sequence_that_joins(window, put_bytes):
    sequences: Sequences = [sequence(100, i, window) for i in range(2)]
    step(batch(sequences), 0)
    n_others = 0
    while len(sequences) < 21:
        before = [places(caches) for caches in sequences]
        joining = sequence(90 + len(sequences), len(sequences), window)
        own = bytes_of(joining[:1]) + 2 * H * D * 4 * min(joining[1].offset, window or 10**6)
        sequences.append(joining)
        put_bytes.clear()
        layers = batch(sequences, new=[len(sequences) - 1])
        assert put_bytes.total() == own
        step(layers, len(sequences))
        after = [places(caches) for caches in sequences[:-1]]
        n_others += sum(a != b for a, b in zip(before, after, strict=True))
    assert n_others == 0


@windows
def test_leaving_copies_nothing(window, put_bytes):
    draw = random.Random(2)
    sequences: Sequences = [sequence(100, i, window) for i in range(21)]
    step(batch(sequences), 0)
    put_bytes.clear()
    while len(sequences) > 1:
        sequences.pop(draw.randrange(len(sequences)))
        before = [places(caches) for caches in sequences]
        step(batch(sequences, new=()), len(sequences))
        assert [places(caches) for caches in sequences] == before
    assert not put_bytes


def test_a_sequence_that_decodes_alone_stays_where_it_is_when_others_join(put_bytes):
    first = sequence(100, 0)
    step(batch([first]), 0)
    before = places(first)
    sequences: Sequences = [first]
    for i in range(1, 5):
        sequences.append(sequence(100, i))
        put_bytes.clear()
        step(batch(sequences, new=[i]), i)
        assert put_bytes.total() == bytes_of(sequences[i]) * 100 // 101
        assert all(cache.row is None for cache in first) and places(first) == before


@windows
def test_random_joins_and_leaves_hold_what_each_holds_alone(window):
    draw = random.Random(7)
    sequences: Sequences = []
    twins: Sequences = []
    for turn in range(60):
        joined = []
        if len(sequences) < 2 or draw.random() < 0.5:
            n, seed = draw.choice((30, 90, 110, 250, 255, 256, 700)), 1000 + turn
            sequences.append(sequence(n, seed, window))
            twins.append(sequence(n, seed, window))
            joined = [len(sequences) - 1]
        elif len(sequences) > 2:
            gone = draw.randrange(len(sequences))
            del sequences[gone], twins[gone]
        layers = batch(sequences, new=joined)
        for i in range(draw.randint(1, 4)):
            if i and not is_current(layers):
                layers = batch(sequences, new=())
            step(layers, turn)
            step_alone(twins, turn)
        assert_all_hold_the_same(sequences, twins)


def blocks(sequences: Sequences) -> list[int]:
    """Slots of the blocks in which sequences lie, in the order of the sequences."""
    found = {id(b): b.n_slots for caches in sequences if (b := block_of(caches[0])) is not None}
    return list(found.values())


def test_blocks_of_sequences_that_join_one_by_one_have_half_as_many_spare_slots():
    sequences: Sequences = [[filled(100, i)] for i in range(2)]
    batch(sequences)
    while len(sequences) < 21:
        sequences.append([filled(100, len(sequences))])
        batch(sequences, new=[len(sequences) - 1])
        assert sum(blocks(sequences)) <= len(sequences) + max(1, len(sequences) // SPARE)
    assert blocks(sequences) == [2, 2, 3, 5, 7, 11]


def test_sequences_that_start_together_have_one_block_without_spare_slots():
    sequences: Sequences = [[filled(100, i)] for i in range(16)]
    batch(sequences)
    assert blocks(sequences) == [16]


@pytest.mark.parametrize(("n_rows", "found"), [(3, [2]), (4, [2, 2])])
def test_one_that_joins_without_room_for_a_spare_row_keeps_its_own_buffers(n_rows, found):
    row = STEP * 2 * H * D * 4
    sequences: Sequences = [[filled(100, i)] for i in range(3)]
    batch(sequences[:2])
    # Two rows, and the layer once more.
    batch(sequences, lambda n_bytes: n_bytes <= n_rows * row, new=[2])
    assert blocks(sequences) == found


def test_one_that_joins_takes_the_slot_of_one_that_left():
    sequences: Sequences = [[filled(100, i)] for i in range(4)]
    batch(sequences)
    block = block_of(sequences[0][0])
    for i in range(3):
        del sequences[1]
        batch(sequences, new=())
        sequences.append([filled(100, 9 + i)])
        batch(sequences, new=[3])
        assert {block_of(caches[0]) for caches in sequences} == {block}
        assert sequences[3][0].row.slot == 1 + i


def test_one_for_which_a_block_would_grow_goes_elsewhere():
    sequences: Sequences = [[filled(n, n)] for n in (250, 240, 245)]
    batch(sequences)
    del sequences[0]
    sequences.append([filled(256, 1)])
    batch(sequences, new=[2])
    assert block_of(sequences[2][0]) is not block_of(sequences[0][0])
    assert block_of(sequences[0][0]).layers[0].capacity == STEP


def joined_one_by_one(lengths: Sequence[int], window: int | None = None) -> Sequences:
    sequences: Sequences = [sequence(n, i, window) for i, n in enumerate(lengths)]
    for n in range(1, len(sequences) + 1):
        batch(sequences[:n], new=[n - 1])
    return sequences


@windows
def test_blocks_become_one_when_the_longest_is_to_grow(window):
    lengths = [250, 252, 254, 240, 241, 242]
    sequences = joined_one_by_one(lengths, window)
    assert len(blocks(sequences)) > 1
    twins = [sequence(n, i, window) for i, n in enumerate(lengths)]
    layers = batch(sequences, new=())
    for i in range(8):
        if not is_current(layers):
            layers = batch(sequences, new=())
        step(layers, i)
        step_alone(twins, i)
        assert (len(blocks(sequences)) == 1) == (lengths[2] + i >= STEP)
    assert all(block_of(caches[0]) for caches in sequences)
    assert_all_hold_the_same(sequences, twins)


@pytest.mark.parametrize("at_once", [0, AT_ONCE])  # a layer at a time, all of them
def test_becoming_one_takes_some_layers_more_at_a_time_and_gives_the_blocks_back(
    at_once, monkeypatch
):
    monkeypatch.setattr("mlxkv.nn.blocks.AT_ONCE", at_once)
    monkeypatch.setattr("mlxkv.nn.blocks.PARTS", 1)
    gc.collect()
    others = mx.get_active_memory()
    n_layers, n = 8, 256
    sequences: Sequences = [[filled(n, i) for _ in range(n_layers)] for i in range(6)]
    for caches in sequences:
        for cache in caches:
            cache.rewind(n - 1)
    for i in range(1, 7):
        batch(sequences[:i], new=[i - 1])
    layers = batch(sequences, new=())
    step(layers, 1)
    del layers
    old = {id(block): block for caches in sequences if (block := block_of(caches[0]))}
    asked, first = list[int](), sequences[0]
    assert [block.n_slots for block in old.values()] == [2, 3] and block_of(first[0]) is None
    most = copying_bytes(sliceable(first), 6, n + 1, list(old.values()))
    del old
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    batch(sequences, lambda n_bytes: bool(asked.append(n_bytes)) or True, new=())
    assert len(blocks(sequences)) == 1
    assert most in asked
    assert mx.get_peak_memory() - before <= most
    held = sum(cache.nbytes for caches in sequences for cache in caches)
    assert mx.get_active_memory() - others == held


def test_without_room_to_become_one_blocks_grow_each_for_itself():
    sequences = joined_one_by_one([255, 255, 255, 255])
    layers = batch(sequences, new=())
    step(layers, 1)
    before = blocks(sequences)
    layers = batch(sequences, nothing, new=())
    assert blocks(sequences) == before
    step(layers, 2)
    assert all(cache.offset == STEP + 1 for caches in sequences for cache in caches)


@pytest.mark.parametrize("n_left", [1, 3, 7])
def test_where_memory_is_short_a_block_gives_more_than_a_quarter_of_free_slots_back(n_left):
    sequences: Sequences = [[filled(50, i)] for i in range(16)]
    twins: Sequences = [[filled(50, i)] for i in range(16)]
    batch(sequences)
    del sequences[: 16 - n_left], twins[: 16 - n_left]
    batch(sequences, everything, new=())
    assert blocks(sequences) == [16]
    layers = batch(sequences, nothing, new=())
    if n_left == 1:  # its next update copies it out
        assert layers is sequences[0]
    else:
        assert blocks(sequences) == [n_left + -(-n_left // SLACK)]
    for caches, (twin,) in zip(sequences, twins, strict=True):
        assert_holds_the_same(caches[0], twin)


def test_free_slots_are_given_back_when_buffers_grow():
    sequences: Sequences = [[filled(253, i)] for i in range(16)]
    batch(sequences)
    del sequences[1:7:2], sequences[5:]
    n = len(sequences)
    layers = batch(sequences, new=())
    for i in range(6):
        if not is_current(layers):
            layers = batch(sequences, new=())
        step(layers, i)
        assert blocks(sequences) == [16 if 253 + i < STEP else n + max(KEPT, -(-n // SLACK))]


def test_one_that_is_left_alone_stays_in_its_row_until_it_grows():
    sequences: Sequences = [sequence(254, i) for i in range(3)]
    twin = sequence(254, 2)
    step(batch(sequences), 0)
    del sequences[:2]
    for cache in twin:
        k, v = rows(1, 0)
        cache.update(k * 3, v * 3)
    before = places(sequences[0])
    layers = batch(sequences, new=())
    for i in range(3):
        if not is_current(layers):
            assert growth_bytes(sliceable(sequences[0]), 257) == 0
            layers = batch(sequences, new=())
        step(layers, i)
        for cache in twin:
            cache.update(*rows(1, i))
        if i == 0:
            assert places(sequences[0]) == before
    assert all(cache.row is None for cache in sequences[0])
    for a, b in zip(sequences[0], twin, strict=True):
        assert_holds_the_same(a, b)


def test_free_slots_between_rows_are_not_read_where_they_are_many():
    wide = 3000  # tokens: nothing is let through for being small
    sequences: Sequences = [[filled(wide, i)] for i in range(12)]
    batch(sequences)
    del sequences[1:6]
    (layer,) = batch(sequences, new=())
    (keys,) = step([layer], 1)
    assert [part.shape[0] for part in keys.parts] == [1, 6]
    assert sum(part.shape[0] for part in keys.parts) * (wide + 1) <= 1.25 * sum(
        caches[0].offset for caches in sequences
    )
    assert keys.order is None


def test_a_few_free_slots_between_rows_are_read_over():
    sequences: Sequences = [[filled(3000, i)] for i in range(12)]
    batch(sequences)
    del sequences[4:6]
    (layer,) = batch(sequences, new=())
    (keys,) = step([layer], 1)
    assert [part.shape[0] for part in keys.parts] == [12]
    assert keys.order is not None


@contextmanager
def memory_ends_in_the_second_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is run in it raises MLX's error for that."""
    real, n_calls = mx.eval, iter(range(100))

    def fails(*arrays):
        if next(n_calls) == 1:
            raise RuntimeError("[malloc] Unable to allocate 4096 bytes.")
        real(*arrays)

    with monkeypatch.context() as patch:
        patch.setattr("mlxkv.nn.blocks.AT_ONCE", 0)  # a layer at a time
        patch.setattr("mlxkv.nn.blocks.mx.eval", fails)
        with pytest.raises(RuntimeError, match="allocate"):
            yield


def test_a_slot_that_was_half_filled_when_memory_ran_out_is_not_given_away(monkeypatch):
    sequences = [[filled(100, i), filled(100, i)] for i in range(5)]
    batch(sequences[:3])
    block = block_of(sequences[0][0])
    del sequences[2]
    with memory_ends_in_the_second_layer(monkeypatch):
        batch(sequences[:3], new=[2])
    assert block.n_used == 3
    twin = filled(100, 3)
    batch([sequences[0], sequences[1], sequences[3]], new=[2])
    assert_holds_the_same(sequences[2][0], twin)
    assert_holds_the_same(sequences[2][1], twin)


def test_a_class_that_was_half_moved_when_memory_ran_out_holds_what_it_held(monkeypatch):
    sequences = joined_one_by_one([255, 255, 255, 255, 255])
    twins = [sequence(255, i) for i in range(5)]
    step(batch(sequences, new=()), 1)
    with memory_ends_in_the_second_layer(monkeypatch):
        batch(sequences, new=())
    step(batch(sequences, new=()), 2)
    for i, (caches, twin) in enumerate(zip(sequences, twins, strict=True)):
        for cache, other in zip(caches, twin, strict=True):
            for seed in (1, 2):
                k, v = rows(1, seed)
                other.update(k * (i + 1), v * (i + 1))
            assert_holds_the_same(cache, other)


def test_a_model_that_wants_one_array_has_one_run_of_rows():
    sequences: Sequences = [[filled(100 + i, i)] for i in range(6)]
    batch(sequences[:2], one_part=True)
    for n in range(3, 7):
        (part,) = place([sliceable(c) for c in sequences[:n]], everything, [n - 1], one_part=True)
        assert len(part.runs) == 1 and len(part.sequences) == n
    del sequences[1:4]
    (part,) = place([sliceable(c) for c in sequences], everything, (), one_part=True)
    assert len(part.runs) == 1 and part.slots == (0, 1, 2)


def test_sequences_that_go_on_together_come_into_one_block_once_if_it_is_small(monkeypatch):
    for most, found in ((SMALL_BYTES, [5]), (0, [2, 3])):
        monkeypatch.setattr("mlxkv.nn.slots.SMALL_BYTES", most)
        sequences = joined_one_by_one([30, 20, 31, 25, 28])
        twins = joined_one_by_one([30, 20, 31, 25, 28])
        layers = batch(sequences, new=())
        for i in range(SETTLED):
            assert is_current(layers) and not is_settled(layers)
            step(layers, i)
            step_alone(twins, i)
        assert is_settled(layers) and not is_current(layers)
        layers = batch(sequences, new=(), settled=True)
        for i in range(SETTLED + 1):
            step(layers, i)
            step_alone(twins, i)
            assert is_current(layers)
        assert blocks(sequences) == found
        assert_all_hold_the_same(sequences, twins)
