"""Blocks of mixture-of-experts layers: one weight for all E experts, each row sent to its own.

Names and layouts are mlx-lm's `switch_mlp.{gate,up,down}_proj`: weights `[E, out, in]`, biases
`[E, out]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.nn import kernels
from mlxkv.nn.layers import Fusing, Gate, on_halves
from mlxkv.nn.linear import SPLIT_ROWS, Quantizable, QuantizedStack, product_dtype

SORTED_ROWS = 64
"""Rows (tokens x experts of each) from which they are sorted by expert: MLX's kernels read a weight
once for a block of rows that share it. mlx-lm's figure."""

DENSE_ROWS_PER_EXPERT = {"none": 1, "affine": 3, "mxfp4": 7, "mxfp8": 2, "nvfp4": 24}
"""Mode -> rows of an average expert from which the CPU backend is faster with a dense product for
each expert, whose weight is dequantized first, where an OpenBLAS serves it; measured in
docs/design.md."""


class ExpertLinear(kernels.Settled, Quantizable):
    """x W_e^T + b_e, with e the expert of each row."""

    mode = "none"

    def settle(self, *, is_hollow: bool = False) -> None:
        if (found := kernels.weight(self, is_hollow=is_hollow)) is not None:
            self._weight = found

    def __init__(self, n_experts: int, in_dims: int, out_dims: int, bias: bool = False):
        super().__init__()
        self.weight = mx.zeros((n_experts, out_dims, in_dims))
        if bias:
            self.bias = mx.zeros((n_experts, out_dims))

    @property
    def n_experts(self) -> int:
        return self["weight"].shape[0]

    @property
    def dense_rows(self) -> int:
        """Rows of an average expert from which `of` is faster on the CPU backend."""
        return DENSE_ROWS_PER_EXPERT[self.mode]

    @property
    def gathers(self) -> bool:
        """Whether MLX has a gathering product for this weight on this device."""
        return self["weight"].dtype == mx.float32 or not device.on_cpu()

    def __call__(self, x: mx.array, indices: mx.array, in_order: bool = False) -> mx.array:
        """The product `[..., 1, out]` of each row with its expert's weight.

        Args:
            x: `[..., 1, in]`; the leading axes broadcast with those of `indices`.
            indices: expert of each row, `[...]`.
            in_order: whether `indices` is sorted.
        """
        x = self._gather(x, indices, in_order)
        return x + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else x

    def of(self, expert: int, x: mx.array) -> mx.array:
        """One expert's product `[N, out]` with rows `[N, in]`, on its dense weight."""
        x = (x @ self._dense(expert, x.dtype).T).astype(x.dtype)
        return x + self["bias"][expert] if "bias" in self else x

    def _quantized(self, group_size: int, bits: int, mode: str) -> nn.Module:
        return QuantizedExpertLinear(self, group_size, bits, mode)

    def _gather(self, x: mx.array, indices: mx.array, in_order: bool) -> mx.array:
        weight = self["weight"].swapaxes(-1, -2)
        return mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=in_order)

    def _dense(self, expert: int, dtype: mx.Dtype) -> mx.array:
        return _slice_of(self["weight"], expert)


class QuantizedExpertLinear(QuantizedStack, ExpertLinear):
    """`ExpertLinear` on quantized weights, in any of MLX's formats."""

    @property
    def gathers(self) -> bool:
        return True

    def _gather(self, x: mx.array, indices: mx.array, in_order: bool) -> mx.array:
        return mx.gather_qmm(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            rhs_indices=indices,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=in_order,
        ).astype(x.dtype)

    def _dense(self, expert: int, dtype: mx.Dtype) -> mx.array:
        weight, scales = _slice_of(self["weight"], expert), _slice_of(self["scales"], expert)
        if self.mode == "mxfp4":
            return _mxfp4_dense(weight, scales, dtype)
        biases = self.get("biases")
        return mx.dequantize(
            weight,
            scales=scales,
            biases=None if biases is None else _slice_of(biases, expert),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=product_dtype(dtype, scales),
        )


def _slice_of(array: mx.array, expert: int) -> mx.array:
    # A view; an integer index would copy the expert's weight.
    return array[expert : expert + 1].squeeze(0)


def _mxfp4_dense(weight: mx.array, scales: mx.array, dtype: mx.Dtype) -> mx.array:
    """`mx.dequantize`, bit for bit, in a third of its time on the CPU backend.

    Twice a 4-bit float is a whole number from -12 to 12; plus 12 it is an 8-bit affine code, which
    MLX dequantizes faster than MXFP4.
    """
    pairs = weight.view(mx.uint8)
    codes = mx.stack([_mxfp4_code(pairs & 15), _mxfp4_code(pairs >> 4)], axis=-1)
    steps = mx.power(2.0, scales.astype(mx.float32) - 128)
    codes = codes.flatten(-2).view(mx.uint32)
    return mx.dequantize(codes, steps, -12 * steps, group_size=32, bits=8).astype(dtype)


def _mxfp4_code(nibble: mx.array) -> mx.array:
    """Twice the value of a 4-bit float, plus 12, as uint8; the arithmetic wraps."""
    size = nibble & 7
    twice = size + mx.maximum(size, 4) + 2 * mx.maximum(size, 6) - 16
    return 12 + twice * (1 - 2 * (nibble >> 3))


