"""Weights of other quantizers, read by rows: as values, and in MLX's format where one holds them.

Each class is one way that a matrix `[out, in]` is stored, or several of them as `[E, out, in]`.
Formulas are those of the formats' own libraries: compressed-tensors, AutoAWQ, AutoGPTQ and
GPTQModel, AutoRound (which packs as these two), ModelOpt, bitsandbytes, and Hugging Face's FP8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mlxkv.checkpoint.quantization import MODES, Format
from mlxkv.errors import WeightsError

from .. import float4
from ..gguf.blocks import packed as as_stream
from ..tensors import matrix_shape

MXFP8 = Format("mxfp8", 8, 32)
Arrays = tuple[np.ndarray, ...]
Groups = Callable[[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Codes uint8 `[n, in]` of some rows, and float32 `[n, groups]`: scales, and codes of zero."""


class Matrix(Protocol):
    """A stored matrix.

    Attributes:
        shape: of the values.
        label: the format's name, for people.
        format: MLX's that `packed` has; None for 16-bit values.
        is_exact: whether its values in `format` are the same to the bit.
        scale_dtype: the dtype that holds its scales and biases as they are.
        row_step: blocks of rows begin and end at multiples of it.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def label(self) -> str: ...
    @property
    def format(self) -> Format | None: ...
    @property
    def is_exact(self) -> bool: ...
    @property
    def scale_dtype(self) -> str: ...
    @property
    def row_step(self) -> int: ...

    def values(self, start: int, stop: int) -> np.ndarray:
        """These rows, float32 `[n, in]`."""
        ...

    def packed(self, start: int, stop: int) -> Arrays:
        """These rows in the layout of `mx.quantize`."""
        ...


@dataclass(frozen=True, slots=True)
class Integers:
    """(code - zero) * scale, with a scale for each group of a row.

    Attributes:
        bits: of a code.
        group_size: values of a row that share a scale.
        read: see `Groups`.
        order: group of each column, where the groups are not neighbours (act order).
        scale_dtype: the scales' own where zero is the middle of the codes, whose product with a
            scale is exact in it; else float32.
    """

    shape: tuple[int, ...]
    label: str
    bits: int
    group_size: int
    read: Groups
    order: np.ndarray | None = None
    scale_dtype: str = "float32"
    row_step: int = 1
    is_exact: bool = True

    @property
    def format(self) -> Format | None:
        """Affine in the largest group that MLX has and the stored one is a multiple of."""
        if self.order is not None or self.bits not in MODES["affine"][0]:
            return None
        whole = (self.group_size, self.shape[-1])  # the last group may be a part of one
        sizes = [size for size in MODES["affine"][1] if all(n % size == 0 for n in whole)]
        return Format("affine", self.bits, max(sizes)) if sizes else None

    def values(self, start: int, stop: int) -> np.ndarray:
        codes, scales, zeros = self.read(start, stop)
        groups = self.order
        if groups is None:
            groups = np.arange(codes.shape[1]) // self.group_size
        with np.errstate(all="ignore"):  # of a damaged file; the writer refuses such values
            return (codes - zeros[:, groups]) * scales[:, groups]

    def packed(self, start: int, stop: int) -> Arrays:
        codes, scales, zeros = self.read(start, stop)
        assert self.format is not None
        size = self.format.group_size
        groups = np.arange(0, self.shape[-1], size) // self.group_size
        words = as_stream(codes.reshape(-1), self.bits).reshape(len(codes), -1).view("<u4")
        with np.errstate(all="ignore"):
            biases = -zeros * scales
        return words, scales[:, groups], biases[:, groups]


@dataclass(frozen=True, slots=True)
class Float8:
    """8-bit floats under scales of blocks, rows, matrices or the whole.

    Attributes:
        codes: uint8, of `shape`.
        scales: float32, as many dimensions as `shape`; each divides the weight evenly, but for the
            last block.
        block: rows and columns that share a scale.
        is_e5m2: 5 bits of exponent, which MXFP8 of MLX does not have, instead of E4M3.
    """

    shape: tuple[int, ...]
    label: str
    codes: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]
    scale_dtype: str = "float32"
    row_step: int = 1
    is_exact: bool = True
    is_e5m2: bool = False

    @property
    def format(self) -> Format | None:
        """MXFP8 where all scales are powers of two that it has."""
        mantissas, exponents = np.frexp(self.scales)
        small = (exponents > -126) & (exponents < 128)
        fits = self.shape[-1] % 32 == 0 and self.block[1] % 32 == 0
        fits = fits and not self.is_e5m2
        return MXFP8 if fits and (mantissas == 0.5).all() and small.all() else None

    def _row_scales(self, start: int, stop: int) -> np.ndarray:
        """Scales of the blocks of each row, `[n, blocks]`."""
        scales, n_out = self.scales, self.shape[-2]
        rows = np.arange(start, stop)
        expert, row = rows // n_out, rows % n_out // self.block[0]
        stacked = scales.reshape(-1, *scales.shape[-2:])
        return stacked[np.minimum(expert, len(stacked) - 1), row]

    def values(self, start: int, stop: int) -> np.ndarray:
        columns = np.arange(self.shape[-1]) // self.block[1]
        codes = self.codes.reshape(-1, self.shape[-1])[start:stop]
        table = float4.E5M2 if self.is_e5m2 else float4.E4M3
        with np.errstate(all="ignore"):
            return table[codes] * self._row_scales(start, stop)[:, columns]

    def packed(self, start: int, stop: int) -> Arrays:
        codes = np.ascontiguousarray(self.codes.reshape(-1, self.shape[-1])[start:stop])
        if ((codes & 0x7F) == 0x7F).any():
            raise WeightsError("holds NaN: the file is damaged")
        columns = np.arange(self.shape[-1] // 32) * 32 // self.block[1]
        _, exponents = np.frexp(self._row_scales(start, stop)[:, columns])
        return codes.view("<u4"), (exponents - 1 + 127).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class PlainFloat8:
    """8-bit floats as they are, a matrix or a vector: 16 bits of either kind hold them exactly.

    Attributes:
        codes: uint8, of `shape`.
        table: values of the codes, float32 `[256]`.
    """

    shape: tuple[int, ...]
    label: str
    codes: np.ndarray
    table: np.ndarray
    format: Format | None = None
    scale_dtype: str = "float32"
    row_step: int = 1
    is_exact: bool = True

    def values(self, start: int, stop: int) -> np.ndarray:
        return self.table[self.codes.reshape(matrix_shape(self.shape))[start:stop]]

    def packed(self, start: int, stop: int) -> Arrays:
        raise NotImplementedError("has no scales")


@dataclass(frozen=True, slots=True)
class Float4:
    """E2M1 values, two in a byte, under a scale for each 16 (NVFP4) or 32 (MXFP4).

    Attributes:
        codes: uint8 `[..., in / 2]`, the first value in the low half.
        scales: uint8 `[..., in / group]`: E4M3, or powers of two.
        seconds: what NVFP4's scales are multiplied by, one or one for each matrix.
        folded: for each of them, by code of `scales`, the one that has taken it in, uint8
            `[n, 256]`; None where that is not exact.
    """

    shape: tuple[int, ...]
    codes: np.ndarray
    scales: np.ndarray
    seconds: np.ndarray
    mode: str
    folded: np.ndarray | None = None
    scale_dtype: str = "float32"
    row_step: int = 1

    @property
    def label(self) -> str:
        return self.mode.upper()

    @property
    def _has_second(self) -> bool:
        return self.folded is None and bool((self.seconds != 1).any())

    @property
    def is_exact(self) -> bool:
        return not self._has_second

    @property
    def format(self) -> Format | None:
        if not self._has_second:
            return Format(self.mode, 4, MODES[self.mode][1][0])
        return float4.NEAREST if self.shape[-1] % 32 == 0 else None

    def _rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bytes and scales of these rows, and their second scales `[n, 1]`."""
        codes = np.asarray(self.codes.reshape(-1, self.codes.shape[-1])[start:stop])
        scales = np.asarray(self.scales.reshape(-1, self.scales.shape[-1])[start:stop])
        n_rows = matrix_shape(self.shape)[0]
        seconds = self.seconds.ravel()
        of_row = np.arange(start, stop) * len(seconds) // n_rows
        if self.folded is not None:
            return codes, self.folded[of_row[:, None], scales], np.ones((len(codes), 1), np.float32)
        return codes, scales, seconds[of_row, None]

    def _values(self, codes: np.ndarray) -> np.ndarray:
        halves = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)
        return halves.reshape(len(codes), -1)

    def values(self, start: int, stop: int) -> np.ndarray:
        codes, scales, seconds = self._rows(start, stop)
        group = MODES[self.mode][1][0]
        with np.errstate(all="ignore"):
            floats = np.repeat(self._floats(scales) * seconds, group, axis=1)
            return float4.e2m1(self._values(codes)) * floats

    def _floats(self, scales: np.ndarray) -> np.ndarray:
        return float4.E4M3[scales] if self.mode == "nvfp4" else float4.e8m0(scales)

    def packed(self, start: int, stop: int) -> Arrays:
        codes, scales, seconds = self._rows(start, stop)
        nan = 0x7F if self.mode == "nvfp4" else 0xFF
        if (scales == nan).any():
            raise WeightsError("holds scales that are NaN: the file is damaged")
        if not self._has_second:
            return np.ascontiguousarray(codes).view("<u4"), np.ascontiguousarray(scales)
        floats = float4.E4M3[scales] * seconds
        found, steps, biases = float4.nearest(self._values(codes), floats)
        words = as_stream(found.reshape(-1), float4.NEAREST.bits).reshape(len(found), -1)
        return words.view("<u4"), steps, biases


