"""Where the KV of sequences that are decoded together lies: in blocks of slots, by length.

Invariants:
- Sequences of one KV format and similar lengths are a class: a step reads at most a quarter more
  than they hold, or `PAD_BYTES` a layer. A class lies in any number of blocks, and those of its
  sequences that have buffers of their own.
- Sequences that start together share one block. One that joins takes a free slot, or a new block
  with spare slots where there is room; one that leaves frees its slot. Neither copies another.
- KV moves when it would be copied anyway: when its sequence joins, and when its buffers grow, at
  each `STEP` tokens of the longest in a block. Then its class is brought into one block.
- Sequences that have been decoded together for some steps (`batch.SETTLED`) are brought into one
  block as well, if that is small.
- Where memory is short, a block with more than a quarter of its slots free is copied into a
  smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from mlxkv.kv.types import STEP
from mlxkv.nn.blocks import (
    Block,
    Layers,
    block_bytes,
    block_of,
    copying_bytes,
    form,
    length,
    slot_of,
    token_bytes,
)

SLACK = 4
"""A part may read 1 / SLACK of its tokens as padding, and keeps 1 / SLACK of its slots free."""
KEPT = 2
"""Free slots that it keeps if memory is not short, no more than it uses."""
SPARE = 2
"""A block for one that joins has 1 / SPARE of its class's sequences as free slots, if there is
room: 16 that join one by one have 5 parts and not 8, until their buffers grow."""
PAD_BYTES = 2**20
"""Padding a layer that a part may always read: the launches of a second part take as long."""
SMALL_BYTES = 128 * 2**20
"""A block that settled sequences are copied into: as long as some ten steps of several parts take
longer than those of one (SmolLM2, 8 sequences, on a CPU)."""

Room = Callable[[int], bool]
"""Whether so many bytes are free."""


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences of a batch whose KV is in the same arrays.

    Args:
        sequences: their indices in the batch, in the order of their rows.
        slots: their rows; `(0,)` of one with buffers of its own.
        is_shared: whether the arrays are a block's.
        runs: rows `[start, stop)` that are read at once; free slots lie between runs, and in a run
            where they are few.
    """

    sequences: tuple[int, ...]
    slots: tuple[int, ...]
    is_shared: bool
    runs: tuple[tuple[int, int], ...] = ((0, 1),)


def place(
    sequences: Sequence[Layers],
    room: Room,
    new: Collection[int] | None = None,
    one_part: bool = False,
    settled: bool = False,
) -> list[Part]:
    """Decide where sequences lie, and move those that may move.

    Args:
        sequences: the caches of each.
        room: where it refuses the bytes of a move, sequences stay where they are.
        new: those that join, which may move; None: all that have buffers of their own.
        one_part: have all of the same format in one run of rows, however long they are. Others are
            copied for that.
        settled: whether they will go on together, as far as is known: small ones may move.
    """
    lengths = [length(layers) for layers in sequences]
    found: list[Part] = []
    for members in _classes(sequences, lengths, one_part):
        of_class = _Class(sequences, lengths, members, room, one_part)
        of_class.settle(members if new is None else new)
        if settled and not one_part:
            of_class.merge()
        found += of_class.parts()
    placed = {i for part in found for i in part.sequences}
    rest = [i for i in range(len(sequences)) if i not in placed]
    return found + [Part((i,), (0,), False) for i in rest]


def is_due(layers: Layers) -> bool:
    """Whether a sequence's buffers are to grow with its next token, so that it may move."""
    return length(layers) % STEP == 0


def go_together(lengths: Sequence[int], token_bytes: int) -> bool:
    """Whether rows of these lengths may be read up to the longest, at `token_bytes` a layer."""
    held = sum(lengths)
    padding = len(lengths) * max(lengths) - held
    return padding * SLACK <= held or padding * token_bytes <= PAD_BYTES


