"""How keys and values are stored: as they are computed, or in affine groups of 8 or 4 bits, each
side in a width of its own.

A format turns keys and values `[B, H, L, D]` into arrays whose tokens lie along axis 2 as well: a
cache keeps, moves and drops tokens of every format in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxkv.base import device
from mlxkv.errors import UsageError
from mlxkv.kv.types import CODE_BITS, KV_TYPES, groups

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Keys or values as codes: value = scale * code + bias, per group along the head's dimension.

    They are views of larger arrays: keys and values of one size lie side by side in the same
    arrays, which have room for more tokens.

    Args:
        stored: codes, uint32 `[B, n >= heads, n >= S, D * bits / 32]`; scales, in the compute
            dtype, `[B, n >= heads, n >= S, D / group_size]`; biases, the same.
        dim: values of a row; the rest is padding.
        bits: of a code.
        first_head: index of the first head of these rows in `stored`.
        n_tokens: tokens held, from the start of `stored`.
    """

    stored: tuple[mx.array, mx.array, mx.array]
    dim: int
    bits: int
    first_head: int
    n_heads: int
    n_tokens: int

    @property
    def codes(self) -> mx.array:
        """uint32 `[B, H, S, D * bits / 32]`."""
        return self.stored[0][self._part]

    @property
    def scales(self) -> mx.array:
        """`[B, H, S, D / group_size]`."""
        return self.stored[1][self._part]

    @property
    def biases(self) -> mx.array:
        """`[B, H, S, D / group_size]`."""
        return self.stored[2][self._part]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[B, H, S, D]` of the rows that it stands for."""
        return self.stored[0].shape[0], self.n_heads, self.n_tokens, self.dim

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the rows."""
        return self.stored[1].dtype

    @property
    def group_size(self) -> int:
        """Values that share a scale."""
        codes, scales, _ = self.stored
        return codes.shape[-1] * 32 // self.bits // scales.shape[-1]

    def tokens(self, start: int, stop: int) -> QuantizedRows:
        """Some of the tokens."""
        codes, scales, biases = (x[:, self._heads, start:stop] for x in self.stored)
        kept = codes, scales, biases
        return replace(self, stored=kept, first_head=0, n_tokens=stop - start)

    def leading(self, dim: int) -> QuantizedRows:
        """The first values of each row."""
        return replace(self, dim=dim)

    def after(self, *arrays: mx.array) -> QuantizedRows:
        """The same, dequantized only after these are computed."""
        codes, scales, biases = self.stored
        (codes,) = mx.depends([codes], list(arrays))
        return replace(self, stored=(codes, scales, biases))

    def dequantized(self) -> mx.array:
        """The rows `[B, H, S, D]`."""
        # The whole buffer: Metal's kernel would copy a part of it first.
        codes, scales, biases = (x[:, self._heads] for x in self.stored)
        return self._dequantize(codes, scales, biases)[:, :, : self.n_tokens, : self.dim]

    def dequantized_with(self, other: QuantizedRows) -> tuple[mx.array, mx.array]:
        """These rows and others, in one operation where both are stored in the same arrays."""
        if self.stored is not other.stored:
            return self.dequantized(), other.dequantized()
        rows = self._dequantize(*self.stored)
        return rows[self._part][..., : self.dim], rows[other._part][..., : other.dim]

    def _dequantize(self, codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return mx.dequantize(codes, scales, biases, group_size=self.group_size, bits=self.bits)

    @property
    def _heads(self) -> slice:
        return slice(self.first_head, self.first_head + self.n_heads)

    @property
    def _part(self) -> tuple[slice, ...]:
        return _ALL, self._heads, slice(self.n_tokens)


Rows = mx.array | QuantizedRows
"""Keys or values `[B, H, S, D]` of sequences of equal length."""


class Several:
    """In place of a part's mask: its one sequence has several queries, each a row of the batch.

    Args:
        n: queries.
        mask: `"causal"` or bool `[n, S]`, as `attention.attend` takes it.
    """

    def __init__(self, n: int, mask: Any):
        self.n, self.mask = n, mask
        self._rows: mx.array | None = None

    def rows(self, S: int) -> mx.array:
        """Which of S keys each query sees, bool `[n, 1, 1, S]`; S is the same in each call."""
        if self._rows is None:
            seen = self.mask
            if not isinstance(seen, mx.array):
                seen = mx.arange(S)[None] <= mx.arange(S - self.n, S)[:, None]
            self._rows = seen[:, None, None]
        return self._rows


@dataclass(frozen=True, slots=True)
class Order:
    """Which sequence of a batch is in which row of its parts.

    Args:
        rows: int32 `[R]`, for each row of all parts the sequence; any for an empty row.
        back: int32 `[B]`, for each sequence its row.
    """

    rows: mx.array
    back: mx.array


@dataclass(slots=True, eq=False)  # frozen, it takes three times as long to make: twice a layer
class Ragged:
    """Keys or values of several sequences: parts of similar length, each an array of its own.

    Args:
        parts: `[n, H, S, D]`, n sequences each.
        masks: for each part bool `[n, 1, 1, S]`, true where the sequence's query sees the row; None
            where all are seen; `Several` where the part is one sequence with several queries.
        order: None where the parts hold the batch's sequences in their order.
    """

    parts: tuple[Rows, ...]
    masks: tuple[mx.array | Several | None, ...]
    order: Order | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[R, H, S, D]` with the longest S."""
        _, H, _, D = self.parts[0].shape
        masks = zip(self.parts, self.masks, strict=True)
        n_rows = sum(m.n if isinstance(m, Several) else part.shape[0] for part, m in masks)
        return n_rows, H, max(part.shape[2] for part in self.parts), D


def in_parts(
    attend: Callable[..., mx.array | None],
    q: mx.array,
    k: Ragged,
    v: Ragged,
    scale: float,
    sinks: mx.array | None,
    softcap: float | None,
) -> mx.array:
    """Attention of one query in each row, part by part, `[R, H, 1, D]` in the batch's order.

    Args:
        attend: takes q, k, v, scale, mask, sinks and softcap.
        q: `[R, H, 1, D]`.
    """
    if k.order is not None:
        q = mx.take(q, k.order.rows, axis=0)
    outs, start = [], 0
    for own_k, own_v, mask in zip(k.parts, v.parts, k.masks, strict=True):
        stop = start + (mask.n if isinstance(mask, Several) else own_k.shape[0])
        rows = q if len(k.parts) == 1 else q[start:stop]
        if not isinstance(mask, Several):
            outs.append(attend(rows, own_k, own_v, scale, mask, sinks, softcap))
        elif device.on_cpu():
            # Each query alone: a sum is the one that a step of one token makes, bit for bit.
            kv = repeated(own_k, mask.n), repeated(own_v, mask.n)
            outs.append(attend(rows, *kv, scale, mask.rows(own_k.shape[2]), sinks, softcap))
        else:
            one = rows.transpose(2, 1, 0, 3)  # [1, H, n, D]
            out = attend(one, own_k, own_v, scale, mask.mask, sinks, softcap)
            outs.append(None if out is None else out.transpose(2, 1, 0, 3))
        start = stop
    out = outs[0] if len(outs) == 1 else mx.concatenate(outs)
    return out if k.order is None else mx.take(out, k.order.back, axis=0)


KV = Rows | Ragged
"""Keys or values as `LayerCache.update` returns them and `attend` takes them."""


@dataclass(frozen=True, slots=True)
class Native:
    """Rows in the dtype that the model computes in."""

    def n_arrays(self, k_dim: int, v_dim: int) -> int:
        """Arrays that are kept of keys and values of these sizes."""
        return 2

    def encode_both(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """The arrays that are kept of keys and values `[B, H, L, D]`."""
        return [k, v]

    def decode_both(
        self, arrays: Sequence[mx.array], n: int, k_dim: int, v_dim: int
    ) -> tuple[Rows, Rows]:
        """Keys and values of the first `n` tokens of what is kept."""
        k, v = arrays
        held = _ALL, _ALL, slice(n)
        return k[held], v[held]


@dataclass(frozen=True, slots=True)
class Affine:
    """Rows in affine groups along the head's dimension.

    A dimension that no group size divides is padded with zeros. Keys and values of one size and
    width are kept side by side, `[B, 2 * H, L, *]` with the keys' heads first: a step quantizes and
    writes both at a time. Change `types.LAYOUTS` with what is kept.

    A latent layer (MLA) keeps one row a token, as its keys, and no values: what attention takes as
    values are the first values of that row, in the keys' width.

    Args:
        k_bits: of a key's code.
        v_bits: of a value's code.
    """

    k_bits: int
    v_bits: int

    def n_arrays(self, k_dim: int, v_dim: int) -> int:
        """Arrays that are kept of keys and values of these sizes."""
        return 3 if self._side_by_side(k_dim, v_dim) else 6

    def _side_by_side(self, k_dim: int, v_dim: int) -> bool:
        return k_dim == v_dim > 0 and self.k_bits == self.v_bits

    def encode_both(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """The arrays that are kept of keys and values, or of keys and then of values."""
        if self._side_by_side(k.shape[-1], v.shape[-1]):
            return _quantized(_joined(k, v), self.k_bits)
        return _quantized(k, self.k_bits) + _quantized(v, self.v_bits)

    def decode_both(
        self, arrays: Sequence[mx.array], n: int, k_dim: int, v_dim: int
    ) -> tuple[Rows, Rows]:
        """Keys and values of the first `n` tokens of what is kept."""
        if self._side_by_side(k_dim, v_dim):
            H, stored = arrays[0].shape[1] // 2, _handles(arrays)
            k = QuantizedRows(stored, k_dim, self.k_bits, 0, H, n)
            return k, QuantizedRows(stored, v_dim, self.v_bits, H, H, n)
        H = arrays[0].shape[1]
        k = QuantizedRows(_handles(arrays[:3]), k_dim, self.k_bits, 0, H, n)
        if v_dim == 0:
            return k, arrays[3][:, :, :n]
        return k, QuantizedRows(_handles(arrays[3:]), v_dim, self.v_bits, 0, H, n)


def _quantized(rows: mx.array, bits: int) -> list[mx.array]:
    """Codes, scales and biases; of rows without values three times the rows."""
    group, padded = groups(rows.shape[-1])
    if padded == 0:
        return [rows] * 3
    n_missing = padded - rows.shape[-1]
    if n_missing:
        rows = mx.pad(rows, [(0, 0), (0, 0), (0, 0), (0, n_missing)])
    return list(mx.quantize(rows, group_size=group, bits=bits))


def _handles(arrays: Sequence[mx.array]) -> tuple[mx.array, mx.array, mx.array]:
    """New array objects for buffers: a write to a buffer rebinds the buffer's own object."""
    codes, scales, biases = arrays
    return codes[...], scales[...], biases[...]


