"""Tensors of a source, read by rows so that no tensor has to be in memory as a whole.

Every tensor counts as a matrix `[n_rows, columns]` of its last dimension; a vector is one row.
"""

from __future__ import annotations

import math
from typing import Protocol

import mlx.core as mx

from mlxkv.checkpoint.quantization import Format

SAFETENSORS_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32", "uint8": "U8",
}  # fmt: skip
"""MLX's names of the dtypes that may be stored -> those of safetensors."""


class SourceTensor(Protocol):
    """One tensor of the model, in any kind of source.

    Attributes:
        name: the Hugging Face name.
        origin: its name in the source.
        shape: of the values, also when they are quantized.
        dtype: as stored: an MLX dtype's name, or a ggml type's.
        quantization: its MLX format, if `quantized_rows` has it.
        scale_dtype: of the scales of `quantized_rows`.
        row_step: blocks of rows begin and end at multiples of it.
    """

    @property
    def name(self) -> str: ...
    @property
    def origin(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantization(self) -> Format | None: ...
    @property
    def scale_dtype(self) -> str: ...
    @property
    def row_step(self) -> int: ...

    def rows(self, start: int, stop: int) -> mx.array:
        """The values of these rows, `[stop - start, columns]`, float."""
        ...

    def quantized_rows(self, start: int, stop: int) -> tuple[mx.array, ...]:
        """Weight, scales and (affine) biases of these rows, in the layout of `mx.quantize`."""
        ...

    def is_exact(self, scale_dtype: str) -> bool:
        """Whether `quantized_rows`, with scales in this dtype, stand for the values of `rows`."""
        ...


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) < 2:
        return 1, math.prod(shape)
    return math.prod(shape[:-1]), shape[-1]
