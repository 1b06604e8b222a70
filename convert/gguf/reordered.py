"""Tensors of a GGUF file whose rows, columns or values llama.cpp's converter changes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlxkv.checkpoint.quantization import Format

from ..tensors import matrix_shape
from .architecture import Order
from .file import dequantize
from .weight import GGUFWeight


@dataclass(frozen=True, slots=True)
class ReorderedWeight(GGUFWeight):
    """A `GGUFWeight` in another order."""

    order: Order = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.order.shape

    @property
    def quantization(self) -> Format | None:
        if self._is_whole or self._cuts_blocks:
            return None
        return GGUFWeight.quantization.__get__(self)

    @property
    def _is_whole(self) -> bool:
        """Whether it is read at once: a vector, or of another number of rows than the file's."""
        same = matrix_shape(self.shape)[1] == matrix_shape(self.tensor.shape)[1]
        return len(self.shape) < 2 or not same

    @property
    def _cuts_blocks(self) -> bool:
        """Whether a block of the file's quantization reaches over heads of the columns."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        n_values, _ = GGML_QUANT_SIZES[GGMLQuantizationType[self.tensor.type]]
        return self.order.heads is not None and self.order.heads[2] % n_values != 0

    def _read(self, start: int, stop: int) -> np.ndarray:
        wanted = self.order.rows
        if wanted is None:
            return self.file.read_rows(self.tensor, start, stop)
        found = []
        for _, run in itertools.groupby(enumerate(wanted[start:stop]), lambda at: at[1] - at[0]):
            rows = [row for _, row in run]
            found.append(self.file.read_rows(self.tensor, rows[0], rows[-1] + 1))
        return np.concatenate(found)

    def stored(self, start: int, stop: int) -> np.ndarray:
        stored = self._read(start, stop)
        return stored if self._cuts_blocks else self._by_head(stored)

    def _by_head(self, rows: np.ndarray) -> np.ndarray:
        """Rows of bytes or values with the columns' heads in our order."""
        if self.order.heads is None:
            return rows
        r, n_heads, _ = self.order.heads
        heads = rows.reshape(len(rows), r, n_heads, -1).swapaxes(1, 2)
        return np.ascontiguousarray(heads).reshape(len(rows), -1)

    def rows(self, start: int, stop: int) -> mx.array:
        if self._is_whole:
            return mx.array(self._whole()[start:stop])
        if self._cuts_blocks:
            return mx.array(self._by_head(dequantize(self._read(start, stop), self.tensor.type)))
        return GGUFWeight.rows(self, start, stop)

    def _whole(self) -> np.ndarray:
        n_rows, _ = matrix_shape(self.tensor.shape)
        values = dequantize(self.file.read_rows(self.tensor, 0, n_rows), self.tensor.type)
        if (wanted := self.order.rows) is not None:
            values = values.reshape(len(wanted), -1)[list(wanted)]
        if self.order.is_decay:
            with np.errstate(all="ignore"):  # of a damaged file: the writer checks
                values = np.log(-values)
        return values.reshape(matrix_shape(self.shape))
