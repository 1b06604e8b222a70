"""Where a prompt's states are kept, of layers that keep one in place of keys and values."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mlxkv.kv.types import STEP
from mlxkv.prefix.layout import GRID

NEAR = 64
"""Tokens from a prompt's end within which a turn's end is the place to go on from."""


def end_marks(tokens: Sequence[int], ends: Collection[int]) -> set[int]:
    """Tokens behind which the state of a prompt is kept, beside those of the grid.

    That is where a system prompt ends, with its tools, and where the last turn does: behind it is
    what asks for the answer, which the next prompt may write in another way. Of the turns between,
    of a prompt that comes with several at once, the ends that are `STEP` tokens or more before the
    one kept last, then twice as many, and so on: edits are the likelier the later they are. Where
    no turn ends near the prompt's end, all but its last token, which is computed again for its
    logits.

    Args:
        tokens: the prompt.
        ends: tokens that end a turn.
    """
    n = len(tokens)
    found = [i + 1 for i in range(n - 1) if tokens[i] in ends] if ends else []
    marks = {found[0], found[-1]} if found else set[int]()
    gap = STEP
    for end in reversed(found):
        if min(marks - {found[0]}, default=found[0]) - end >= gap:
            marks.add(end)
            gap *= 2
    if not found or found[-1] < n - NEAR:
        marks.add(n - 1)
    return marks


def until(at: int, n_new: int, marks: Collection[int]) -> int:
    """As many of the next `n_new` tokens as there are to the next mark or point of the grid."""
    stop = min((mark for mark in marks if mark > at), default=at + n_new)
    return min(n_new, stop - at, GRID - at % GRID)
