"""What a checkpoint stores under its own names: arrays of files, and weights of other quantizers.

A family's `remap` renames, stacks and splits arrays. A weight in another format takes part in that
as zeros of its shape, and is decoded where its values are needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxkv.checkpoint.quantization import Format
from mlxkv.checkpoint.weights import TensorInfo, Weights
from mlxkv.errors import UnsupportedModel, WeightsError

from ..tensors import matrix_shape
from .matrices import Matrix
from .other_formats import Found
from .tensors import NAMES, FilePart, Part

_MODULE = re.compile(r"layers\.\d+\.\w+\.")


@dataclass(frozen=True, slots=True)
class MatrixPart:
    """A weight of another quantizer as a part of a tensor.

    Attributes:
        dtype: of its values where they are 16 bits.
    """

    matrix: Matrix
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    @property
    def row_step(self) -> int:
        return self.matrix.row_step

    def rows(self, start: int, stop: int) -> mx.array:
        return mx.array(np.ascontiguousarray(self.matrix.values(start, stop)))


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint's arrays.

    Attributes:
        weights: those of the files that are no part of `found`.
        found: weights of other quantizers.
        dtype: of what is computed with.
        apart: files that hold a dtype which MLX does not load.
    """

    weights: Weights
    found: Found
    dtype: str
    apart: frozenset[Path] = frozenset()

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.weights.infos

    @property
    def names(self) -> list[str]:
        return [*self.weights.infos, *self.found.matrices]

    def arrays(self, computed: str = "") -> dict[str, mx.array]:
        """Arrays by name: lazy ones of the files, and zeros for weights of other quantizers.

        Args:
            computed: a tensor of the model. What is stored for its part of its layer is decoded.
        """
        infos = self.weights.infos
        loadable = {n: info for n, info in infos.items() if info.file not in self.apart}
        found = Weights(loadable).arrays()
        found |= {n: self._array(n, is_read=bool(computed)) for n in infos if n not in loadable}
        match = _MODULE.search(computed)
        dtype = getattr(mx, self.dtype)
        for name, matrix in self.found.matrices.items():
            if match is not None and match[0] in name:
                n_rows, _ = matrix_shape(matrix.shape)
                values = mx.array(np.ascontiguousarray(matrix.values(0, n_rows)))
                found[name] = values.reshape(matrix.shape).astype(dtype)
            else:
                found[name] = mx.zeros(matrix.shape, dtype)
        return found

    def _array(self, name: str, *, is_read: bool) -> mx.array:
        """A plain array of a file that MLX does not load; zeros where no value is needed."""
        part, shape = self.part(name), self.infos[name].shape
        if not is_read:
            return mx.zeros(shape, getattr(mx, part.dtype))
        return part.rows(0, matrix_shape(shape)[0]).reshape(shape)

    def part(self, name: str) -> Part:
        """One of them.

        Raises:
            UnsupportedModel: a dtype that is not read.
        """
        if name in self.found.matrices:
            return MatrixPart(self.found.matrices[name], self.dtype)
        info = self.infos[name]
        if info.dtype not in NAMES:
            raise UnsupportedModel(f"{info.file}: tensor {name} has dtype {info.dtype}")
        return FilePart(info.file, info.offset, info.shape, info.dtype)


@dataclass(frozen=True, slots=True)
class MatrixTensor:
    """A weight, or experts, of another quantizer; see `SourceTensor`.

    Attributes:
        parts: the matrices, one if it is not a stack.
        dense_dtype: of its values where MLX has no format for them.
    """

    name: str
    origin: str
    shape: tuple[int, ...]
    parts: tuple[Matrix, ...]
    dense_dtype: str

    @property
    def dtype(self) -> str:
        return self.parts[0].label

    @property
    def quantization(self) -> Format | None:
        formats = {part.format for part in self.parts}
        return formats.pop() if len(formats) == 1 else None

    @property
    def scale_dtype(self) -> str:
        """The dtype that holds scales and biases as they are."""
        own = {part.scale_dtype for part in self.parts}
        if self.quantization is None or self.quantization.mode != "affine":
            return self.dense_dtype
        return self.dense_dtype if own == {self.dense_dtype} else "float32"

    @property
    def row_step(self) -> int:
        return self.parts[0].row_step

    def is_exact(self, scale_dtype: str) -> bool:
        keeps = scale_dtype in (self.scale_dtype, "float32") or len(self._arrays(0, 1)) == 2
        return keeps and all(part.is_exact for part in self.parts)

    def rows(self, start: int, stop: int) -> mx.array:
        found = [part.values(*span) for part, span in self._spans(start, stop)]
        return mx.array(np.concatenate(found))

    def quantized_rows(self, start: int, stop: int) -> tuple[mx.array, ...]:
        return tuple(map(mx.array, self._arrays(start, stop)))

    def _arrays(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        try:
            found = [part.packed(*span) for part, span in self._spans(start, stop)]
        except WeightsError as error:
            raise WeightsError(f"{self.origin}: {error}") from error
        return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Matrix, tuple[int, int]]]:
        """The matrices that hold these rows of the stack, and which of theirs."""
        n, _ = matrix_shape(self.parts[0].shape)
        for i in range(start // n, -(-stop // n)):
            yield self.parts[i], (max(start - i * n, 0), min(stop - i * n, n))
