"""Tensors of a GGUF file as `SourceTensor`s, and ggml's quantization in MLX's layout."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.checkpoint.quantization import Format
from mlxkv.errors import WeightsError

from .. import float4
from ..tensors import matrix_shape
from .architecture import Rows
from .blocks import format_of, in_mlx_format, is_exact, nvfp4_parts, packed
from .file import GGUFFile, GGUFTensor, dequantize

MX_NAN = 0xFF
"""The NaN among MXFP4's scales."""


@dataclass(frozen=True, slots=True)
class GGUFWeight:
    """A tensor of a GGUF file, with the values and row order of the Hugging Face checkpoint.

    Attributes:
        head_dim: rows are permuted within heads of this many, for llama.cpp's RoPE; 0: not.
        added: the file's values minus the checkpoint's (1 for Gemma's norms).
        scale_dtype: see `SourceTensor`.
        part: which rows of the tensor it is; None for all of them.
        second: NVFP4's second scale, one for all or one for each matrix of the tensor.
    """

    file: GGUFFile
    tensor: GGUFTensor
    name: str
    head_dim: int = 0
    added: float = 0.0
    scale_dtype: str = "float16"
    part: Rows | None = None
    second: tuple[float, ...] = ()

    @property
    def origin(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.part is None else self.part.shape

    @property
    def dtype(self) -> str:
        plain = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
        return plain.get(self.tensor.type, self.tensor.type)

    @property
    def quantization(self) -> Format | None:
        is_plain = len(self.shape) < 2 or self.added
        return None if is_plain else float4.NEAREST if self.second else format_of(self.tensor.type)

    @property
    def row_step(self) -> int:
        return max(1, self.head_dim if len(self.shape) > 1 else 1)

    def stored(self, start: int, stop: int) -> np.ndarray:
        """The bytes of rows [start, stop) of the Hugging Face checkpoint."""
        stored = self._read(start, stop)
        is_permuted = self.head_dim and len(self.shape) > 1
        return unpermute(stored, self.head_dim) if is_permuted else stored

    def _read(self, start: int, stop: int) -> np.ndarray:
        """The bytes of these rows, in the file's order."""
        part, found = self.part, []
        if part is None:
            return self.file.read_rows(self.tensor, start, stop)
        while start < stop:
            block, at = divmod(start, part.count)
            n = min(stop - start, part.count - at)
            first = block * part.stride + part.offset + at
            found.append(self.file.read_rows(self.tensor, first, first + n))
            start += n
        return np.concatenate(found)

    def rows(self, start: int, stop: int) -> mx.array:
        values = dequantize(self.stored(start, stop), self.tensor.type)
        if self.head_dim and len(self.shape) == 1:
            values = unpermute(values.reshape(-1, 1), self.head_dim).reshape(1, -1)
        # Values of a damaged file may be NaN or infinite; the writer checks them.
        with np.errstate(all="ignore"):
            if self.added:
                values = values - np.float32(self.added)
            if self.second:
                values = values * self._seconds(start, stop)
        return mx.array(values)

    def is_exact(self, scale_dtype: str) -> bool:
        return not self.second and is_exact(self.tensor.type, scale_dtype)

    def _seconds(self, start: int, stop: int) -> np.ndarray:
        """The second scale of each row, float32 `[rows, 1]`."""
        seconds, n_rows = np.array(self.second, np.float32), matrix_shape(self.shape)[0]
        return seconds[np.arange(start, stop) * len(seconds) // n_rows, None]

    def quantized_rows(self, start: int, stop: int) -> tuple[mx.array, ...]:
        stored = self.stored(start, stop)
        if self.second:
            codes, scales = nvfp4_parts(stored)
            floats = float4.E4M3[scales] * self._seconds(start, stop)
            codes, *arrays = float4.nearest(codes, floats)
            words = packed(codes.reshape(-1), float4.NEAREST.bits).reshape(len(codes), -1)
            return tuple(map(mx.array, (words.view("<u4"), *arrays)))
        arrays = in_mlx_format(stored, self.tensor.type)
        if self.tensor.type == "MXFP4" and (arrays[1] == MX_NAN).any():
            raise WeightsError(f"{self.origin}: holds scales that are NaN: the file is damaged")
        return tuple(map(mx.array, arrays))


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a Llama GGUF's q or k back in Hugging Face's order.

    Per head, Hugging Face rotates row i with row i + D/2, llama.cpp row 2i with row 2i + 1, and
    its converter reorders the rows for that: `[2, D/2]` of each head became `[D/2, 2]`.
    """
    n_rows, width = rows.shape
    split = rows.reshape(n_rows // head_dim, head_dim // 2, 2, width)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(n_rows, width)
