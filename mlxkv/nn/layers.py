"""Blocks that two or more families share."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, ParamSpec, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.nn import kernels
from mlxkv.nn.linear import Linear, fused

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Fuse elementwise operations to one kernel on a GPU; on the CPU that needs a C++ compiler."""
    on_gpu = mx.compile(function, shapeless=True)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (function if device.on_cpu() else on_gpu)(*args, **kwargs)

    return call


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * mx.sigmoid(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh form of GELU: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return 0.5 * x * (1 + mx.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


def gelu(x: mx.array) -> mx.array:
    """The exact form of GELU: x * Phi(x)."""
    return x * (1 + mx.erf(x / 1.4142135623730951)) / 2


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: mx.maximum(x, 0),
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
    "sigmoid": mx.sigmoid,
    "tanh": mx.tanh,
}
"""`hidden_act` of config.json -> function; a family may map a name to another form."""


@dataclass(frozen=True, slots=True)
class Gate:
    """(gate, up) -> the input of a down projection.

    Args:
        function: computes it.
        act: how the kernels name it; None if they do not have it.
    """

    function: Callable[[mx.array, mx.array], mx.array]
    act: kernels.Act | None = None

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        return self.function(gate, up)


def gated(activation: str) -> Gate:
    """(gate, up) -> activation(gate) * up."""
    function = ACTIVATIONS[activation]
    return Gate(compiled(lambda gate, up: function(gate) * up), kernels.ACTS.get(activation))


def soft_cap(x: mx.array, cap: float | None) -> mx.array:
    """cap * tanh(x / cap), which lies within (-cap, cap); x without a cap."""
    return x if cap is None else _capped(x, cap)


@compiled
def _capped(x: mx.array, cap: float) -> mx.array:
    return mx.tanh(x / cap) * cap


def residual(x: mx.array, r: mx.array) -> mx.array:
    """x + r, clipped to float16's range, which the residual stream of Gemmas exceeds."""
    return _clipped_sum(x, r) if x.dtype == mx.float16 else x + r


@compiled
def _clipped_sum(x: mx.array, r: mx.array) -> mx.array:
    bound = 65504.0
    return mx.clip(x.astype(mx.float32) + r.astype(mx.float32), -bound, bound).astype(mx.float16)


class Prepared(nn.Module):
    """A block that transforms its loaded weights before its first forward pass."""

    def prepare(self) -> None:
        """Transform them; the loader calls this once."""
        raise NotImplementedError


class Fusing(Prepared):
    """A block with projections of one input, which `prepare` fuses where their formats allow it.

    If not all of them, then all but the last: values of a GGUF file may have more bits than queries
    and keys.
    """

    fusions: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Name of the fused product -> the checkpoint's names of its parts, in the result's order."""

    def prepare(self) -> None:
        for name, parts in self.fusions.items():
            for n in range(len(parts), 1, -1):
                whole = self.joined([self[part] for part in parts[:n]])
                if whole is None:
                    continue
                self._note_places(name, parts[:n])
                self[name] = whole
                for part in parts[:n]:
                    del self[part]
                break

    def _note_places(self, name: str, parts: Sequence[str]) -> None:
        if not all("weight" in self[part] for part in parts):
            return  # an encoder's, which no adapter changes
        sizes = [self[part]["weight"].shape[-2] for part in parts]
        bounds = itertools.pairwise((0, *itertools.accumulate(sizes)))
        places = [(part, name, *at) for part, at in zip(parts, bounds, strict=True)]
        self._places = (*self.get("_places", ()), *places)

    def place_of(self, part: str) -> tuple[str, int, int] | None:
        """Where the rows of a projection that was fused are: the name of the fused one, the first
        row and the one behind the last. None for one that was not."""
        places = self.get("_places", ())
        return next((tuple(place) for name, *place in places if name == part), None)

    def order_of(self, part: str) -> mx.array | None:
        """Which row of a projection each of the rows at its place was; None for all in order."""
        return None

    def joined(self, parts: Sequence[nn.Module]) -> nn.Module | None:
        """One projection with the rows of `parts`; None where that is not possible."""
        return fused(parts)

    def project(self, name: str, x: mx.array, norm: nn.Module | None = None) -> mx.array:
        """The parts' results of x, or of norm(x), side by side, `[B, L, sum of their sizes]`."""
        parts = self.fusions[name]
        if parts[-1] not in self:  # all of them are in the fused product
            return self[name](x) if norm is None else self[name](x, norm)
        products = [self[part] for part in (name, *parts) if part in self]
        if norm is not None and not all("_weight" in product for product in products):
            x, norm = norm(x), None
        # The kernels norm rows as they read them.
        apart = [product(x) if norm is None else product(x, norm) for product in products]
        return mx.concatenate(apart, axis=-1)

    def project_apart(self, name: str, x: mx.array, sizes: Sequence[int]) -> list[mx.array]:
        """The parts' results as arrays `[B, L, size]`, for norms and products.

        On a GPU these would copy a part of longer rows: parts of several rows are products of their
        own there.
        """
        bounds = list(itertools.accumulate(sizes))
        is_whole = self.fusions[name][-1] not in self
        if not is_whole or device.on_cpu() or x.size == x.shape[-1]:
            return list(mx.split(self.project(name, x), bounds[:-1], axis=-1))
        return [self[name].of_rows(x, *at) for at in itertools.pairwise((0, *bounds))]


def on_halves(function: Callable[[mx.array, mx.array], mx.array], rows: mx.array) -> mx.array:
    """An elementwise function of the first and the second half of each row, `[..., 2 n]`.

    Returns:
        `[..., n]`, dense on a GPU, where quantized products copy a row whose stride is not its
        length: half of a single row would keep the whole row's stride.
    """
    if device.on_cpu():
        return function(*mx.split(rows, 2, axis=-1))
    first, second = mx.split(mx.unflatten(rows, -1, (2, -1)), 2, axis=-2)
    return function(first, second).flatten(-2)


def split_heads(x: mx.array, n_heads: int) -> mx.array:
    """`[B, L, N * D]` -> `[B, N, L, D]`."""
    B, L, _ = x.shape
    if L == 1:  # one operation less to build in each layer of each step
        return x.reshape(B, n_heads, 1, -1)
    return x.reshape(B, L, n_heads, -1).transpose(0, 2, 1, 3)


def merge_heads(x: mx.array) -> mx.array:
    """`[B, N, L, D]` -> `[B, L, N * D]`."""
    B, _, L, _ = x.shape
    return x.reshape(B, 1, -1) if L == 1 else x.transpose(0, 2, 1, 3).flatten(-2)


class GatedMLP(Fusing):
    """down(activation(gate(x)) * up(x)).

    The projections map `dim` to `hidden_dim` values and back; `activation` is one of `ACTIVATIONS`.
    """

    fusions: ClassVar = {"gate_up_proj": ("gate_proj", "up_proj")}

    def __init__(self, dim: int, hidden_dim: int, activation: str, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim, bias=bias)
        self.up_proj = Linear(dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, dim, bias=bias)
        self._gated = gated(activation)

    def __call__(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        """The block of x, or of norm(x), plus `plus`."""
        gate, whole = self._gated, self.get("gate_up_proj")
        if whole is None:
            between = on_halves(gate.function, self.project("gate_up_proj", x, norm))
        elif "_weight" in whole and gate.act is not None and x.dtype == mx.float32:
            weight, low, down = whole["_weight"], whole.low, self["down_proj"]
            if "_weight" in down:
                lows = low, down.low
                return kernels.gated_mlp(x, weight, norm, down["_weight"], plus, gate.act, lows)
            between = kernels.linear(x, weight, norm, act=gate.act, low=low)
        else:
            between = on_halves(gate.function, whole(x, norm))
        return self["down_proj"](between, plus=plus)


class RMSNorm(kernels.Settled, nn.RMSNorm):
    """MLX's; `plus` is the residual stream, to which the result is added as by `residual`."""

    @property
    def scale(self) -> mx.array:
        """The factor on normed values."""
        return self["weight"]

    def __call__(self, x: mx.array, plus: mx.array | None = None) -> mx.array:
        if self.uses_kernels and x.dtype == mx.float32:
            return kernels.rms_norm(x, self["weight"], self.eps, plus)
        y = mx.fast.rms_norm(x, self["weight"], self.eps)
        return y if plus is None else residual(plus, y)


class OffsetRMSNorm(kernels.Settled, Prepared):
    """RMS norm whose weight is stored as its difference from 1, as Gemma's checkpoints do."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.eps = eps
        self._offset = 1.0

    def prepare(self) -> None:
        self.weight, self._offset = self.scale, 0.0

    @property
    def scale(self) -> mx.array:
        """The factor on normed values."""
        weight = self["weight"]
        if not self._offset:
            return weight
        # In float32: a 16-bit sum would lose digits.
        return (weight.astype(mx.float32) + self._offset).astype(weight.dtype)

    def __call__(self, x: mx.array, plus: mx.array | None = None) -> mx.array:
        if self.uses_kernels and x.dtype == mx.float32:
            return kernels.rms_norm(x, self.scale, self.eps, plus)
        y = mx.fast.rms_norm(x, self.scale, self.eps)
        return y if plus is None else residual(plus, y)


class NormedHeads(Fusing):
    """Attention that norms each head of its queries and keys, with weights `q_norm` and `k_norm`.

    All heads of the fused projection are normed at once without a weight, then multiplied by each
    head's weight: on a GPU separate norms of queries and keys would copy them, as parts of longer
    rows, and launch two norms and two rotations.
    """

    n_heads: int
    n_kv_heads: int

    def prepare(self) -> None:
        super().prepare()
        if "q_norm" in self:
            # No parameter: the memory plan counts those of the checkpoint.
            self._qk_norm = self._norm_weights()

    def normed(self, heads: mx.array, eps: float) -> tuple[mx.array, mx.array]:
        """Norm heads `[B, L, N, D]`, queries first, then keys.

        Returns:
            Queries and keys `[B, L, H + Hk, D]`, and all heads normed without a weight.
        """
        weights = self["_qk_norm"] if "_qk_norm" in self else self._norm_weights()
        plain = mx.fast.rms_norm(heads, None, eps)
        return plain[:, :, : weights.shape[0]] * weights, plain

    def _norm_weights(self) -> mx.array:
        """`[H + Hk, D]`."""
        parts = []
        for name, n_heads in (("q_norm", self.n_heads), ("k_norm", self.n_kv_heads)):
            norm = self[name]
            parts.append(mx.broadcast_to(norm.scale, (n_heads, norm.scale.shape[-1])))
        return mx.concatenate(parts)
