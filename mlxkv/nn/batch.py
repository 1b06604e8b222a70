"""Several sequences in one step: the weights are batched, and sequences of similar length share
buffers for their KV (`slots`).

Invariants:
- A batch owns no KV. Each token is written to where its sequence's own cache has its KV:
  into its row of shared buffers, or into its own. So sequences of any length, window and KV format
  go together, and may join and leave between steps.
- Rows of one sequence are never summed with those of another: a NaN in one stays there.
- Positions, columns and masks of a step are made once for all layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import mlx.core as mx

from mlxkv.cache import KVCache, RecurrentCache, RotatingKVCache
from mlxkv.errors import UsageError
from mlxkv.kv.layout import Cache, LayerCache, Mask, Offset, Place, Positions, Stepping
from mlxkv.kv.storage import Order, Ragged, Rows
from mlxkv.kv.types import STEP
from mlxkv.nn.blocks import Row, sliceable
from mlxkv.nn.shared_buffers import Access, Run
from mlxkv.nn.slots import Part, Room, place
from mlxkv.nn.state_batch import BatchStates

SETTLED = 8
"""Steps after which the sequences of a batch are taken to go on together."""


def batch(
    caches_of_sequences: Sequence[Sequence[Cache]],
    room: Room = lambda n_bytes: True,
    one_part: bool = False,
    new: Collection[int] | None = None,
    settled: bool = False,
) -> Sequence[LayerCache]:
    """Caches for `model.last_logits(tokens [B, 1], caches)`, B sequences at once.

    Moves sequences of similar length into buffers that they share, which evaluates; a step then
    reads and writes them in a few operations.

    Args:
        caches_of_sequences: those of each, from `make_caches` of one model, in any KV format and at
            any offset. Each step writes to them.
        room: whether so many bytes are free; if not, sequences keep their own buffers.
        one_part: have all sequences share buffers, however long they are.
        new: indices of those that join; None: of all that have buffers of their own. Others are
            moved only when their buffers grow.
        settled: small ones may be moved, as `is_settled` says; it is not asked again.

    Raises:
        UsageError: no sequences, or caches of different models.
    """
    if len({len(caches) for caches in caches_of_sequences}) != 1:
        raise UsageError("a batch needs sequences of one model, at least one")
    sequences = [sliceable(caches) for caches in caches_of_sequences]
    parts = place(sequences, room, new, one_part, settled)
    if len(caches_of_sequences) == 1 and (one_part or not parts[0].is_shared):
        return caches_of_sequences[0]
    steps = _Steps(parts, settled)
    layers = list(zip(*caches_of_sequences, strict=True))
    first = next((i for i, layer in enumerate(layers) if sliceable(layer)), 0)
    return [
        BatchStates(states)
        if (states := _states(layer))
        else BatchCache(layer, steps, leads=i == first)
        for i, layer in enumerate(layers)
    ]


def _states(layer: Sequence[Cache]) -> list[RecurrentCache]:
    """The caches of a layer that keeps a state; none of another."""
    return [cache for cache in layer if isinstance(cache, RecurrentCache)]


def _first(layers: Sequence[LayerCache]) -> BatchCache | None:
    """The first layer with keys and values; None for the caches of one sequence."""
    return next((layer for layer in layers if isinstance(layer, BatchCache)), None)


def is_current(layers: Sequence[LayerCache]) -> bool:
    """Whether a batch may take another step: else make a new one of the same sequences.

    Not if one has left its shared row, nor where buffers are to grow or it is settled, so that
    sequences may move.
    """
    first = _first(layers)
    if first is None:
        return True
    if is_settled(layers):
        return False
    return first.is_intact and all(cache.offset % STEP for cache in first.caches)


def is_settled(layers: Sequence[LayerCache]) -> bool:
    """Whether a batch has gone on so long that it may be worth bringing its parts together."""
    first = _first(layers)
    return first is not None and first.is_settled


def kv_order(
    caches_of_sequences: Sequence[Sequence[Cache]],
    room: Room,
    one_part: bool = False,
    new: Collection[int] | None = None,
) -> list[int]:
    """The order of sequences in which `batch` rearranges nothing; moves those that it would."""
    parts = place([sliceable(caches) for caches in caches_of_sequences], room, new, one_part)
    return [i for part in parts for i in part.sequences]


class _Members:
    """The sequences of a part, in the order of a batch of `n`."""

    def __init__(self, part: Part, n: int):
        rows = sorted(zip(part.sequences, part.slots, strict=True))
        self.sequences = [sequence for sequence, _ in rows]
        self.is_shared = part.is_shared
        self._slots = [slot for _, slot in rows]
        self._runs = part.runs
        start, stop = self.sequences[0], self.sequences[-1] + 1
        self._at: slice | mx.array | None = None  # all
        if stop - start != len(rows):
            self._at = mx.array(self.sequences, dtype=mx.uint32)
        elif len(rows) < n:
            self._at = slice(start, stop)

    def of(self, x: mx.array) -> mx.array:
        """The part's rows of `[B, ...]`."""
        return x if self._at is None else x[self._at]

    def access(self, offsets: Sequence[int], window: int | None) -> Access:
        own = [offsets[i] for i in self.sequences]
        columns = own if window is None else [offset % window for offset in own]
        behind = [offset + 1 for offset in own]
        seen = behind if window is None else [min(offset, window) for offset in behind]
        at = dict(zip(self._slots, seen, strict=True))
        runs = []
        for start, stop in self._runs:
            # The result of an empty row is not used.
            visible = [at.get(slot, 1) for slot in range(start, stop)]
            n_columns, mask = max(visible), None
            if len({at[slot] for slot in range(start, stop) if slot in at}) > 1:
                mask = mx.arange(n_columns)[None] < mx.array(visible)[:, None]
                mask = mask[:, None, None]
            runs.append(Run(start, stop, n_columns, mask))
        return Access(self._slots, columns, runs, behind, seen)


