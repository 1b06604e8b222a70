"""Blocks: buffers of a fixed number of slots, in which sequences have their KV, a row each.

Invariants:
- A sequence in slot i is row i of every layer's arrays `[n_slots, H, capacity, D]`. The token at
  position p lies at column p, in a window of W tokens at `p % W`.
- A slot is free when no cache refers to it: a cache that is written alone, reset or dropped leaves
  without a call, and nothing moves. A slot's rows share a seat, which lives as long as one of them.
- A block's rows never become more. They grow in length with the longest of them, by a copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxkv.cache import KVCache, RotatingKVCache
from mlxkv.kv.layout import Cache
from mlxkv.kv.types import AT_ONCE
from mlxkv.nn.shared_buffers import SharedBuffers, padded

PARTS = 8
"""Copies that a small model takes at least, so that what is there twice stays small beside it."""

Sliceable = KVCache | RotatingKVCache
Layers = Sequence[Sliceable]
"""One sequence's caches of keys and values."""


class Seat:
    """What the rows of a slot share."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's row of a layer's shared buffers: `cache.SharedRow`."""

    shared: SharedBuffers
    slot: int
    block: Block
    seat: Seat

    @property
    def nbytes(self) -> int:
        """This sequence's share of the bytes."""
        return -(-self.shared.nbytes // max(1, self.block.n_used))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.shared.token_bytes

    def views(self, n_rows: int) -> list[mx.array]:
        """`[1, H, n_rows, D]` of each array."""
        at = self.slot
        return [array[at : at + 1, :, :n_rows] for array in self.shared.arrays]


class Block:
    """Sequences whose KV lies in the same buffers, and free slots.

    Args:
        example: the caches of a sequence of the same format, not empty.
        n_slots: rows.
        n_tokens: that each row must have room for.
    """

    def __init__(self, example: Layers, n_slots: int, n_tokens: int):
        self.layers = [
            SharedBuffers.like(cache.arrays, n_slots, cache.n_rows(n_tokens)) for cache in example
        ]
        self._owners: list[list[weakref.ref[Sliceable]]] = [[] for _ in range(n_slots)]
        self._seats: list[weakref.ref[Seat] | None] = [None] * n_slots

    @property
    def n_slots(self) -> int:
        """Rows, used or free."""
        return len(self._owners)

    @property
    def n_used(self) -> int:
        return len(self.used())

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def row_bytes(self) -> int:
        """Of one slot, in all layers."""
        return self.nbytes // self.n_slots

    def used(self) -> list[int]:
        """The slots that are not free."""
        seats = enumerate(self._seats)
        return [slot for slot, seat in seats if seat is not None and seat() is not None]

    def has_columns(self, sequence: Layers, n_tokens: int) -> bool:
        """Whether a row has room for so many tokens of a sequence."""
        pairs = zip(sequence, self.layers, strict=True)
        return all(cache.n_rows(n_tokens) <= layer.capacity for cache, layer in pairs)

    def admit(self, sequences: Sequence[Layers]) -> None:
        """Copy as many sequences as there are free slots into them, some layers at a time.

        Nothing else is copied. Where they lay before is given back as these layers are done.
        """
        used = set(self.used())
        free = [slot for slot in range(self.n_slots) if slot not in used]
        places = list(zip(free, sequences, strict=False))
        before = {block for _, layers in places if (block := _any_block(layers)) is not None}
        seats = {slot: Seat() for slot, _ in places}
        # First: if a layer fails, those before it are in their slots.
        for slot, layers in places:
            self._owners[slot] = [weakref.ref(cache) for cache in layers]
            self._seats[slot] = weakref.ref(seats[slot])
        for group in _together([layer.nbytes for layer in self.layers]):
            for i in group:
                for slot, layers in places:
                    self.layers[i].put(slot, _aligned(layers[i]))
            mx.eval([self.layers[i].arrays for i in group])
            for i in group:
                for slot, layers in places:
                    layers[i].share(Row(self.layers[i], slot, self, seats[slot]))
                for block in before - {self}:
                    block.release(i)

    def release(self, i: int) -> None:
        """Give a layer's buffers back if no sequence lies there any more."""
        layer = self.layers[i]
        owners = (slot[i]() for slot in self._owners if slot)
        if not any(cache is not None and _lies_in(cache, layer) for cache in owners):
            layer.arrays = []


def block_of(layers: Layers) -> Block | None:
    """The block that all of a sequence's caches are in, in one slot."""
    block = _any_block(layers)
    if block is None or len(block.layers) != len(layers):
        return None
    slot = slot_of(layers)
    pairs = zip(layers, block.layers, strict=True)
    return block if all(_is_at(cache, layer, slot) for cache, layer in pairs) else None


def slot_of(layers: Layers) -> int:
    """The slot of a sequence that is in a block."""
    row = layers[0].row
    assert isinstance(row, Row)
    return row.slot


def sliceable(caches: Sequence[Cache]) -> list[Sliceable]:
    """The caches of keys and values."""
    return [cache for cache in caches if isinstance(cache, KVCache | RotatingKVCache)]


def length(layers: Layers) -> int:
    """Tokens of a sequence."""
    return max((cache.offset for cache in layers), default=0)


def form(layers: Layers) -> object:
    """Equal for sequences that can share buffers."""
    return [
        (cache.max_rows, [(x.shape[1], x.shape[3], x.dtype) for x in cache.arrays])
        for cache in layers
    ]


def token_bytes(cache: Sliceable) -> int:
    """Of one token in one layer."""
    arrays = cache.arrays
    return sum(array.nbytes // (array.shape[0] * array.shape[2]) for array in arrays)


def growth_bytes(layers: Layers, n_tokens: int) -> int:
    """Bytes that a sequence's block takes beside its own row if it is to hold `n_tokens`.

    All rows grow with the longest one, and each layer exists twice while it is copied. A sequence
    that is alone in a block leaves it when it grows.
    """
    block = block_of(layers)
    if block is None or block.n_used == 1:
        return 0
    more, largest = 0, 0
    for cache, layer in zip(layers, block.layers, strict=True):
        rows = cache.n_rows(n_tokens)
        if rows > layer.capacity:
            n_bytes = token_bytes(cache) * rows * block.n_slots
            more += n_bytes - layer.nbytes
            largest = max(largest, n_bytes)
    return more + largest


def block_bytes(example: Layers, n_slots: int, n_tokens: int) -> int:
    """Bytes of a block."""
    return sum(_layer_bytes(example, n_slots, n_tokens))


def copying_bytes(example: Layers, n_slots: int, n_tokens: int, left: Iterable[Block] = ()) -> int:
    """Bytes allocated at most while a new block is filled, some layers at a time.

    Args:
        left: blocks that all of their sequences leave for it.
    """
    sizes = _layer_bytes(example, n_slots, n_tokens)
    freed = [[layer.nbytes for layer in block.layers] for block in left]
    more = most = largest = 0
    for group in _together(sizes):
        size = sum(sizes[i] for i in group)
        more, largest = more + size, max(largest, size)
        most = max(most, more)
        more -= sum(layers[i] for layers in freed for i in group)
    return most + largest


def _together(sizes: Sequence[int]) -> list[range]:
    """The layers that are copied at a time: `AT_ONCE` bytes or a share at most, or one layer."""
    starts, held, most = [0], 0, min(AT_ONCE, sum(sizes) // PARTS)
    for i, size in enumerate(sizes):
        if held and held + size > most:
            starts.append(i)
            held = 0
        held += size
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def _layer_bytes(example: Layers, n_slots: int, n_tokens: int) -> list[int]:
    return [token_bytes(cache) * cache.n_rows(n_tokens) * n_slots for cache in example]


def _any_block(layers: Layers) -> Block | None:
    row = layers[0].row if layers else None
    return row.block if isinstance(row, Row) else None


def _lies_in(cache: Sliceable, layer: SharedBuffers) -> bool:
    return isinstance(cache.row, Row) and cache.row.shared is layer


def _is_at(cache: Sliceable, layer: SharedBuffers, slot: int) -> bool:
    row = cache.row
    return isinstance(row, Row) and row.shared is layer and row.slot == slot


def _aligned(cache: Sliceable) -> list[mx.array]:
    """A cache's arrays, with the token at position p at column p, or at `p % window`."""
    window = cache.max_rows
    first = cache.first if window is None else max(cache.first, cache.offset - window)
    arrays = list(cache.read(first, cache.offset).arrays)
    if window is None or first == 0:
        return arrays
    return [_turned(array, first % window, window) for array in arrays]


def _turned(x: mx.array, at: int, window: int) -> mx.array:
    """Rows `[1, H, n, D]` of a ring of `window`, whose first one lies at column `at`."""
    n = x.shape[2]
    if n < window and x.size:  # one token less than the window: the next one's column
        x = padded(x, window)
    return (
        x if at == 0 else mx.concatenate([x[:, :, window - at :], x[:, :, : window - at]], axis=2)
    )
