"""Tensors of a safetensors directory as `SourceTensor`s.

Tensors that a family renames, and experts that it stacks, are read from the files by blocks of
rows. A tensor that it computes otherwise is evaluated as a whole and freed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlxkv.base import regular
from mlxkv.checkpoint.quantization import Format
from mlxkv.errors import CheckpointError

from ..tensors import SAFETENSORS_DTYPES, matrix_shape

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}
NAMES = {kind: name for name, kind in SAFETENSORS_DTYPES.items()}


class Part(Protocol):
    """One stored array of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def row_step(self) -> int: ...
    def rows(self, start: int, stop: int) -> mx.array: ...


@dataclass(frozen=True, slots=True)
class FilePart:
    """An array in a file, from byte `offset` on; `kind` is safetensors' name of the dtype."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    kind: str

    @property
    def dtype(self) -> str:
        return NAMES[self.kind]

    @property
    def row_step(self) -> int:
        return 1

    def rows(self, start: int, stop: int) -> mx.array:
        _, columns = matrix_shape(self.shape)
        numpy_dtype = np.dtype(_NUMPY[self.kind])
        n = (stop - start) * columns
        try:
            with regular.open_file(self.file) as file:
                file.seek(self.offset + start * columns * numpy_dtype.itemsize)
                values = np.fromfile(file, dtype=numpy_dtype, count=n)
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read: {error.strerror}") from error
        if values.size != n:
            raise CheckpointError(f"{self.file}: truncated")
        array = mx.array(values.reshape(stop - start, columns))
        return array.view(mx.bfloat16) if self.kind == "BF16" else array


@dataclass(frozen=True, slots=True)
class StackedPart:
    """Arrays of one shape, such as experts, stacked along a new first dimension."""

    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def row_step(self) -> int:
        return 1

    def rows(self, start: int, stop: int) -> mx.array:
        n, _ = matrix_shape(self.parts[0].shape)  # rows of one
        found = [
            self.parts[i].rows(max(start - i * n, 0), min(stop - i * n, n))
            for i in range(start // n, -(-stop // n))
        ]
        return mx.concatenate(found) if len(found) > 1 else found[0]


@dataclass(frozen=True, slots=True)
class ComputedPart:
    """An array that a family computes from several.

    Attributes:
        compute: builds it, not evaluated: an array that is kept would keep its values.
    """

    shape: tuple[int, ...]
    dtype: str
    compute: Callable[[], mx.array]

    @property
    def row_step(self) -> int:
        return matrix_shape(self.shape)[0]

    def rows(self, start: int, stop: int) -> mx.array:
        return self.compute().reshape(matrix_shape(self.shape))[start:stop]


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """Plain values; see `SourceTensor`."""

    name: str
    origin: str
    part: Part
    quantization: Format | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    @property
    def dtype(self) -> str:
        return self.part.dtype

    @property
    def scale_dtype(self) -> str:
        return self.part.dtype

    @property
    def row_step(self) -> int:
        return self.part.row_step

    def rows(self, start: int, stop: int) -> mx.array:
        return self.part.rows(start, stop)

    def is_exact(self, scale_dtype: str) -> bool:
        raise NotImplementedError(f"{self.name} is not quantized")

    def quantized_rows(self, start: int, stop: int) -> tuple[mx.array, ...]:
        raise NotImplementedError(f"{self.name} is not quantized")


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight that MLX has quantized; see `SourceTensor`.

    Attributes:
        parts: weight, scales and (affine) biases.
        scale_dtype: of the scales, or to dequantize to where they are no floats.
    """

    name: str
    origin: str
    shape: tuple[int, ...]
    quantization: Format
    parts: tuple[Part, ...]
    scale_dtype: str

    @property
    def dtype(self) -> str:
        bits = self.quantization.bits
        return f"affine{bits}" if self.quantization.mode == "affine" else self.quantization.mode

    @property
    def row_step(self) -> int:
        return max(part.row_step for part in self.parts)

    def rows(self, start: int, stop: int) -> mx.array:
        """Dequantized in float32, so that rounding happens once."""
        weight, scales, *rest = self.quantized_rows(start, stop)
        biases = rest[0].astype(mx.float32) if rest else None
        return mx.dequantize(
            weight,
            scales.astype(mx.float32) if rest else scales,
            biases,
            self.quantization.group_size,
            self.quantization.bits,
            mode=self.quantization.mode,
            dtype=mx.float32,
        )

    def is_exact(self, scale_dtype: str) -> bool:
        return len(self.parts) == 2 or scale_dtype in (self.scale_dtype, "float32")

    def quantized_rows(self, start: int, stop: int) -> tuple[mx.array, ...]:
        return tuple(part.rows(start, stop) for part in self.parts)
