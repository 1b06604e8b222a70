"""Changes of one projection as the kernels take them: each row of a batch has its own, or none.

The kernels add (x a) b to the base's product before they hand it on, and read what the changes
have: where a projection is several in one, as q, k and v are, each of these parts has its own ranks
and columns, filled up to the largest rank of any change, and no zeros beside them. Values of `b`
lie in the order in which they are read, in blocks of 16 columns. Both are in 16 bits where that
loses nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import mlx.core as mx

from mlxkv.nn import kernels
from mlxkv.nn.lora import AdaptedLinear, Part

BLOCK = 16


class Rows(Protocol):
    """Says the change of each row of the next step; another tuple where they are others."""

    of: tuple[int, ...]


def takes(weight: kernels.Weight | None, adapted: Sequence[AdaptedLinear | None]) -> bool:
    """Whether the kernels take changes of a product with this weight."""
    some = next(change for change in adapted if change is not None)
    rows, columns = some["lora_b"].shape[0], some["lora_a"].shape[1]
    fits = rows % (2 * BLOCK) == 0 and columns % 32 == 0
    return weight is not None and fits and some["lora_a"].dtype == mx.float32


class RowsChange:
    """See the module.

    Args:
        adapted: the projection under each change; None for one that leaves it as it is.
        rows: of the step.

    Attributes:
        arrays: what it keeps.
    """

    def __init__(self, adapted: Sequence[AdaptedLinear | None], rows: Rows):
        some = [change for change in adapted if change is not None]
        counted = itertools.count()
        self._numbers = [-1 if change is None else next(counted) for change in adapted]
        self._rows, self._of = rows, None
        n_out = some[0]["lora_b"].shape[0]
        parts = _common([change.parts for change in some], n_out)
        pairs = [_laid_out(change, parts) for change in some]
        self._a, self._b = (
            mx.stack(list(arrays)).astype(_common_dtype([each.narrow_dtypes[i] for each in some]))
            for i, arrays in enumerate(zip(*pairs, strict=True))
        )
        self._factor = stacked([change.get("factor") for change in some], 1.0)
        self._shift = stacked([change.get("shift") for change in some], 0.0)
        self._parts = tuple(
            number for ranks, (_, *columns) in _ranked(parts) for number in (*ranks, *columns)
        )
        kept = (self._a, self._b, self._factor, self._shift)
        self.arrays = [array for array in kept if array is not None]

    @property
    def low(self) -> kernels.Low:
        """What the kernels take for the next step."""
        if self._rows.of is not self._of:
            self._of = self._rows.of
            of = tuple([self._numbers[i] for i in self._of])
            self._low = (self._a, self._b, self._factor, self._shift, of, self._parts)
        return self._low


def _common_dtype(dtypes: Sequence[mx.Dtype]) -> mx.Dtype:
    """One that holds the values of all."""
    return dtypes[0] if len(set(dtypes)) == 1 else mx.float32


def _common(found: Sequence[Sequence[Part]], n_out: int) -> list[Part]:
    """Parts that those of all changes fit into; one of all rows if they overlap."""
    ranks: dict[tuple[int, int], int] = {}
    for parts in found:
        for where in {part[1:] for part in parts}:
            n = sum(rank for rank, *own in parts if tuple(own) == where)
            ranks[where] = max(n, ranks.get(where, 0))
    starts = sorted(ranks)
    is_apart = all(before[1] <= after[0] for before, after in itertools.pairwise(starts))
    if is_apart and all(start % BLOCK == 0 for start, _ in starts):
        return [(ranks[where], *where) for where in starts]
    return [(max(sum(rank for rank, *_ in parts) for parts in found), 0, n_out)]


def _laid_out(change: AdaptedLinear, parts: Sequence[Part]) -> tuple[mx.array, mx.array]:
    """The matrices of one change `[ranks, in]` and `[values]`, filled up to these parts."""
    a, b = change["lora_a"], change["lora_b"]
    of_a, of_b = [], []
    own = list(_ranked(change.parts))
    for rank, start, stop in parts:
        ranges = [slice(*at) for at, (_, *where) in own if start <= where[0] and where[1] <= stop]
        rows = mx.concatenate([a[:0], *(a[at] for at in ranges)])
        columns = mx.concatenate([b[:, :0], *(b[:, at] for at in ranges)], axis=1)[start:stop]
        of_a.append(mx.pad(rows, [(0, rank - rows.shape[0]), (0, 0)]))
        more = [(0, -(stop - start) % BLOCK), (0, rank - columns.shape[1])]
        blocks = mx.unflatten(mx.pad(columns, more), 0, (-1, BLOCK))
        of_b.append(blocks.swapaxes(1, 2).flatten())
    return mx.concatenate(of_a), mx.concatenate(of_b)


def _ranked(parts: Sequence[Part]) -> Iterator[tuple[tuple[int, int], Part]]:
    """Parts, each behind its first rank and the one behind its last."""
    ends = itertools.pairwise(itertools.accumulate((n for n, *_ in parts), initial=0))
    return zip(ends, parts, strict=True)


def stacked(arrays: Sequence[mx.array | None], neutral: float) -> mx.array | None:
    """Vectors of all changes in one array, None as one of a number; None where all are None."""
    some = next((array for array in arrays if array is not None), None)
    if some is None:
        return None
    return mx.stack([mx.full(some.shape, neutral, some.dtype) if x is None else x for x in arrays])
