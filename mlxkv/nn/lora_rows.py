"""Several changes of one model in one step: each row of the batch has its own, or none.

The product with the base's weight is that of all rows together. The changes' matrices lie in one
array, filled up with zeros to the largest rank, and each row is multiplied by its own pair: of
projections in the kernels, with the base's product (`lora_kernel`).

Invariants:
- A step has one token a row. `RowChanges.at` says the change of each before the step's graph is
  built.
- A row without a change has the base's product, exactly: it is multiplied by zeros, in the kernels
  by nothing.
- A row's numbers never meet another row's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.nn import kernels
from mlxkv.nn.lora import (
    Adapted,
    AdaptedEmbedding,
    AdaptedExperts,
    AdaptedHeads,
    AdaptedLinear,
    AdaptedRouter,
    OfExperts,
)
from mlxkv.nn.lora_kernel import KernelLinear, RowsChange, stacked
from mlxkv.nn.moe import GatedExperts
from mlxkv.nn.tree import copied, merged

Pair = tuple[mx.array, mx.array]
"""`a [..., in, r]` and `b [..., r, out]` of a change."""


class RowChanges:
    """Which of `n` changes each row of the next step has.

    Attributes:
        of: the change of each row.
        at: the same, `[B]`.
        rows: their numbers, `[B]`: MLX would count them in every product.
        arrays: that all modules keep of the changes.
    """

    def __init__(self, n: int):
        self.n = n
        self.of: tuple[int, ...] = ()
        self.at = self.rows = mx.zeros((0,), mx.uint32)
        self.arrays: list[mx.array] = []

    def set(self, of: Sequence[int]) -> None:
        """Say the change of each row."""
        if (found := tuple(of)) != self.of:
            self.of, self.at = found, mx.array(found, mx.uint32)
            self.rows = mx.array([*range(len(found))], mx.uint32)

    def kept(self, array: mx.array) -> mx.array:
        """An array that counts as memory."""
        self.arrays.append(array)
        return array

    def stacked(self, arrays: Sequence[mx.array | None], axis: int = 0) -> mx.array:
        """Arrays of all changes in one, filled up with zeros to one shape; None for zeros."""
        some = [array for array in arrays if array is not None]
        shape = [max(sizes) for sizes in zip(*(array.shape for array in some), strict=True)]
        filled = []
        for array in arrays:
            if array is None:
                filled.append(mx.zeros(shape, some[0].dtype))
            else:
                more = [(0, n - m) for n, m in zip(shape, array.shape, strict=True)]
                filled.append(mx.pad(array, more))
        return mx.stack(filled, axis=axis)


class Matrices:
    """A matrix `[in, out]` of each change, of which each row takes its own; None for zeros."""

    def __init__(self, arrays: Sequence[mx.array | None], changes: RowChanges):
        self._changes = changes
        stack = changes.stacked(arrays).swapaxes(-1, -2)
        self._stack = changes.kept(mx.contiguous(stack))  # [n, out, in], as weights are kept
        self._weight = kernels.weight({"weight": self._stack})

    def __call__(self, x: mx.array) -> mx.array:
        """`[B, 1, in]` -> `[B, 1, out]`."""
        at = self._changes.at
        if self._weight is not None and x.dtype == mx.float32:
            return kernels.experts(x, self._weight, at[:, None, None]).squeeze(-2)
        return gathered(x, self._stack.swapaxes(-1, -2), at, self._changes.rows)


def gathered(
    x: mx.array,
    matrices: mx.array,
    at: mx.array,
    rows: mx.array | None = None,
    in_order: bool = False,
) -> mx.array:
    """Products `[..., 1, out]` of rows `[..., 1, in]` with the matrices `[N, in, out]` at `at`.

    `rows` are the numbers of x's rows, where they are at hand; `in_order` says that `at` is sorted.
    """
    if device.on_cpu() and x.dtype != mx.float32:  # MLX gathers no other dtype there
        return x @ matrices[at]
    return mx.gather_mm(x, matrices, rows, at, sorted_indices=in_order)


class LowRanks:
    """(x a) b with the pair of each row."""

    def __init__(self, pairs: Sequence[Pair | None], changes: RowChanges):
        self._a = Matrices([None if pair is None else pair[0] for pair in pairs], changes)
        self._b = Matrices([None if pair is None else pair[1] for pair in pairs], changes)

    def __call__(self, x: mx.array) -> mx.array:
        """`[B, 1, in]` -> `[B, 1, out]`, or both without the axis of the token."""
        if x.ndim == 2:
            return self(x[:, None])[:, 0]
        return self._b(self._a(x))


class RowsLinear(nn.Module):
    """A projection, see `lora.AdaptedLinear`.

    Args:
        base: the projection.
        adapted: it under each change; None for one that leaves it as it is.
        changes: of the step.
    """

    def __init__(
        self, base: nn.Module, adapted: Sequence[AdaptedLinear | None], changes: RowChanges
    ):
        super().__init__()
        self.base, self._changes, self._in_kernels = base, changes, None
        if any(isinstance(change, KernelLinear) for change in adapted):  # or none of them
            self._weight = base["_weight"]
            own = cast("Sequence[KernelLinear | None]", adapted)
            self._in_kernels = RowsChange(own, changes)
            changes.arrays += self._in_kernels.arrays
            return
        pairs = [None if c is None else (c["lora_a"].T, c["lora_b"].T) for c in adapted]
        self._low = LowRanks(pairs, changes)
        for name, neutral in (("factor", 1.0), ("shift", 0.0)):
            found = [None if c is None else c.get(name) for c in adapted]
            if (rows := stacked(found, neutral)) is not None:
                self[name] = changes.kept(rows[:, None])  # [n, 1, out]

    @property
    def low(self) -> kernels.Low | None:
        """See `linear.Product`."""
        return None if self._in_kernels is None else self._in_kernels.low

    def __call__(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        if self._in_kernels is not None:
            return kernels.linear(x, self["_weight"], norm, plus, low=self._in_kernels.low)
        base: Any = self["base"]
        x = x if norm is None else norm(x)
        if "factor" in self:
            y = self._scaled(base(x)) + self._low(x)
            return y if plus is None else plus + y
        return (base(x) if plus is None else base(x, plus=plus)) + self._low(x)

    def of_rows(self, x: mx.array, start: int, stop: int) -> mx.array:
        """The product with some of the output rows."""
        if self._in_kernels is not None:
            return self(x)[..., start:stop]
        base: Any = self["base"]
        y = base.of_rows(x, start, stop)
        if "factor" in self:
            y = self._scaled(y, slice(start, stop))
        return y + self._low(x)[..., start:stop]

    def _scaled(self, y: mx.array, rows: slice = slice(None)) -> mx.array:
        at = self._changes.at
        y = y * self["factor"][at][..., rows]
        return y + self["shift"][at][..., rows] if "shift" in self else y


class RowsEmbedding(nn.Module):
    """An embedding, see `lora.AdaptedEmbedding`; arguments as for `RowsLinear`."""

    def __init__(
        self, base: nn.Module, adapted: Sequence[AdaptedEmbedding | None], changes: RowChanges
    ):
        super().__init__()
        self.base, self._changes = base, changes
        self._head = self._b = None
        head, rows = (_pairs_of(adapted, kind) for kind in ("head", "lora"))
        if any(head):
            self._head = LowRanks(head, changes)
        if any(rows):
            a = changes.stacked([None if pair is None else pair[0] for pair in rows])
            self._n_tokens = a.shape[1]
            self.lora_a = changes.kept(a.flatten(0, 1))  # [n V, r]
            self._b = Matrices([None if pair is None else pair[1] for pair in rows], changes)

    def __call__(self, tokens: mx.array) -> mx.array:
        base: Any = self["base"]
        y = base(tokens)
        if self._b is None:
            return y
        own = self._changes.at[:, None] * self._n_tokens + tokens
        return y + self._b(self["lora_a"][own])

    def as_linear(self, x: mx.array) -> mx.array:
        base: Any = self["base"]
        y = base.as_linear(x)
        return y if self._head is None else y + self._head(x)


def _pairs_of(adapted: Sequence[AdaptedEmbedding | None], kind: str) -> list[Pair | None]:
    a, b = f"{kind}_a", f"{kind}_b"
    return [None if c is None or a not in c else (c[a], c[b]) for c in adapted]


class RowsRouter(nn.Module):
    """A router of experts, see `lora.AdaptedRouter`; arguments as for `RowsLinear`."""

    def __init__(self, base: nn.Module, adapted: Sequence[Adapted | None], changes: RowChanges):
        super().__init__()
        self.base = base
        self._low = LowRanks(_pairs(adapted), changes)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        base: Any = self["base"]
        wide = x.astype(mx.float32)
        return base.chosen(wide @ base["weight"].T + self._low(wide), x.dtype)


class RowsHeads(nn.Module):
    """A matrix for each head, see `lora.AdaptedHeads`; arguments as for `RowsLinear`."""

    def __init__(self, base: nn.Module, adapted: Sequence[Adapted | None], changes: RowChanges):
        super().__init__()
        self.base, self._changes = base, changes
        for name, i in (("lora_a", 0), ("lora_b", 1)):
            arrays = [None if pair is None else pair[i] for pair in _pairs(adapted)]
            self[name] = changes.kept(changes.stacked(arrays))  # [n, H or 1, in, r]

    def __call__(self, x: mx.array) -> mx.array:
        base: Any = self["base"]
        a, b = (self[name][self._changes.at] for name in ("lora_a", "lora_b"))
        return base(x) + (x @ a) @ b

    def back(self, x: mx.array) -> mx.array:
        """The product with the transposed matrices."""
        base: Any = self["base"]
        a, b = (self[name][self._changes.at] for name in ("lora_a", "lora_b"))
        return base.back(x) + (x @ b.swapaxes(-1, -2)) @ a.swapaxes(-1, -2)


class RowsExperts(OfExperts):
    """The projection of a layer's experts, see `moe.ExpertLinear`.

    `indices` are those of experts and changes in one: `expert * n + change`, so that rows in the
    order of these are in the order of experts as well.
    """

    def __init__(self, base: nn.Module, adapted: Sequence[Adapted | None], changes: RowChanges):
        super().__init__()
        self.base, self._n = base, changes.n
        if any(change is not None for change in adapted):
            for name, i in (("lora_a", 0), ("lora_b", 1)):
                arrays = [None if pair is None else pair[i] for pair in _pairs(adapted)]
                stack = changes.stacked(arrays, axis=1)  # [E, n, in, r]
                self[name] = changes.kept(stack.flatten(0, 1))

    def __call__(self, x: mx.array, indices: mx.array, in_order: bool = False) -> mx.array:
        base: Any = self["base"]
        y = base(x, indices // self._n, in_order)
        if "lora_a" not in self:
            return y
        for name in ("lora_a", "lora_b"):
            x = gathered(x, self[name], indices, in_order=in_order)
        return y + x

    def of(self, expert: int, x: mx.array) -> mx.array:
        """The product `[N, out]` of rows `[N, in]` of one expert and change."""
        base: Any = self["base"]
        y = base.of(expert // self._n, x)
        return (
            y if "lora_a" not in self else y + x @ self["lora_a"][expert] @ self["lora_b"][expert]
        )


class RowsGatedExperts(GatedExperts):
    """A layer's experts, each row under its own change; made by `merge_changes`."""

    _changes: RowChanges

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        at = self._changes.at[:, None, None]
        return super().__call__(x, indices * self._changes.n + at)