class _Steps:
    """What all layers of a batch have in common, made once for each step."""

    def __init__(self, parts: Sequence[Part], settled: bool):
        self._asks, self._n_steps = not settled, 0
        n = sum(len(part.sequences) for part in parts)
        self.members = [_Members(part, n) for part in parts]
        self.order = _order(parts)
        self._step: _Step | None = None

    def next(self, caches: Sequence[Cache], leads: bool) -> _Step:
        """The step of the next token in a layer with these caches.

        The first layer of a step (`leads`) compares the offsets of all its caches, later layers one
        of theirs: they are the same unless a step was interrupted between two layers.
        """
        step = self._step
        if leads or step is None or step.offsets[0] != caches[0].offset:
            offsets = tuple([cache.offset for cache in caches])
            if step is None or step.offsets != offsets:
                step = self._step = _Step(offsets, self.members)
                self._n_steps += 1
        return step

    @property
    def are_settled(self) -> bool:
        """Whether `SETTLED` steps have been made, if that was not known."""
        return self._asks and self._n_steps >= SETTLED


class _Step:
    """Where one step, whose tokens have the positions `offsets`, writes and reads."""

    def __init__(self, offsets: tuple[int, ...], members: Sequence[_Members]):
        self.offsets, self._members = offsets, members
        self.position: Offset = offsets[0] if len(set(offsets)) == 1 else Positions(offsets)
        self._accesses: dict[int | None, list[Access]] = {}

    def accesses(self, window: int | None) -> list[Access]:
        """One for each part, in layers of this window."""
        if window not in self._accesses:
            self._accesses[window] = [part.access(self.offsets, window) for part in self._members]
        return self._accesses[window]


def _order(parts: Sequence[Part]) -> Order | None:
    """The batch's order among the rows of all parts; None where it is the same."""
    rows: list[int] = []
    row_of = {}
    for part in parts:
        at = dict(zip(part.slots, part.sequences, strict=True))
        for slot in [slot for start, stop in part.runs for slot in range(start, stop)]:
            if slot in at:
                row_of[at[slot]] = len(rows)
            rows.append(at.get(slot, part.sequences[0]))
    if rows == list(range(len(row_of))):
        return None
    back = [row_of[i] for i in range(len(row_of))]
    return Order(mx.array(rows, dtype=mx.uint32), mx.array(back, dtype=mx.uint32))