@dataclass(frozen=True, slots=True)
class CodeBook:
    """bitsandbytes' 4 bits: values of a table of 16, times the largest value of each block.

    Attributes:
        codes: uint8, two values in a byte in the order of the matrix, the first in the high half.
        table: float32 `[16]`.
        largest: of blocks `[start, stop)`, float32.
        block_size: values of a block, counted over all rows.
    """

    shape: tuple[int, ...]
    label: str
    codes: np.ndarray
    table: np.ndarray
    largest: Callable[[int, int], np.ndarray]
    block_size: int
    format: Format | None = None
    scale_dtype: str = "float32"
    row_step: int = 2  # an even number of values
    is_exact: bool = True

    def values(self, start: int, stop: int) -> np.ndarray:
        columns, size = self.shape[-1], self.block_size
        first, last = start * columns, stop * columns
        bytes_ = np.asarray(self.codes[first // 2 : -(-last // 2)])
        codes = np.stack([bytes_ >> np.uint8(4), bytes_ & np.uint8(15)], axis=-1).reshape(-1)
        largest = self.largest(first // size, -(-last // size))
        blocks = np.arange(first, last) // size - first // size
        with np.errstate(all="ignore"):
            return (self.table[codes[: last - first]] * largest[blocks]).reshape(-1, columns)

    def packed(self, start: int, stop: int) -> Arrays:
        raise NotImplementedError("MLX has no tables")
