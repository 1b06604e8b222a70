"""Log-probabilities that a step tells beside its tokens: of the token, and of the likeliest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from mlxkv.sampling.math import log_normalizer, log_probabilities, rows_of


@dataclass(frozen=True, slots=True)
class Told:
    """Log-probabilities of the rows that ask for them, of the model's own distribution.

    Args:
        asked: row -> how many of the likeliest tokens.
        ids: `[n, 1 + k + m]`, each row's token, the likeliest in no order, and those of `also`.
        logprobs: `[n, 1 + k + m]`, theirs.
        n_also: m; rows that name fewer tokens have others behind them.
        also: row -> how many tokens it names.
    """

    asked: dict[int, int]
    ids: mx.array
    logprobs: mx.array
    n_also: int = 0
    also: Mapping[int, int] = field(default_factory=dict)

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        """What to compute."""
        return self.ids, self.logprobs

    def by_row(self) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
        """Row -> its token's, and the likeliest tokens with theirs, the likeliest first; behind
        them those that it names."""
        ids = cast(list[list[int]], self.ids.tolist())
        logprobs = cast(list[list[float]], self.logprobs.tolist())
        found = {}
        for (row, n), tokens, values in zip(self.asked.items(), ids, logprobs, strict=True):
            pairs, end = list(zip(tokens, values, strict=True)), len(tokens) - self.n_also
            top = sorted(pairs[1:end], key=lambda pair: -pair[1])
            found[row] = values[0], (*top[:n], *pairs[end : end + self.also.get(row, 0)])
        return found


def tell(
    logits: mx.array,
    tokens: mx.array,
    asked: Sequence[int | None],
    normalizer: mx.array | None = None,
    also: Mapping[int, Sequence[int]] | None = None,
) -> Told | None:
    """What rows ask for; None where none does. Lazy.

    Args:
        logits: `[B, V]`.
        tokens: `[B]`, chosen.
        asked: how many of the likeliest tokens each row wants; None for nothing at all.
        normalizer: `log_normalizer(logits)`, where it is known already and all rows ask.
        also: row that asks -> tokens that it names, to be told as well.
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
    named = {row: also[row] for row in rows if also and also.get(row)}
    if n_also := max(map(len, named.values()), default=0):
        padded = [[*(of := named.get(row, ())), *[0] * (n_also - len(of))] for row in rows]
        ids = mx.concatenate([ids, mx.array(padded, mx.uint32)], axis=-1)
    if normalizer is None:
        normalizer = log_normalizer(logits)
    values = log_probabilities(logits, ids, normalizer)
    return Told(wanted, ids, values, n_also, {row: len(of) for row, of in named.items()})
