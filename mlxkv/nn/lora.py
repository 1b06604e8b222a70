"""Low-rank changes of projections, computed beside them: the weights stay as they are, packed ones
too.

    y = f (x W^T) + (x a) b + bias

LoRA (https://arxiv.org/abs/2106.09685) has no factor f. DoRA (https://arxiv.org/abs/2402.09353)
brings the rows of W + (a b)^T to given norms: f is the norm over the row's own, and is multiplied
into b as well. Scales are part of b, but in the kernels (`lora_kernel`). A module here stands in
the place of its base; its arrays are parameters, so that memory counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Part = tuple[int, int, int]
"""Ranks, and the output rows that they change: the first, and the one behind the last."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of one projection.

    Args:
        a: `[in, r]`; of experts or heads `[N, in, r]`.
        b: `[r, out]`; of experts or heads `[N, r, out]`.
        factor: of the base's product, `[out]`; None for 1.
        parts: of which it is made, in the ranks' order, with zeros for other output rows; () for
            one that changes all rows.
        scales: of the parts, with which `b` is still to be multiplied; () for 1.
    """

    a: mx.array
    b: mx.array
    factor: mx.array | None = None
    parts: tuple[Part, ...] = ()
    scales: tuple[float, ...] = ()

    @property
    def own_parts(self) -> tuple[Part, ...]:
        """`parts`, of which there is one at least."""
        return self.parts or ((self.b.shape[-2], 0, self.b.shape[-1]),)

    @property
    def own_scales(self) -> tuple[float, ...]:
        """`scales`, one for each of `own_parts`."""
        return self.scales or (1.0,) * len(self.own_parts)

    def rank_scales(self) -> mx.array:
        """The scale of each rank, float32 `[r]`."""
        parts = zip(self.own_parts, self.own_scales, strict=True)
        return mx.array([scale for (rank, *_), scale in parts for _ in range(rank)], mx.float32)

    def folded(self) -> LowRank:
        """The same in float32, with the scales in `b`."""
        a, b = self.a.astype(mx.float32), self.b.astype(mx.float32)
        b = b * self.rank_scales()[:, None] if self.scales else b
        return replace(self, a=a, b=b, scales=())

    def within(self, start: int, n_rows: int) -> LowRank:
        """The change of a projection of `n_rows`, of which it changes those from `start` on."""
        after = n_rows - start - self.b.shape[-1]
        if not (start or after):
            return self
        b = mx.pad(self.b, [*[(0, 0)] * (self.b.ndim - 1), (start, after)])
        factor = self.factor
        if factor is not None:
            factor = mx.pad(factor, [(start, after)], constant_values=1)
        parts = ((b.shape[-2], start, n_rows - after),)
        return LowRank(self.a, b, factor, parts, self.scales)


def total(changes: Sequence[LowRank]) -> LowRank:
    """The sum of what changes of one projection add to its weight."""
    if len(changes) == 1:
        return changes[0]
    factors = [change.factor - 1 for change in changes if change.factor is not None]
    return LowRank(
        mx.concatenate([change.a for change in changes], axis=-1),
        mx.concatenate([change.b for change in changes], axis=-2),
        1 + sum(factors[1:], factors[0]) if factors else None,
        tuple([part for change in changes for part in change.own_parts]),
        tuple([scale for change in changes for scale in change.own_scales]),
    )


def dora(weight: mx.array, change: LowRank, magnitude: mx.array) -> LowRank:
    """DoRA's change.

    Args:
        weight: of the base, float32 `[out, in]`.
        change: the plain one, `LowRank.folded`.
        magnitude: norms of the rows of the sum, `[out]`.
    """
    norms = mx.linalg.norm(weight + (change.a @ change.b).T, axis=1)
    factor = magnitude.astype(mx.float32) / norms
    return LowRank(change.a, change.b * factor, factor)


class Adapted(nn.Module):
    """A module and its change.

    Args:
        base: what it stands for.
        change: in the dtype that is computed in.
    """

    def __init__(self, base: nn.Module, change: LowRank):
        super().__init__()
        self.base = base
        self.lora_a, self.lora_b = change.a, change.b

    def own_arrays(self) -> dict[str, mx.array]:
        """What it has beside its base."""
        return {name: array for name, array in self.items() if isinstance(array, mx.array)}

    @property
    def own_bytes(self) -> int:
        """Bytes of `own_arrays`."""
        return sum(array.nbytes for array in self.own_arrays().values())


class AdaptedLinear(Adapted):
    """A projection, see `linear.Product`; its matrices are kept as weights are, `[r, in]` and
    `[out, r]`."""

    def __init__(self, base: nn.Module, change: LowRank):
        a, b = mx.contiguous(change.a.T), mx.contiguous(change.b.T)
        super().__init__(base, LowRank(a, b))
        if change.factor is not None:
            self.factor = change.factor
            if "bias" in base:
                self.shift = base["bias"] * (1 - change.factor)

    def __call__(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        base: Any = self["base"]
        if norm is not None:
            x = norm(x)
        if "factor" in self:
            y = self._changed(self._scaled(base(x), slice(None)), x, self["lora_b"])
            return y if plus is None else plus + y
        y = base(x) if plus is None else base(x, plus=plus)
        return self._changed(y, x, self["lora_b"])

    def of_rows(self, x: mx.array, start: int, stop: int) -> mx.array:
        """The product with some of the output rows."""
        base: Any = self["base"]
        y = base.of_rows(x, start, stop)
        if "factor" in self:
            y = self._scaled(y, slice(start, stop))
        return self._changed(y, x, self["lora_b"][start:stop])

    def _scaled(self, y: mx.array, rows: slice) -> mx.array:
        y = y * self["factor"][rows]
        return y + self["shift"][rows] if "shift" in self else y

    def _changed(self, y: mx.array, x: mx.array, b: mx.array) -> mx.array:
        return mx.addmm(y, x @ self["lora_a"].T, b.T)


class AdaptedEmbedding(Adapted):
    """An embedding: `a` has a row for each token.

    Args:
        base: see `Adapted`.
        change: of the rows of tokens; None for none.
        head: of its product where it is the head as well, with `a` `[E, r]`; None for none.
    """

    def __init__(self, base: nn.Module, change: LowRank | None, head: LowRank | None):
        nn.Module.__init__(self)
        self.base = base
        if change is not None:
            self.lora_a, self.lora_b = change.a, change.b
        if head is not None:
            self.head_a, self.head_b = head.a, head.b

    def __call__(self, tokens: mx.array) -> mx.array:
        base: Any = self["base"]
        y = base(tokens)
        return y + self["lora_a"][tokens] @ self["lora_b"] if "lora_a" in self else y

    def as_linear(self, x: mx.array) -> mx.array:
        base: Any = self["base"]
        y = base.as_linear(x)
        return mx.addmm(y, x @ self["head_a"], self["head_b"]) if "head_a" in self else y


class OfExperts(nn.Module):
    """What a block of experts asks of a projection, answered by the `base` that is changed."""

    @property
    def n_experts(self) -> int:
        return self["base"].n_experts

    @property
    def dense_rows(self) -> int:
        return self["base"].dense_rows

    @property
    def gathers(self) -> bool:
        return self["base"].gathers


class AdaptedExperts(OfExperts, Adapted):
    """The projection of a layer's experts, see `moe.ExpertLinear`."""

    def __call__(self, x: mx.array, indices: mx.array, in_order: bool = False) -> mx.array:
        base: Any = self["base"]
        return base(x, indices, in_order) + self._change(x, indices, in_order)

    def of(self, expert: int, x: mx.array) -> mx.array:
        """One expert's product `[N, out]` with rows `[N, in]`."""
        base: Any = self["base"]
        a, b = self["lora_a"][expert], self["lora_b"][expert]
        return mx.addmm(base.of(expert, x), x @ a, b)

    def _change(self, x: mx.array, indices: mx.array, in_order: bool) -> mx.array:
        for factor in (self["lora_a"], self["lora_b"]):
            x = mx.gather_mm(x, factor, rhs_indices=indices, sorted_indices=in_order)
        return x


class AdaptedSwitch(AdaptedExperts):
    """The same of mlx-lm's definitions, `mlx_lm.models.switch_layers.SwitchLinear`."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        base: Any = self["base"]
        y = base(x, indices, sorted_indices=sorted_indices)
        return y + self._change(x, indices, sorted_indices)


class AdaptedRouter(Adapted):
    """A router of experts, see `sigmoid_moe.Router`; its change is in float32."""

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        base: Any = self["base"]
        wide = x.astype(mx.float32)
        logits = mx.addmm(wide @ base["weight"].T, wide @ self["lora_a"], self["lora_b"])
        return base.chosen(logits, x.dtype)


class AdaptedHeads(Adapted):
    """A matrix for each head, see `latent_attention.HeadLinear`."""

    def __call__(self, x: mx.array) -> mx.array:
        base: Any = self["base"]
        return base(x) + (x @ self["lora_a"]) @ self["lora_b"]

    def back(self, x: mx.array) -> mx.array:
        """The product with the transposed matrices."""
        base: Any = self["base"]
        a, b = self["lora_a"].swapaxes(-1, -2), self["lora_b"].swapaxes(-1, -2)
        return base.back(x) + (x @ b) @ a