def _joined(k: mx.array, v: mx.array) -> mx.array:
    """Keys' heads, then values' heads, `[B, 2 * H, L, D]`."""
    if device.on_cpu():
        return mx.concatenate([k, v], axis=1)
    # One launch of a GPU; concatenate takes one an array.
    B, H, L, D = k.shape
    both = mx.where(_keys_first(), mx.expand_dims(k, 1), mx.expand_dims(v, 1))
    return both.reshape(B, 2 * H, L, D)


@functools.cache
def _keys_first() -> mx.array:
    """bool `[1, 2, 1, 1, 1]`; made once, since every layer needs it in every step."""
    return mx.array([[[[[True]]], [[[False]]]]])


STORAGES: dict[str, Native | Affine] = {
    name: Native() if bits is None else Affine(*bits) for name, bits in CODE_BITS.items()
}
"""KV format -> how it stores rows."""


def storage_of(kv_type: str) -> Native | Affine:
    """How a KV format of one layer stores rows; UsageError for an unknown one."""
    if kv_type not in STORAGES:
        raise UsageError(f"must be one of {', '.join(KV_TYPES)}; got {kv_type!r}", field="kv_type")
    return STORAGES[kv_type]


def dense(rows: Rows) -> mx.array:
    """Rows as an array, whatever they are stored as."""
    return rows.dequantized() if isinstance(rows, QuantizedRows) else rows


def dense_both(k: Rows, v: Rows) -> tuple[mx.array, mx.array]:
    """Keys and values as arrays, whatever they are stored as."""
    if isinstance(k, QuantizedRows) and isinstance(v, QuantizedRows):
        return k.dequantized_with(v)
    return dense(k), dense(v)


def repeated(rows: Rows, n: int) -> Rows:
    """One sequence's rows for n sequences, in views."""
    if isinstance(rows, QuantizedRows):
        codes, scales, biases = (mx.broadcast_to(x, (n, *x.shape[1:])) for x in rows.stored)
        return replace(rows, stored=(codes, scales, biases))
    return mx.broadcast_to(rows, (n, *rows.shape[1:]))


def leading(rows: KV, dim: int) -> KV:
    """The first `dim` values of each row."""
    if isinstance(rows, Ragged):
        parts = tuple(_leading(part, dim) for part in rows.parts)
        return Ragged(parts, rows.masks, rows.order)
    return _leading(rows, dim)


def _leading(rows: Rows, dim: int) -> Rows:
    return rows.leading(dim) if isinstance(rows, QuantizedRows) else rows[..., :dim]
