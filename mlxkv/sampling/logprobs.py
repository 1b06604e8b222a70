"""Log-probabilities that a step tells beside its tokens: of the token, and of the likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlxkv.sampling.math import log_normalizer, log_probabilities, rows_of


@dataclass(frozen=True, slots=True)
class Told:
    """Log-probabilities of the rows that ask for them, of the model's own distribution.

    Args:
        asked: row -> how many of the likeliest tokens.
        ids: `[n, 1 + k]`, each row's token and the likeliest in no order.
        logprobs: `[n, 1 + k]`, theirs.
    """

    asked: dict[int, int]
    ids: mx.array
    logprobs: mx.array

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        """What to compute."""
        return self.ids, self.logprobs

    def by_row(self) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """Row -> its token's, and the likeliest tokens with theirs, the likeliest first."""
        ids = cast(list[list[int]], self.ids.tolist())
        logprobs = cast(list[list[float]], self.logprobs.tolist())
        found = {}
        for (row, n), tokens, values in zip(self.asked.items(), ids, logprobs, strict=True):
            top = sorted(zip(tokens[1:], values[1:], strict=True), key=lambda pair: -pair[1])
            found[row] = values[0], tuple(top[:n])
        return found


def tell(
    logits: mx.array,
    tokens: mx.array,
    asked: Sequence[int | None],
    normalizer: mx.array | None = None,
) -> Told | None:
    """What rows ask for; None where none does. Lazy.

    Args:
        logits: `[B, V]`.
        tokens: `[B]`, chosen.
        asked: how many of the likeliest tokens each row wants; None for nothing at all.
        normalizer: `log_normalizer(logits)`, where it is known already and all rows ask.
    """
    wanted = {i: n for i, n in enumerate(asked) if n is not None}
    if not wanted:
        return None
    rows = list(wanted)
    logits, ids = rows_of(logits, rows), rows_of(tokens, rows)[:, None].astype(mx.uint32)
    V = logits.shape[-1]
    n_top = min(max(wanted.values()), V)
    if n_top == 1:
        ids = mx.concatenate([ids, mx.argmax(logits, axis=-1, keepdims=True)], axis=-1)
    elif n_top:
        top = mx.argpartition(logits, kth=V - n_top, axis=-1)[:, V - n_top :]
        ids = mx.concatenate([ids, top], axis=-1)
    if normalizer is None:
        normalizer = log_normalizer(logits)
    return Told(wanted, ids, log_probabilities(logits, ids, normalizer))