class BatchCache(Stepping):
    """One layer's caches of several sequences, for one token of each at a time.

    `leads`: whether it is the first layer of a step that has keys and values.
    """

    def __init__(self, caches: Sequence[Cache], steps: _Steps, leads: bool):
        self.caches = tuple(caches)
        self._steps, self._leads = steps, leads
        self._parts = [_part(self.caches, members) for members in steps.members]

    @property
    def offset(self) -> Offset:
        """Position of the next token; `Positions` where they differ."""
        return self._steps.next(self.caches, self._leads).position

    @property
    def is_intact(self) -> bool:
        """Whether no cache has left its shared row since the batch was made."""
        return all(part.is_intact for part in self._parts)

    @property
    def is_settled(self) -> bool:
        """See `is_settled`."""
        return self._steps.are_settled

    def mask(self, L: int) -> Mask:
        """None: what a sequence's token sees comes with the keys that `update` returns."""
        if L != 1:
            raise UsageError(f"a batch takes one token of each sequence at a time; got {L}")
        return None

    def next_place(self) -> Place | None:
        if len(self._parts) != 1 or self._steps.order is not None:
            return None
        (part,) = self._parts
        step = self._steps.next(self.caches, self._leads)
        return part.next_place(step.accesses(part.window)[0])

    def stepped(self, keys: mx.array, values: mx.array) -> None:
        (part,) = self._parts
        step = self._steps.next(self.caches, self._leads)
        part.stepped(keys, values, step.accesses(part.window)[0])

    def update(self, k: mx.array, v: mx.array) -> tuple[Ragged, Ragged]:
        """Append k `[B, H, 1, k_dim]` and v `[B, H, 1, v_dim]`, a token of each sequence.

        Returns the keys and values that each sequence's query sees.
        """
        caches, steps, parts = self.caches, self._steps, self._parts
        B, (B_k, _, L, _) = len(caches), k.shape
        if B_k != B or L != 1:
            raise UsageError(f"a batch of {B} sequences takes keys [{B}, H, 1, D]; got {k.shape}")
        step = steps.next(caches, self._leads)
        if len(parts) == 1:
            (part,) = parts
            found = part.update(k, v, step.accesses(part.window)[0])
        else:
            found = []
            for i, (members, part) in enumerate(zip(steps.members, parts, strict=True)):
                access = step.accesses(part.window)[i]
                found += part.update(members.of(k), members.of(v), access)
        keys, values, masks = zip(*found, strict=True)
        return Ragged(keys, masks, steps.order), Ragged(values, masks, steps.order)


_Rows = tuple[Rows, Rows, mx.array | None]
"""Keys and values of rows that are read at once, and the mask."""


class _OwnPart:
    """A sequence with buffers of its own, in one layer."""

    window, is_intact = None, True

    def __init__(self, cache: Cache):
        self._cache = cache

    def next_place(self, access: Access) -> Place | None:
        return None

    def stepped(self, keys: mx.array, values: mx.array, access: Access) -> None:
        raise NotImplementedError

    def update(self, k: mx.array, v: mx.array, access: Access) -> list[_Rows]:
        return [(*self._cache.update(k, v), None)]


class _SharedPart:
    """Sequences that share buffers, in one layer; rows come in the buffers' order."""

    def __init__(self, caches: Sequence[KVCache | RotatingKVCache]):
        first = caches[0]
        assert isinstance(first.row, Row)
        self._caches, self._first, self._row = caches, first, first.row
        self._rows = [cache.row for cache in caches]
        self.window = first.max_rows

    @property
    def is_intact(self) -> bool:
        rows = zip(self._caches, self._rows, strict=True)
        return all(cache.row is row for cache, row in rows)

    def next_place(self, access: Access) -> Place | None:
        first, shared = self._first, self._row.shared
        assert first.row is self._row, "a sequence has left the batch: make a new batch"
        return access.place(shared) if first.kv_type == "native" else None

    def stepped(self, keys: mx.array, values: mx.array, access: Access) -> None:
        self._row.shared.arrays = [keys, values]
        self._first.advance(self._caches, access.offsets)

    def update(self, k: mx.array, v: mx.array, access: Access) -> list[_Rows]:
        first, shared, n = self._first, self._row.shared, access.n_columns
        assert first.row is self._row, "a sequence has left the batch: make a new batch"
        if n > shared.capacity:
            shared.reserve(first.n_rows(n))
        shared.write(first.encoded(k, v), access)
        first.advance(self._caches, access.offsets)
        return [(*first.decoded(shared.read(run), run.n_columns), run.mask) for run in access.runs]


def _part(caches: Sequence[Cache], members: _Members) -> _OwnPart | _SharedPart:
    own = [caches[i] for i in members.sequences]
    if members.is_shared and (layers := sliceable(own)):
        return _SharedPart(layers)
    return _OwnPart(own[0])
