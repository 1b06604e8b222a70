"""How keys and values are stored: as they are computed, or in affine groups of 8 or 4 bits.

A format turns rows `[B, H, L, D]` into one or three arrays whose tokens lie along axis 2 as well: a
cache keeps, moves and drops tokens of every format in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxkv.errors import UsageError
from mlxkv.kv_types import AUTO, KV_CHOICES, KV_TYPES

GROUP_SIZES = (64, 32)
"""Values that share a scale and a bias: the largest that divides the head's size."""


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Keys or values as codes: value = scale * code + bias, per group along the head's dimension.

    Args:
        codes: uint32 `[B, H, S, D * bits / 32]`.
        scales: `[B, H, S, D / group_size]`, in the dtype that is computed in.
        biases: the same.
        dim: values per row that count; those behind are padding.
        bits: of a code.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    dim: int
    bits: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[B, H, S, D]` of the rows that it stands for."""
        B, H, S, _ = self.codes.shape
        return B, H, S, self.dim

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the rows."""
        return self.scales.dtype

    @property
    def group_size(self) -> int:
        """Values that share a scale."""
        return self.codes.shape[-1] * 32 // self.bits // self.scales.shape[-1]

    def heads(self, start: int, stop: int) -> QuantizedRows:
        """Some of the heads."""
        return self._cut((slice(None), slice(start, stop)))

    def tokens(self, start: int, stop: int) -> QuantizedRows:
        """Some of the tokens."""
        return self._cut((slice(None), slice(None), slice(start, stop)))

    def leading(self, dim: int) -> QuantizedRows:
        """The first values of each row."""
        return QuantizedRows(self.codes, self.scales, self.biases, dim, self.bits)

    def after(self, *arrays: mx.array) -> QuantizedRows:
        """The same, not unpacked before these are computed."""
        (codes,) = mx.depends([self.codes], list(arrays))
        return QuantizedRows(codes, self.scales, self.biases, self.dim, self.bits)

    def dequantized(self) -> mx.array:
        """The rows `[B, H, S, D]`."""
        rows = mx.dequantize(
            self.codes, self.scales, self.biases, group_size=self.group_size, bits=self.bits
        )
        return rows[..., : self.dim]

    def _cut(self, at: tuple[slice, ...]) -> QuantizedRows:
        return QuantizedRows(self.codes[at], self.scales[at], self.biases[at], self.dim, self.bits)


Rows = mx.array | QuantizedRows
"""Keys or values `[B, H, S, D]` of sequences of equal length."""


@dataclass(frozen=True, slots=True)
class Order:
    """Which sequence of a batch stands at which row of its parts.

    Args:
        rows: int32 `[R]`, for each row of all parts the sequence; a row that stands empty has any.
        back: int32 `[B]`, for each sequence its row.
    """

    rows: mx.array
    back: mx.array


@dataclass(frozen=True, slots=True)
class Ragged:
    """Keys or values of several sequences: parts of similar length, each an array of its own.

    Args:
        parts: `[n, H, S, D]`, n sequences each.
        masks: for each part bool `[n, 1, 1, S]`, true where the sequence's query sees the row; None
            where all are seen.
        order: None where the parts hold the batch's sequences in their order.
    """

    parts: tuple[Rows, ...]
    masks: tuple[mx.array | None, ...]
    order: Order | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[R, H, S, D]` with the longest S."""
        _, H, _, D = self.parts[0].shape
        n_rows = sum(part.shape[0] for part in self.parts)
        return n_rows, H, max(part.shape[2] for part in self.parts), D


KV = Rows | Ragged
"""Keys or values as `LayerCache.update` returns them and `attend` takes them."""


@dataclass(frozen=True, slots=True)
class Native:
    """Rows in the dtype that the model computes in."""

    n_arrays = 1

    def row_bytes(self, dim: int, itemsize: int) -> int:
        """Bytes of one head's vector of `dim` values."""
        return dim * itemsize

    def encode(self, rows: mx.array) -> list[mx.array]:
        """The arrays that are kept of rows `[B, H, L, D]`."""
        return [rows]

    def decode(self, arrays: Sequence[mx.array], dim: int) -> Rows:
        """What attention takes of kept arrays."""
        return arrays[0]

    def encode_both(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """The arrays that are kept of keys, then those of values: what every step asks for."""
        return [k, v]

    def decode_both(self, arrays: Sequence[mx.array], k_dim: int, v_dim: int) -> tuple[Rows, Rows]:
        """Keys and values of what is kept."""
        return arrays[0], arrays[1]


@dataclass(frozen=True, slots=True)
class Affine:
    """Rows in affine groups along the head's dimension.

    A dimension that no group size divides is padded with zeros.

    Args:
        bits: of a code.
    """

    bits: int
    n_arrays = 3

    def row_bytes(self, dim: int, itemsize: int) -> int:
        """Bytes of one head's vector of `dim` values: codes, and a scale and a bias a group."""
        group, padded = _groups(dim)
        return padded * self.bits // 8 + (2 * (padded // group) * itemsize if padded else 0)

    def encode(self, rows: mx.array) -> list[mx.array]:
        """The arrays that are kept of rows `[B, H, L, D]`."""
        group, padded = _groups(rows.shape[-1])
        if padded == 0:
            return [rows] * 3
        n_missing = padded - rows.shape[-1]
        if n_missing:
            rows = mx.pad(rows, [(0, 0), (0, 0), (0, 0), (0, n_missing)])
        return list(mx.quantize(rows, group_size=group, bits=self.bits))

    def decode(self, arrays: Sequence[mx.array], dim: int) -> Rows:
        """What attention takes of kept arrays."""
        if dim == 0:
            return arrays[0]
        codes, scales, biases = arrays
        return QuantizedRows(codes, scales, biases, dim, self.bits)

    def encode_both(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """The arrays that are kept of keys, then those of values."""
        return self.encode(k) + self.encode(v)

    def decode_both(self, arrays: Sequence[mx.array], k_dim: int, v_dim: int) -> tuple[Rows, Rows]:
        """Keys and values of what is kept."""
        return self.decode(arrays[:3], k_dim), self.decode(arrays[3:], v_dim)


def _groups(dim: int) -> tuple[int, int]:
    """Group size, and the dimension padded to a multiple of it."""
    group = next((size for size in GROUP_SIZES if dim % size == 0), GROUP_SIZES[-1])
    return group, -(-dim // group) * group


STORAGES: dict[str, Native | Affine] = dict(
    zip(KV_TYPES, (Native(), Affine(8), Affine(4)), strict=True)
)
"""What a KV format is called -> how it stores rows."""


def first_kv_type(choice: str) -> str:
    """The format that a sequence begins in.

    Raises:
        UsageError: it is not one of `KV_CHOICES`.
    """
    if choice not in KV_CHOICES:
        raise UsageError(f"--kv-type must be one of {', '.join(KV_CHOICES)}; got {choice!r}")
    return KV_TYPES[0] if choice == AUTO else choice


def storage_of(kv_type: str) -> Native | Affine:
    """How a KV format stores rows.

    Raises:
        UsageError: it is not one of `KV_TYPES`.
    """
    if kv_type not in STORAGES:
        raise UsageError(f"--kv-type must be one of {', '.join(KV_TYPES)}; got {kv_type!r}")
    return STORAGES[kv_type]


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values are stored, for arithmetic.

    Args:
        name: one of `KV_TYPES`.
        itemsize: bytes per value, 2 for float16 and bfloat16, 4 for float32.
    """

    name: str = "native"
    itemsize: int = 2

    def row_bytes(self, dim: int) -> int:
        """Bytes of one head's vector of `dim` values."""
        return STORAGES[self.name].row_bytes(dim, self.itemsize)


def dense(rows: Rows) -> mx.array:
    """Rows as an array, whatever they are stored as."""
    return rows.dequantized() if isinstance(rows, QuantizedRows) else rows


def leading(rows: KV, dim: int) -> KV:
    """The first `dim` values of each row."""
    if isinstance(rows, Ragged):
        parts = tuple(_leading(part, dim) for part in rows.parts)
        return Ragged(parts, rows.masks, rows.order)
    return _leading(rows, dim)


def _leading(rows: Rows, dim: int) -> Rows:
    return rows.leading(dim) if isinstance(rows, QuantizedRows) else rows[..., :dim]
