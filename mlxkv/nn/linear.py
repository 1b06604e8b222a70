"""Projections and embeddings, dense and quantized.

On a GPU these are MLX's own, on the CPU backend those of `kernels`. Where there are none, MLX runs
a product on one core: its output rows are divided over the cores here, and from a few rows on a
quantized weight is dequantized for it. docs/design.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.nn import kernels

DENSE_ROWS = 4
"""Rows from which the dense product on a dequantized weight is faster than the quantized one, where
an OpenBLAS serves it."""

SPLIT_ROWS = 256
"""Output rows below which a product is not worth a second core."""

_Arrays = Sequence[mx.array | None]


class Quantizable(nn.Module):
    """A module that `nn.quantize` can replace."""

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> Any:
        return self._quantized(group_size or 64, bits or 4, mode)

    def _quantized(self, group_size: int, bits: int, mode: str) -> nn.Module:
        """The module on quantized weights."""
        raise NotImplementedError


class QuantizedStack(nn.Module):
    """The quantized form of a module with one matrix for each head or expert, `[N, out, in]`."""

    def __init__(self, module: nn.Module, group_size: int, bits: int, mode: str):
        nn.Module.__init__(self)
        self.group_size, self.bits, self.mode = group_size, bits, mode
        arrays = mx.quantize(module["weight"], group_size=group_size, bits=bits, mode=mode)
        # The formats other than affine have no biases beside their scales.
        for name, array in zip(("weight", "scales", "biases"), arrays, strict=False):
            self[name] = array
        if "bias" in module:
            self.bias = module["bias"]
        self.freeze()


class Product(kernels.Settled, nn.Module):
    """A product x W^T whose output rows can be divided over the cores.

    `norm(x) W^T + b + plus` is one operation of the kernels, where they are.

    Attributes:
        low: what changes its rows in the kernels; see `lora_rows.RowsLinear`.
    """

    low: kernels.Low | None = None

    def settle(self, *, is_hollow: bool = False) -> None:
        """Take what is loaded for the kernels, or divide it over the cores."""
        found = kernels.weight(self, is_hollow=is_hollow)
        if found is None:
            self._split()
        else:
            self._weight = found

    def _split(self) -> None:
        """Divide the weight's rows over the cores, as views of what is loaded."""
        n_rows = self["weight"].shape[0]
        streams = device.core_streams()[: n_rows // SPLIT_ROWS]
        if len(streams) < 2:
            return
        shares = device.shares(n_rows, streams)
        parts = tuple((stream, self._rows(start, stop)) for stream, start, stop in shares)
        mx.eval([array for _, arrays in parts for array in arrays if array is not None])
        self._parts = parts

    def of_rows(self, x: mx.array, start: int, stop: int) -> mx.array:
        """The product with some of the output rows."""
        x = self._part(x, self._rows(start, stop), None)
        return x + self["bias"][start:stop] if "bias" in self else x

    def _product(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        """norm(x) W^T + b + plus, with all output rows, on the CPU backend."""
        if "_weight" in self and x.dtype == mx.float32:
            return kernels.linear(x, self["_weight"], norm, plus)
        if norm is not None:
            x = norm(x)
        parts = self.get("_parts")
        if parts is None:
            x = self._part(x, self._whole(), None)
        else:
            x = mx.concatenate([self._part(x, part, stream) for stream, part in parts], axis=-1)
        x = x + self["bias"] if "bias" in self else x
        return x if plus is None else plus + x

    def _whole(self) -> _Arrays:
        """The arrays of all output rows; no views, which take time in every step."""
        raise NotImplementedError

    def _rows(self, start: int, stop: int) -> _Arrays:
        """Views of the arrays of these output rows."""
        raise NotImplementedError

    def _part(self, x: mx.array, arrays: _Arrays, stream: mx.Stream | None) -> mx.array:
        """The product with these arrays."""
        raise NotImplementedError


class _Dense(Product, Quantizable):
    def _product(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        if device.on_cpu():
            return super()._product(x, norm, plus)
        if norm is not None:
            x = norm(x)
        w = self["weight"].T
        x = mx.addmm(self["bias"], x, w) if "bias" in self else x @ w
        return x if plus is None else plus + x

    def _whole(self) -> _Arrays:
        return [self["weight"].T]

    def _rows(self, start: int, stop: int) -> _Arrays:
        # Transposed here: in the step it would make another stream wait.
        return [self["weight"][start:stop].T]

    def _part(self, x: mx.array, arrays: _Arrays, stream: mx.Stream | None) -> mx.array:
        (columns,) = arrays
        assert columns is not None
        return mx.matmul(x, columns, stream=stream)


class _Packed(Product):
    group_size: int
    bits: int
    mode: str

    def _product(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        if device.on_cpu():
            return super()._product(x, norm, plus)
        # As few calls as can be: each layer of a GPU's step calls this four times.
        if norm is not None:
            x = norm(x)
        product = mx.quantized_matmul(
            x,
            self["weight"],
            scales=self["scales"],
            biases=self.get("biases"),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        if product.dtype != x.dtype:
            product = product.astype(x.dtype)
        if "bias" in self:
            product = product + self["bias"]
        return product if plus is None else plus + product

    def _whole(self) -> _Arrays:
        return self["weight"], self["scales"], self.get("biases")

    def _rows(self, start: int, stop: int) -> _Arrays:
        return [None if array is None else array[start:stop] for array in self._whole()]

    def _part(self, x: mx.array, arrays: _Arrays, stream: mx.Stream | None) -> mx.array:
        weight, scales, biases = arrays
        assert weight is not None and scales is not None
        kind = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        if not _dense_is_faster() or x.size // x.shape[-1] < DENSE_ROWS:
            product = mx.quantized_matmul(
                x, weight, scales=scales, biases=biases, transpose=True, stream=stream, **kind
            )
            return product.astype(x.dtype, stream=stream)
        dtype = product_dtype(x.dtype, scales)
        dense = mx.dequantize(
            weight, scales=scales, biases=biases, dtype=dtype, stream=stream, **kind
        )
        product = mx.matmul(x, mx.transpose(dense, stream=stream), stream=stream)
        return product.astype(x.dtype, stream=stream)


class Linear(_Dense, nn.Linear):
    """x W^T + b; see `Product`."""

    __call__ = _Dense._product  # pyright: ignore[reportAssignmentType] of any base: one call less

    def _quantized(self, group_size: int, bits: int, mode: str) -> nn.Module:
        return QuantizedLinear.from_linear(self, group_size, bits, mode)


class QuantizedLinear(_Packed, nn.QuantizedLinear):
    """`Linear` on a quantized weight."""

    __call__ = _Packed._product  # pyright: ignore[reportAssignmentType] of any base: one call less


class Embedding(_Dense, nn.Embedding):
    """A row per token; `as_linear` is the tied head.

    Attributes:
        compute_dtype: of the rows, where the weight is kept in another; the loader sets it.
    """

    compute_dtype: mx.Dtype | None = None

    def __call__(self, x: mx.array) -> mx.array:
        rows = nn.Embedding.__call__(self, x)
        return rows if self.compute_dtype is None else rows.astype(self.compute_dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._product(x)

    def _quantized(self, group_size: int, bits: int, mode: str) -> nn.Module:
        return QuantizedEmbedding.from_embedding(self, group_size, bits, mode)


class QuantizedEmbedding(_Packed, nn.QuantizedEmbedding):
    """`Embedding` on a quantized weight.

    Attributes:
        compute_dtype: of the rows; the loader sets it. Without float scales MLX gives bfloat16, in
            which Gemma's factor on the embedding would be rounded.
    """

    compute_dtype: mx.Dtype | None = None

    def settle(self, *, is_hollow: bool = False) -> None:
        """Keep scales for the kernels in 16 bits, if that loses nothing: a head reads them all."""
        is_exact = self.compute_dtype is not None and self.compute_dtype == mx.float32
        if is_exact and not is_hollow and kernels.takes(self):
            for name, array in kernels.narrowed(self["scales"], self.get("biases")).items():
                self[name] = array
        super().settle(is_hollow=is_hollow)
        if is_exact and self.mode == "affine" and self.get("_weight") is not None:
            # With all biases: a row is then the same number by number.
            w, scales, _, kind, group, _ = self._weight
            self._own_rows = w, scales, self["biases"], kind, group, None

    def __call__(self, x: mx.array) -> mx.array:
        if "_own_rows" in self:
            dim = self["scales"].shape[-1] * self.group_size
            if (rows := kernels.embedded(x, self["_own_rows"], dim)) is not None:
                return rows
        scales, biases = self["scales"][x], self.get("biases")
        biases = None if biases is None else biases[x]
        if self.compute_dtype == mx.float32 and mx.issubdtype(scales.dtype, mx.floating):
            # Kept in 16 bits for the kernels: rows must not be rounded to them.
            scales = scales.astype(mx.float32)
            biases = None if biases is None else biases.astype(mx.float32)
        kind = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        rows = mx.dequantize(self["weight"][x], scales=scales, biases=biases, **kind)
        return rows if self.compute_dtype is None else rows.astype(self.compute_dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._product(x)


def product_dtype(dtype: mx.Dtype, scales: mx.array) -> mx.Dtype:
    """The dtype that MLX computes a product of rows in `dtype` with a quantized weight in.

    float32 where affine scales are: 16 bits would lose digits that the loader has kept.
    """
    return mx.result_type(dtype, scales) if mx.issubdtype(scales.dtype, mx.floating) else dtype


def _dense_is_faster() -> bool:
    return device.on_cpu() and device.load_blas() is not None


def fused(parts: Sequence[nn.Module]) -> nn.Module | None:
    """One projection with the rows of `parts`; None where formats, dtypes or biases differ."""
    first = parts[0]
    names = set(first.parameters())
    if any(type(part) is not type(first) or set(part.parameters()) != names for part in parts):
        return None
    settings = ("group_size", "bits", "mode")
    if len({tuple(part.__dict__.get(key) for key in settings) for part in parts}) > 1:
        return None
    if len({(name, part[name].dtype) for part in parts for name in names}) != len(names):
        return None
    whole = _shallow(first)
    for name in names:
        # Rows are the last axis but one: the first may count experts.
        axis = -1 if name == "bias" else -2
        whole[name] = mx.concatenate([part[name] for part in parts], axis=axis)
    return whole


def with_rows(module: nn.Module, rows: mx.array) -> nn.Module:
    """A projection with these rows of another, in their order."""
    found = _shallow(module)
    for name in module.parameters():
        found[name] = mx.take(module[name], rows, axis=-1 if name == "bias" else -2)
    return found


def _shallow(module: nn.Module) -> Any:
    """A copy of a projection without its arrays."""
    copy = type(module).__new__(type(module))
    nn.Module.__init__(copy)
    copy.__dict__.update(module.__dict__)
    return copy
