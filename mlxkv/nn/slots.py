"""Shared buffers of sequences that are decoded together: each sequence's KV is a row of them.

Invariants:
- A group's sequences have one KV format and similar lengths: a step reads at most a quarter more
  than they hold, or `PAD_BYTES` a layer.
- A sequence in slot i is row i of every layer's arrays `[n_slots, H, capacity, D]`. The token at
  position p lies at column p, in a window of W tokens at `p % W`.
- A slot is free when no cache refers to it: a cache that is written alone, reset or dropped leaves
  without a call.
- Buffers that grow for a sequence that joins have a quarter more slots than are used, at least one,
  where there is room: the sequences that join next copy only themselves. One that leaves copies at
  most one other. More free slots than a quarter, or than `KEPT` where there is room, are freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxkv.cache import KVCache, RotatingKVCache
from mlxkv.kv.layout import Cache
from mlxkv.nn.shared_buffers import SharedBuffers, padded

SLACK = 4
"""A group may read 1 / SLACK of its tokens as padding, and keeps 1 / SLACK of its slots free."""
KEPT = 2
"""Free slots that a group keeps if memory is not short, no more than it uses: in groups of 2 to 6
this halves the copies when sequences join and leave, for 29% of free rows instead of 20%."""
PAD_BYTES = 2**20
"""Padding a layer that a group may always read: the launches of a second group take as long."""

Sliceable = KVCache | RotatingKVCache
Layers = Sequence[Sliceable]
"""One sequence's caches of keys and values."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's row of a layer's shared buffers: `cache.SharedRow`."""

    shared: SharedBuffers
    slot: int
    group: Group

    @property
    def nbytes(self) -> int:
        """This sequence's share of the bytes."""
        return -(-self.shared.nbytes // max(1, self.group.n_used))

    def views(self, n_rows: int) -> list[mx.array]:
        """`[1, H, n_rows, D]` of each array."""
        at = self.slot
        return [array[at : at + 1, :, :n_rows] for array in self.shared.arrays]


class Group:
    """Sequences whose KV lies in the same buffers."""

    def __init__(self) -> None:
        self.layers: list[SharedBuffers] = []
        self._owners: list[list[weakref.ref[Sliceable]]] = []

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

    def used(self) -> list[int]:
        """The slots that are not free."""
        return [slot for slot in range(self.n_slots) if next(self._caches(slot), None) is not None]

    def _caches(self, slot: int) -> Iterator[Sliceable]:
        """The caches that still lie in a slot."""
        for ref, layer in zip(self._owners[slot], self.layers, strict=False):
            cache = ref()
            if cache is not None and _is_at(cache, layer, slot):
                yield cache

    def n_slots_with(self, n_new: int, *, spare: bool) -> int:
        """Rows after `n_new` more sequences are admitted."""
        n_needed = self.n_used + n_new
        if n_needed <= self.n_slots:
            return self.n_slots
        return n_needed + (max(1, n_needed // SLACK) if spare and self.layers else 0)

    def admit(self, sequences: Sequence[Layers], *, spare: bool) -> None:
        """Move sequences in, layer by layer: at most one layer's buffers exist twice.

        `spare`: whether a group that has buffers and no free row gets more rows than it needs.
        """
        used = set(self.used())
        n_slots = self.n_slots_with(len(sequences), spare=spare)
        self._owners += [[] for _ in range(n_slots - self.n_slots)]
        free = [slot for slot in range(self.n_slots) if slot not in used]
        places = list(zip(free, sequences, strict=False))
        # First: if a layer fails, those before it are in their slots.
        for slot, layers in places:
            self._owners[slot] = [weakref.ref(cache) for cache in layers]
        longest = max(_length(layers) for layers in sequences)
        if not self.layers:
            rows = [cache.n_rows(longest) for cache in sequences[0]]
            self.layers = [
                SharedBuffers.like(cache.arrays, self.n_slots, n)
                for cache, n in zip(sequences[0], rows, strict=True)
            ]
        for i, layer in enumerate(self.layers):
            capacity = max(layer.capacity, sequences[0][i].n_rows(longest))
            if (layer.n_slots, layer.capacity) != (self.n_slots, capacity):
                layer.resize(self.n_slots, capacity)
            for slot, layers in places:
                layer.put(slot, _aligned(layers[i]))
            mx.eval(layer.arrays)
            for slot, layers in places:
                layers[i].share(Row(layer, slot, self))

    def tidy(self, room: Room) -> None:
        """Fill gaps from the end, and free what is not needed."""
        used = self.used()
        while used and used[-1] >= len(used):
            hole = next(slot for slot in range(self.n_slots) if slot not in set(used))
            self._move(used.pop(), hole)
            used = sorted([*used, hole])
        caches = list(self._caches(used[0])) if used else []
        longest = max((_length(list(self._caches(slot))) for slot in used), default=0)
        n_slots = min(self.n_slots, len(used) + self._n_kept(len(used), room))
        self._owners = self._owners[:n_slots]
        for layer, cache in zip(self.layers, caches, strict=False):
            # Not for a step or two: the next sequence may need them.
            wanted = cache.n_rows(longest)
            capacity = wanted if layer.capacity * (SLACK - 1) > wanted * SLACK else layer.capacity
            if (layer.n_slots, layer.capacity) != (n_slots, capacity):
                layer.resize(n_slots, capacity)
                mx.eval(layer.arrays)

    def _n_kept(self, n_used: int, room: Room) -> int:
        """Free slots to keep."""
        quarter, wanted = -(-n_used // SLACK), min(n_used, KEPT)
        n_more = min(wanted, self.n_slots - n_used) - quarter
        if n_more > 0 and room(n_more * (self.nbytes // self.n_slots)):
            return wanted
        return quarter

    def _move(self, slot: int, to: int) -> None:
        for cache in list(self._caches(slot)):
            assert isinstance(cache.row, Row)
            layer = cache.row.shared
            layer.put(to, layer.rows(slot))
            mx.eval(layer.arrays)
            cache.share(Row(layer, to, self))
        self._owners[to], self._owners[slot] = self._owners[slot], []


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences of a batch whose KV is in the same arrays.

    Args:
        sequences: their indices in the batch, in the order of their rows.
        slots: their rows; `(0,)` of one with buffers of its own.
        is_shared: whether the arrays are a group's.
    """

    sequences: tuple[int, ...]
    slots: tuple[int, ...]
    is_shared: bool


Room = Callable[[int], bool]
"""Whether so many bytes are free."""


def place(sequences: Sequence[Layers], room: Room, one_part: bool = False) -> list[Part]:
    """Move sequences that go together into the same buffers.

    Args:
        sequences: the caches of each.
        room: where it refuses the bytes of a move, sequences stay where they are.
        one_part: move all that have the same format, however long they are.
    """
    for bucket in _buckets(sequences, one_part):
        group = bucket.group or Group()
        # In the batch's order, which `batch` then need not rearrange.
        new = [i for i in sorted(bucket.members) if _group_of(sequences[i]) is not group]
        if not new or len(bucket.members) == 1:
            continue
        layers = [sequences[i] for i in new]
        for spare in (True, False):
            if room(_bytes_to_admit(group, layers, spare=spare)):
                group.admit(layers, spare=spare)
                break
    return _parts(sequences, room)


@dataclass(slots=True)
class _Bucket:
    """Sequences to be put in one group."""

    group: Group | None
    form: object
    members: list[int]


def _buckets(sequences: Sequence[Layers], one_part: bool) -> list[_Bucket]:
    lengths = [_length(layers) for layers in sequences]
    buckets: list[_Bucket] = []
    by_length = sorted(range(len(sequences)), key=lambda i: lengths[i])
    for i in by_length:
        if lengths[i] and (group := _group_of(sequences[i])) is not None:
            known = next((b for b in buckets if b.group is group), None)
            if known is None:
                buckets.append(_Bucket(group, _form(sequences[i]), [i]))
            else:
                known.members.append(i)
    placed = {i for bucket in buckets for i in bucket.members}
    loose = [i for i in by_length if lengths[i] and i not in placed]
    buckets += [_Bucket(None, _form(sequences[i]), [i]) for i in loose]
    # The largest groups first: smaller ones move.
    merged: list[_Bucket] = []
    for bucket in sorted(buckets, key=lambda bucket: -len(bucket.members)):
        for other in merged:
            both = other.members + bucket.members
            unit = max(map(_token_bytes, sequences[both[0]]), default=0)
            if other.form == bucket.form and (
                one_part or go_together([lengths[i] for i in both], unit)
            ):
                other.members, other.group = both, other.group or bucket.group
                break
        else:
            merged.append(bucket)
    return merged


def _parts(sequences: Sequence[Layers], room: Room) -> list[Part]:
    groups: dict[Group, list[int]] = {}
    alone = []
    for i, layers in enumerate(sequences):
        group = _group_of(layers)
        if group is None:
            alone.append(i)
        else:
            groups.setdefault(group, []).append(i)
    parts = []
    for group, members in groups.items():
        group.tidy(room)
        order = sorted((_slot(sequences[i]), i) for i in members)
        slots, own = zip(*order, strict=True)
        parts.append(Part(own, slots, True))
    return parts + [Part((i,), (0,), False) for i in alone]


def _group_of(layers: Layers) -> Group | None:
    """The group that all of a sequence's caches are in, in one slot."""
    row = layers[0].row if layers else None
    if not isinstance(row, Row) or len(row.group.layers) != len(layers):
        return None
    pairs = zip(layers, row.group.layers, strict=True)
    return row.group if all(_is_at(cache, layer, row.slot) for cache, layer in pairs) else None


def _slot(layers: Layers) -> int:
    row = layers[0].row
    assert isinstance(row, Row)
    return row.slot


def sliceable(caches: Sequence[Cache]) -> list[Sliceable]:
    """The caches of keys and values."""
    return [cache for cache in caches if isinstance(cache, KVCache | RotatingKVCache)]


def go_together(lengths: Sequence[int], token_bytes: int) -> bool:
    """Whether sequences of these lengths may be padded to the longest, at `token_bytes` a layer."""
    held = sum(lengths)
    padding = len(lengths) * max(lengths) - held
    return padding * SLACK <= held or padding * token_bytes <= PAD_BYTES


def growth_bytes(layers: Layers, n_tokens: int) -> int:
    """Bytes that a sequence's group takes beside its own row if it is to hold `n_tokens`.

    All rows grow with the longest one, and each layer exists twice while it is copied.
    """
    group = _group_of(layers)
    if group is None:
        return 0
    more, largest = 0, 0
    for cache, layer in zip(layers, group.layers, strict=True):
        rows = cache.n_rows(n_tokens)
        if rows > layer.capacity:
            n_bytes = _token_bytes(cache) * rows * layer.n_slots
            more += n_bytes - layer.nbytes
            largest = max(largest, n_bytes)
    return more + largest


def _bytes_to_admit(group: Group, new: Sequence[Layers], *, spare: bool) -> int:
    """Bytes allocated at most, before the sequences free their own buffers."""
    n_slots = group.n_slots_with(len(new), spare=spare)
    longest = max(_length(layers) for layers in new)
    total, largest = 0, 0
    for i, cache in enumerate(new[0]):
        capacity = max(group.layers[i].capacity if group.layers else 0, cache.n_rows(longest))
        n_bytes = n_slots * capacity * _token_bytes(cache)
        total, largest = total + n_bytes, max(largest, n_bytes)
    return total - group.nbytes + largest


def _form(layers: Layers) -> object:
    """Equal for sequences that can share buffers."""
    return [
        (cache.max_rows, [(x.shape[1], x.shape[3], x.dtype) for x in cache.arrays])
        for cache in layers
    ]


def _length(layers: Layers) -> int:
    return max((cache.offset for cache in layers), default=0)


def _token_bytes(cache: Sliceable) -> int:
    arrays = cache.arrays
    return sum(array.nbytes // (array.shape[0] * array.shape[2]) for array in arrays)


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
