"""Changes of one projection as the kernels take them: of all rows, or each row of a batch has its
own, or none.

The kernels add (x a) s b to the base's product before they hand it on, and read what the changes
have: where a projection is several in one, as q, k and v are, each of these parts has its own ranks
and columns, filled up to the largest rank of any change, and no zeros beside them. Values of `b`
lie in the order in which they are read, in blocks of 16 columns. Scales are apart, so that both
matrices stay in 16 bits where the file has them so, or where that loses nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxkv.nn import kernels
from mlxkv.nn.lora import AdaptedLinear, LowRank, Part

BLOCK = 16

Piece = tuple[mx.array, mx.array, mx.array, int, int]
"""`a` `[r, in]`, `b` `[columns, r]` and scales `[r]` of some ranks, and the output rows that they
change: the first, and the one behind the last."""
Laid = tuple[mx.array, mx.array, mx.array]
"""`[1, ranks, in]`, `[1, values]` and scales `[1, ranks]` of a change."""


class Rows(Protocol):
    """Says the change of each row of the next step; another tuple where they are others."""

    of: tuple[int, ...]


def takes(base: nn.Module, change: LowRank, dtype: mx.Dtype) -> bool:
    """Whether the kernels take a change of a settled projection that computes in a dtype."""
    fits = change.a.ndim == 2 and change.a.shape[0] % 32 == 0
    fits = fits and change.b.shape[1] % (2 * BLOCK) == 0
    return fits and base.get("_weight") is not None and dtype == mx.float32


class KernelLinear(kernels.Settled, AdaptedLinear):
    """A projection whose change the kernels add.

    Args:
        base: see `takes`.
        change: as read: its matrices may be in 16 bits, and its scales are not in `b`.
    """

    def __init__(self, base: nn.Module, change: LowRank):
        nn.Module.__init__(self)
        self.base, self._weight = base, base["_weight"]
        parts = _common([change.own_parts], change.b.shape[1])
        self.lora_a, self.lora_b, self.scales = _laid_out(_pieces_of(change), parts)
        self._parts = tuple(parts)
        if change.factor is not None:
            self.factor = change.factor[None]
            if "bias" in base:
                self.shift = base["bias"] * (1 - self.factor)
        self.settle(is_hollow=True)

    def settle(self, *, is_hollow: bool = False) -> None:
        """Take the arrays, in 16 bits where that loses nothing; see `kernels.Settled`."""
        for name in () if is_hollow else ("lora_a", "lora_b"):
            self[name] = self[name].astype(_narrowest(self[name]))
            mx.eval(self[name])
        factor, shift = self.get("factor"), self.get("shift")
        arrays = self["lora_a"], self["lora_b"], factor, shift
        self._low = (*arrays, (0,), _numbers(self["_parts"]), self["scales"])

    @property
    def low(self) -> kernels.Low:
        """See `linear.Product`."""
        return self["_low"]

    def pieces(self) -> Iterator[Piece]:
        """What it adds, as it lies."""
        a, blocks, scales, at = self["lora_a"][0], self["lora_b"][0], self["scales"][0], 0
        for ranks, (rank, start, stop) in _ranked(self["_parts"]):
            n = -(-(stop - start) // BLOCK) * BLOCK
            b = blocks[at : at + n * rank].reshape(-1, rank, BLOCK).swapaxes(1, 2).flatten(0, 1)
            own = slice(*ranks)
            yield a[own], b[: stop - start], scales[own], start, stop
            at += n * rank

    def __call__(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        return kernels.linear(x, self["_weight"], norm, plus, low=self["_low"])

    def of_rows(self, x: mx.array, start: int, stop: int) -> mx.array:
        return self(x)[..., start:stop]


class RowsChange:
    """See the module.

    Args:
        adapted: the projection under each change; None for one that leaves it as it is.
        rows: of the step.

    Attributes:
        arrays: what it keeps.
    """

    def __init__(self, adapted: Sequence[KernelLinear | None], rows: Rows):
        some = [change for change in adapted if change is not None]
        counted = itertools.count()
        self._numbers = [-1 if change is None else next(counted) for change in adapted]
        self._rows, self._of = rows, None
        n_out = some[0]["_weight"][0].shape[0]
        parts = _common([change["_parts"] for change in some], n_out)
        laid = [_laid_out(list(change.pieces()), parts) for change in some]
        self._a, self._b, self._scales = (
            mx.concatenate(list(arrays)) for arrays in zip(*laid, strict=True)
        )
        self._factor = _joined([change.get("factor") for change in some], 1.0)
        self._shift = _joined([change.get("shift") for change in some], 0.0)
        self._parts = _numbers(parts)
        kept = (self._a, self._b, self._scales, self._factor, self._shift)
        self.arrays = [array for array in kept if array is not None]

    @property
    def low(self) -> kernels.Low:
        """What the kernels take for the next step."""
        if self._rows.of is not self._of:
            self._of = self._rows.of
            of = tuple([self._numbers[i] for i in self._of])
            arrays = self._a, self._b, self._factor, self._shift
            self._low = (*arrays, of, self._parts, self._scales)
        return self._low


def _pieces_of(change: LowRank) -> list[Piece]:
    a, b, scales = change.a.T, change.b.T, change.rank_scales()
    return [
        (a[slice(*ranks)], b[start:stop, slice(*ranks)], scales[slice(*ranks)], start, stop)
        for ranks, (_, start, stop) in _ranked(change.own_parts)
    ]


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


def _laid_out(pieces: Sequence[Piece], parts: Sequence[Part]) -> Laid:
    """Pieces of one change, filled up to these parts."""
    laid = [_part(pieces, *part) for part in parts]
    a, b, scales = (mx.concatenate(list(arrays)) for arrays in zip(*laid, strict=True))
    return a[None], b[None], scales[None]


def _part(pieces: Sequence[Piece], rank: int, start: int, stop: int) -> Laid:
    """Those of some output rows: `[rank, in]`, the values of `b`, and scales `[rank]`."""
    own = [piece for piece in pieces if start <= piece[3] and piece[4] <= stop]
    first_a, first_b, _, *_ = pieces[0]
    a = mx.concatenate([first_a[:0], *(piece[0] for piece in own)])
    columns = [mx.pad(b, [(at - start, stop - end), (0, 0)]) for _, b, _, at, end in own]
    b = mx.concatenate([mx.zeros((stop - start, 0), first_b.dtype), *columns], axis=1)
    scales = mx.concatenate([mx.zeros((0,)), *(piece[2] for piece in own)])
    missing = rank - a.shape[0]
    b = mx.pad(b, [(0, -(stop - start) % BLOCK), (0, missing)])
    blocks = mx.unflatten(b, 0, (-1, BLOCK)).swapaxes(1, 2)
    return mx.pad(a, [(0, missing), (0, 0)]), blocks.flatten(), mx.pad(scales, [(0, missing)])


def _ranked(parts: Sequence[Part]) -> Iterator[tuple[tuple[int, int], Part]]:
    """Parts, each behind its first rank and the one behind its last."""
    ends = itertools.pairwise(itertools.accumulate((n for n, *_ in parts), initial=0))
    return zip(ends, parts, strict=True)


def _numbers(parts: Sequence[Part]) -> tuple[int, ...]:
    """What the kernels take of parts: ranks and columns of each."""
    return tuple(n for ranks, (_, *columns) in _ranked(parts) for n in (*ranks, *columns))


def _narrowest(array: mx.array) -> mx.Dtype:
    """The smallest that holds all values."""
    for dtype in (mx.bfloat16, mx.float16) if array.dtype == mx.float32 else ():
        if mx.array_equal(array.astype(dtype).astype(array.dtype), array).item():
            return dtype
    return array.dtype


def _joined(arrays: Sequence[mx.array | None], neutral: float) -> mx.array | None:
    """Vectors `[1, N]` of all changes in one array, None as one of a number; None where all are."""
    some = next((array for array in arrays if array is not None), None)
    if some is None:
        return None
    full = mx.full(some.shape, neutral, some.dtype)
    return mx.concatenate([full if array is None else array for array in arrays])


def stacked(arrays: Sequence[Any], neutral: float) -> mx.array | None:
    """`_joined` of vectors `[N]`."""
    return _joined([None if array is None else array[None] for array in arrays], neutral)
