"""Drafted tokens, chosen as the answer's own sampler will choose at their places."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxkv.errors import contained
from mlxkv.generation.flight import Lane, history
from mlxkv.sampling.sampler import RowChoice, choose


class LaneChooser:
    """A row's `Chooser`: its sampler, penalties and format, with the random numbers of each place.

    Where a drafter's probabilities are close to the model's, the same numbers draw the same tokens.
    """

    def __init__(self, lane: Lane):
        self._lane, row = lane, lane.row
        self.reads_draft = (
            lane.before is not None or lane.answer is not None or row.look_ahead is not None
        )

    def __call__(self, logits: mx.array, n_before: int, draft: Sequence[int]) -> mx.array | None:
        lane, row, mask = self._lane, self._lane.row, None
        if row.look_ahead is not None:
            try:
                masks = row.look_ahead.masks(draft)
            except BaseException as error:  # its mask says what is wrong
                contained(error)
                return None
            if len(masks) <= n_before:
                return None
            mask = masks[n_before]
            assert not isinstance(mask, int), "no place was named as one of a single token"
            if mask is not None and not mask.any():
                return None
        barred = row.ends if lane.n_drawn + n_before < row.min_tokens else ()
        recent = history(lane, draft) if self.reads_draft else None
        choice = RowChoice(row.sampler, recent, mask, barred, ahead=n_before)
        return choose(logits, {0: choice})[0][1]