class GatedExperts(kernels.Settled, Fusing):
    """down_e(activation(gate_e(x), up_e(x))) for each of a token's experts e.

    The projections map `dim` to `hidden_dim` values and back.

    Attributes:
        traced: only the graph is wanted (`memory.trace`): tokens are divided evenly over the
            experts, and a `stop_gradient` stands in place of each `mx.eval`.
    """

    fusions: ClassVar = {"gate_up_proj": ("gate_proj", "up_proj")}
    traced = False

    def __init__(
        self, n_experts: int, dim: int, hidden_dim: int, activation: Gate, bias: bool = False
    ):
        super().__init__()
        self.gate_proj = ExpertLinear(n_experts, dim, hidden_dim, bias)
        self.up_proj = ExpertLinear(n_experts, dim, hidden_dim, bias)
        self.down_proj = ExpertLinear(n_experts, hidden_dim, dim, bias)
        self._activation = activation

    def settle(self, *, is_hollow: bool = False) -> None:
        parts = self.children().values()
        self.uses_kernels = all("_weight" in part for part in parts)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """The results `[B, L, k, dim]` of the experts `[B, L, k]` of tokens `[B, L, dim]`."""
        if self.uses_kernels and x.dtype == mx.float32:
            return self._of_kernels(x, indices)
        if _one_at_a_time(self["down_proj"], indices.size):
            return self._one_by_one(x, indices)
        streams = device.core_streams()
        if len(streams) > 1 and x.shape[-1] >= SPLIT_ROWS:
            return self._divided(x, indices, streams)
        if indices.size >= SORTED_ROWS:
            return self._sorted(x, indices)
        return self._gathered(x, indices)

    def _of_kernels(self, x: mx.array, indices: mx.array) -> mx.array:
        gate, down = self._activation, self["down_proj"]["_weight"]
        whole = self.get("gate_up_proj")
        if whole is not None and gate.act is not None:
            between = kernels.experts(x, whole["_weight"], indices, gate.act)
        elif whole is not None:
            between = on_halves(gate.function, kernels.experts(x, whole["_weight"], indices))
        else:
            parts = (self[name]["_weight"] for name in self.fusions["gate_up_proj"])
            between = gate(*(kernels.experts(x, part, indices) for part in parts))
        return kernels.experts(between, down, indices)

    def _product(
        self, x: mx.array, multiply: Callable[[ExpertLinear, mx.array], mx.array]
    ) -> mx.array:
        if "gate_up_proj" in self:
            between = on_halves(self._activation.function, multiply(self["gate_up_proj"], x))
        else:
            gate, up = multiply(self["gate_proj"], x), multiply(self["up_proj"], x)
            between = self._activation(gate, up)
        return multiply(self["down_proj"], between)

    def _gathered(self, x: mx.array, indices: mx.array) -> mx.array:
        # Not by `expand_dims`, whose strides would have the product copy x.
        x = x.reshape(*x.shape[:-1], 1, 1, x.shape[-1])  # [B, L, 1, 1, dim]
        return self._product(x, lambda part, x: part(x, indices)).squeeze(-2)

    def _divided(self, x: mx.array, indices: mx.array, streams: tuple[mx.Stream, ...]) -> mx.array:
        """The experts of each token divided over the cores: MLX's CPU kernels run on one."""
        k = indices.shape[-1]
        parts = []
        for stream, start, stop in device.shares(k, streams[:k]):
            with mx.stream(stream):
                parts.append(self._gathered(x, indices[..., start:stop]))
        return mx.concatenate(parts, axis=-2)

    def _sorted(self, x: mx.array, indices: mx.array) -> mx.array:
        order, experts, x = _by_expert(x, indices)
        x = x.reshape(-1, 1, x.shape[-1])  # [B L k, 1, dim]; see `_gathered`
        x = self._product(x, lambda part, x: part(x, experts, in_order=True))
        return _in_token_order(x.squeeze(-2), order, indices)

    def _one_by_one(self, x: mx.array, indices: mx.array) -> mx.array:
        order, _, x = _by_expert(x, indices)
        if self.traced:
            x = self._evaluated(x)  # counting the rows waits for them
        results, stop = [], 0
        for expert, n in enumerate(self._rows_of_experts(indices)):
            if n == 0:
                continue
            start, stop = stop, stop + n
            rows = self._product(x[start:stop], lambda part, x, e=expert: part.of(e, x))
            # Now: only one expert's dequantized weight is alive at a time.
            results.append(self._evaluated(rows))
        return _in_token_order(mx.concatenate(results), order, indices)

    def _rows_of_experts(self, indices: mx.array) -> list[int]:
        if self.traced:
            experts = range(self["down_proj"].n_experts)
            return [stop - start for _, start, stop in device.shares(indices.size, experts)]
        import numpy as np

        return np.bincount(np.array(indices.flatten())).tolist()

    def _evaluated(self, rows: mx.array) -> mx.array:
        if self.traced:
            return mx.stop_gradient(rows)
        mx.eval(rows)
        return rows


def weighed(answers: mx.array, weights: mx.array) -> mx.array:
    """The sum of answers `[B, L, k, dim]` times weights `[B, L, k]`, as one product."""
    return (mx.expand_dims(weights, -2) @ answers).squeeze(-2)


def _one_at_a_time(part: ExpertLinear, n_rows: int) -> bool:
    if not part.gathers:
        return True
    few = n_rows < part.n_experts * part.dense_rows
    return not few and device.on_cpu() and device.load_blas() is not None


def _by_expert(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The order that sorts rows by expert; the experts `[B L k]` and rows `[B L k, dim]` in it."""
    experts = indices.flatten()  # once: it copies, as the chosen are a part of all experts
    order = mx.argsort(experts)
    return order, experts[order], x.reshape(-1, x.shape[-1])[order // indices.shape[-1]]


def _in_token_order(rows: mx.array, order: mx.array, indices: mx.array) -> mx.array:
    """Undo `_by_expert`: rows `[B L k, dim]` -> `[B, L, k, dim]`."""
    return rows[mx.argsort(order)].reshape(*indices.shape, rows.shape[-1])
