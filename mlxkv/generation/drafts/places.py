"""The rows of a pass with drafts: their places, which of these need logits, what may come there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlxkv.errors import contained
from mlxkv.generation.drafts.drafter import Proposal
from mlxkv.generation.flight import Lane

if TYPE_CHECKING:
    import numpy as np

    from mlxkv.generation.drafts.drafts import May


@dataclass(slots=True)
class PassRow:
    """A sequence of a pass.

    Args:
        draft: its tokens; as far as they may come, once `masks` is known.
        only: indices of those that alone can come.
        n_held: tokens that its caches held before it.
        masks: what may come at each place that counts.
        places: its own in the pass.
        at: for each place where its logits are; None where they are of no use.
    """

    lane: Lane
    draft: list[int]
    only: list[int]
    n_held: int
    masks: list[May] = field(default_factory=list)
    places: range = field(default_factory=lambda: range(0))
    at: list[int | None] = field(default_factory=list)


def pass_row(lane: Lane, proposal: Proposal | None) -> PassRow:
    """A row with a draft, or with none."""
    draft = [] if proposal is None else proposal.tokens
    only = [i for i in range(len(draft)) if proposal is not None and proposal.is_only(i)]
    return PassRow(lane, draft, only, lane.row.session.n_held)


def lay_out(rows: Sequence[PassRow]) -> int:
    """Give rows their places, and say which of these need logits; tokens of them all."""
    n = n_used = 0
    for row in rows:
        row.places = range(n, n + 1 + len(row.draft))
        n = row.places.stop
        for j in range(len(row.places)):
            is_used = j not in row.only or row.lane.row.n_logprobs is not None
            row.at.append(n_used if is_used else None)
            n_used += is_used
        row.lane.ready = None
    return n


def find_masks(row: PassRow) -> None:
    """What may come at a row's places, and its draft as far as that may."""
    look_ahead = row.lane.row.look_ahead
    if not row.draft or look_ahead is None:
        row.masks = [None] * len(row.places)
        return
    try:
        row.masks = look_ahead.masks(row.draft, row.only)
    except BaseException as error:  # said when it is this token's turn
        found = contained(error)
        if row.at[0] is None:
            row.lane.error = found
    row.draft = row.draft[: max(0, len(row.masks) - 1)]


def mask_of_one(token: int, n_vocab: int) -> np.ndarray:
    """bool `[V]`: this token alone."""
    import numpy as np

    mask = np.zeros(n_vocab, bool)
    mask[token] = True
    return mask