def _classes(
    sequences: Sequence[Layers], lengths: Sequence[int], one_part: bool
) -> list[list[int]]:
    """The sequences that are not empty, by format and length."""
    held: dict[object, list[int]] = {}
    for i in sorted(range(len(sequences)), key=lambda i: lengths[i]):
        if lengths[i]:
            block = block_of(sequences[i])
            held.setdefault(i if block is None else block, []).append(i)
    classes: list[tuple[object, list[int]]] = []
    for members in sorted(held.values(), key=len, reverse=True):
        first = sequences[members[0]]
        of_form, unit = form(first), _unit(first)
        for other_form, other in classes:
            both = other + members
            if other_form == of_form and (
                one_part or go_together([lengths[i] for i in both], unit)
            ):
                other += members
                break
        else:
            classes.append((of_form, members))
    return [sorted(members) for _, members in classes]


@dataclass(slots=True)
class _Class:
    """Sequences that may share buffers, `members` in the batch's order."""

    sequences: Sequence[Layers]
    lengths: Sequence[int]
    members: list[int]
    room: Room
    one_part: bool
    blocks: dict[Block, list[int]] = field(default_factory=dict, init=False)
    own: list[int] = field(default_factory=list, init=False)

    def settle(self, new: Collection[int]) -> None:
        """Move what may move."""
        self._look()
        joining = [i for i in self.own if self.one_part or i in new or is_due(self.sequences[i])]
        if len(self.members) > 1 and self._must_be_one() and self._compact(self.members):
            return
        for block, members in list(self.blocks.items()):
            if len(members) == block.n_used and self._is_short(block, members):
                self._compact(members)
        self._admit(joining)

    def merge(self) -> None:
        """Bring small sequences in several blocks, or among free slots, into one without any."""
        n, blocks = len(self.members), list(self.blocks)
        if n < 2 or not blocks or (len(blocks) == 1 and not self.own and blocks[0].n_slots == n):
            return
        n_tokens = max(self.lengths[i] for i in self.members) + 1
        if block_bytes(self.sequences[self.members[0]], n, n_tokens) <= SMALL_BYTES:
            self._into_new(self.members, n, self._left(self.members))

    def parts(self) -> list[Part]:
        """The blocks, and the sequences with buffers of their own."""
        found = []
        for members in self.blocks.values():
            order = sorted((slot_of(self.sequences[i]), i) for i in members)
            slots, own = zip(*order, strict=True)
            found.append(Part(own, slots, True, self._runs(own, slots)))
        return found + [Part((i,), (0,), False) for i in self.own]

    def _look(self) -> None:
        """Find where the members lie."""
        self.blocks.clear()
        self.own.clear()
        for i in self.members:
            block = block_of(self.sequences[i])
            if block is None or self._leaves(block, i):
                self.own.append(i)
            else:
                self.blocks.setdefault(block, []).append(i)

    def _leaves(self, block: Block, i: int) -> bool:
        """Whether a sequence that is alone in its block has its next update copy it out.

        For growing it is copied anyway.
        """
        if block.n_used > 1:
            return False
        return is_due(self.sequences[i]) or self._is_short(block, [i])

    def _must_be_one(self) -> bool:
        """Whether the members are to be copied into one block."""
        if not self.blocks:
            return False
        block, members = next(iter(self.blocks.items()))
        n_free = block.n_slots - block.n_used
        if self.one_part:
            fits = len(self.own) <= n_free and all(self._fits(block, i) for i in self.own)
            return len(self.blocks) > 1 or not fits or self._waste(block, members) > 0
        longest = (max(own, key=self.lengths.__getitem__) for own in self.blocks.values())
        if not any(is_due(self.sequences[i]) for i in longest):
            return False
        slots = sorted(slot_of(self.sequences[i]) for i in members)
        is_one = slots == list(range(len(self.members)))
        return not is_one or self._waste(block, members) > 0

    def _admit(self, joining: list[int]) -> None:
        """Copy sequences into free slots, else into a new block if it has more than one row."""
        for block, members in self.blocks.items():
            n_free = block.n_slots - block.n_used
            fitting = [i for i in joining if self._fits(block, i)][:n_free]
            largest = max(layer.nbytes for layer in block.layers)
            if fitting and self.room(len(fitting) * largest // block.n_slots):
                block.admit([self.sequences[i] for i in fitting])
                members += fitting
                self.own = [i for i in self.own if i not in fitting]
                joining = [i for i in joining if i not in fitting]
        if not joining or len(self.members) == 1:
            return
        n_new, n_old = len(joining), len(self.members) - len(joining)
        spares = (len(self.members) // SPARE, 1, 0) if n_old else (0,)
        for n_slots in [n_new + n_spare for n_spare in spares]:
            if n_slots > 1 and self._into_new(joining, n_slots):
                return

    def _compact(self, members: list[int]) -> bool:
        """Copy members into one block, with no more free slots than they have now."""
        left = self._left(members)
        n_free = sum(block.n_slots - len(own) for block, own in left.items())
        n_used, example = len(members), next(iter(left or self.blocks))
        n_slots = n_used + min(n_free, self._n_kept(n_used, example.row_bytes))
        if self.one_part and self.own:
            n_slots = max(n_slots, n_used + max(1, n_used // SLACK))
        return any(self._into_new(members, n, left) for n in sorted({n_slots, n_used})[::-1])

    def _left(self, members: Collection[int]) -> dict[Block, list[int]]:
        """The blocks that no sequence lies in but these members."""
        return {
            block: own
            for block, own in self.blocks.items()
            if set(own) <= set(members) and len(own) == block.n_used
        }

    def _into_new(self, members: list[int], n_slots: int, left: Collection[Block] = ()) -> bool:
        """Copy members into a new block, if there is room."""
        layers = [self.sequences[i] for i in members]
        # With the next token: else all rows would be copied once more by the same step.
        n_tokens = max(self.lengths[i] for i in members) + 1
        more = block_bytes(layers[0], n_slots, n_tokens) - sum(block.nbytes for block in left)
        if more > 0 and not self.room(copying_bytes(layers[0], n_slots, n_tokens, left)):
            return False
        Block(layers[0], n_slots, n_tokens).admit(layers)
        self._look()
        return True

    def _fits(self, block: Block, i: int) -> bool:
        """Whether a sequence can join a block that does not grow for it."""
        return block.has_columns(self.sequences[i], self.lengths[i] + 1)

    def _n_kept(self, n_used: int, row_bytes: int) -> int:
        """Free slots that are not wasted."""
        quarter, most = -(-n_used // SLACK), min(n_used, KEPT)
        if most > quarter and self.room((most - quarter) * row_bytes):
            return most
        return quarter

    def _is_short(self, block: Block, members: Sequence[int]) -> bool:
        """Whether memory is short, and a block wastes some."""
        n_bytes = self._waste(block, members)
        return n_bytes > 0 and not self.room(n_bytes)

    def _waste(self, block: Block, members: Sequence[int]) -> int:
        """Bytes of free slots that are too many, and of columns that no member needs."""
        n_free = block.n_slots - block.n_used
        n_more = max(0, n_free - self._n_kept(block.n_used, block.row_bytes))
        longest = max(self.lengths[i] for i in members)
        columns = 0
        for cache, layer in zip(self.sequences[members[0]], block.layers, strict=True):
            wanted = cache.n_rows(longest + 1)
            # Not for a step or two: the next sequence may need them.
            if layer.capacity * (SLACK - 1) > wanted * SLACK:
                columns += layer.nbytes * (layer.capacity - wanted) // layer.capacity
        return n_more * block.row_bytes + columns

    def _runs(self, members: Sequence[int], slots: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Rows that are read at once: all, or those between free slots."""
        at = dict(zip(slots, members, strict=True))
        unit = _unit(self.sequences[members[0]])

        def is_read(start: int, stop: int) -> bool:
            rows = [self.lengths[at[slot]] if slot in at else 0 for slot in range(start, stop)]
            return go_together(rows, unit)

        first, last = slots[0], slots[-1] + 1
        if len(slots) == last - first or self.one_part or is_read(first, last):
            return ((first, last),)
        runs: list[tuple[int, int]] = []
        for slot in slots:
            if runs and (runs[-1][1] == slot or is_read(runs[-1][0], slot + 1)):
                runs[-1] = runs[-1][0], slot + 1
            else:
                runs.append((slot, slot + 1))
        return tuple(runs)


def _unit(layers: Layers) -> int:
    """Bytes of a token in the layer where it takes the most."""
    return max(map(token_bytes, layers), default=0)