def _pairs(adapted: Sequence[Adapted | None]) -> list[Pair | None]:
    return [None if c is None else (c["lora_a"], c["lora_b"]) for c in adapted]


KINDS: tuple[tuple[type[Adapted], Any], ...] = (
    (AdaptedLinear, RowsLinear),
    (AdaptedEmbedding, RowsEmbedding),
    (AdaptedRouter, RowsRouter),
    (AdaptedHeads, RowsHeads),
    (AdaptedExperts, RowsExperts),
)


def merge_changes(models: Sequence[Any], changes: RowChanges) -> Any:
    """One model for rows of several, with memory only for the matrices of their changes.

    Args:
        models: the base, and copies of it in which `Adapted` modules stand in places of others; of
            these and of the base, row i of a step takes number `changes.at[i]`.
        changes: of as many as there are models.
    """

    def merge(nodes: Sequence[Any]) -> nn.Module | None:
        base, adapted = nodes[0], [n if isinstance(n, Adapted) else None for n in nodes]
        if isinstance(base, GatedExperts):
            return _gated(nodes, changes)
        kind = next((rows for old, rows in KINDS if any(isinstance(a, old) for a in adapted)), None)
        return None if kind is None else kind(base, adapted, changes)

    return merged(models, merge, {})


def _gated(nodes: Sequence[Any], changes: RowChanges) -> GatedExperts:
    """A layer's experts, all of whose projections take the indices of changes as well."""
    made = copied(nodes[0], RowsGatedExperts)
    made._changes = changes
    for name, part in nodes[0].children().items():
        adapted = [n[name] if isinstance(n[name], Adapted) else None for n in nodes]
        made[name] = RowsExperts(part, adapted, changes)
    made.settle()
    return made
