"""The buffers of one layer, which grow in steps, in any KV format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import mlx.core as mx

from mlxkv.errors import UsageError
from mlxkv.kv.layout import Place, SharedRow, Slice, Stepping
from mlxkv.kv.storage import Native, Rows, dense_both, storage_of
from mlxkv.kv.types import CacheSpec, ceil_step


class Buffers(Stepping):
    """Buffers `[B, H, capacity, D]` of the arrays that a format keeps of keys and values.

    Attributes:
        buffers: its own; `[]` while it is empty or `row` is set.
        row: the row of shared buffers that holds its KV, if one does.
        copied: makes a copy with memory of its own; replaced while a step is traced.
    """

    __slots__ = (
        "__weakref__", "_rows", "_storage", "buffers", "copied", "kv_type", "offset", "row", "spec",
    )  # fmt: skip

    def __init__(self, spec: CacheSpec | None = None, kv_type: str = "native"):
        self.spec = spec
        self.kv_type = kv_type
        self.offset = 0
        self.copied: Callable[[mx.array], mx.array] = mx.contiguous
        self._storage = storage_of(kv_type)
        self._rows: tuple[Any, ...] = ()
        self.row: SharedRow | None = None
        self._release()

    def _release(self) -> None:
        self.buffers: list[mx.array] = []
        self.row = None

    def columns(self, n: int) -> list[mx.array]:
        """The first n columns of every array; `[]` of none."""
        return [array[:, :, :n] for array in self.arrays] if n else []

    @property
    def keys(self) -> mx.array:
        """The first buffer: native keys, or codes. Not while empty."""
        return self.arrays[0]

    @property
    def values(self) -> mx.array:
        """The buffer of native values. Not while empty."""
        _, values = self.arrays
        return values

    @property
    def arrays(self) -> list[mx.array]:
        """Buffers of this sequence alone, views of them where they are shared; `[]` while empty."""
        return self.buffers if self.row is None else self.row.views(self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes allocated now; of shared buffers this sequence's part."""
        if self.row is not None:
            return self.row.nbytes
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        if self.row is not None:
            return self.n_rows(self.offset)
        return self.buffers[0].shape[2] if self.buffers else 0

    @property
    def used_bytes(self) -> int:
        """Bytes of what is held, without the room for more."""
        if self.row is not None:
            token_bytes = self.row.token_bytes
        else:
            token_bytes = sum(x.nbytes // (x.shape[0] * x.shape[2]) for x in self.buffers)
        return token_bytes * (self.offset - self.first)

    @property
    def max_rows(self) -> int | None:
        """Most tokens held in decode; None for no limit."""
        raise NotImplementedError

    def n_rows(self, n_tokens: int) -> int:
        """Capacity after `n_tokens` tokens."""
        rows = ceil_step(n_tokens)
        return rows if self.max_rows is None else min(rows, self.max_rows)

    def share(self, row: SharedRow) -> None:
        """Use a row of shared buffers, which holds this KV already.

        The token at position p is at `p % max_rows` there, or at `p`.
        """
        self.buffers, self.row = [], row

    @classmethod
    def advance(cls, caches: Iterable[Any], offsets: Iterable[int]) -> None:
        """Count one more token, which was written into the caches' shared rows.

        Args:
            caches: of one layer.
            offsets: their new offsets. All layers share these objects: a step reads every cache's,
                and separate ones would cost a memory access each.
        """
        for cache, offset in zip(caches, offsets, strict=True):
            cache.offset = offset

    def encoded(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """What is stored of keys and values `[B, H, L, D]`, of B sequences like this one."""
        return self._storage.encode_both(k, v)

    def decoded(self, arrays: Sequence[mx.array], n: int, first: int = 0) -> tuple[Rows, Rows]:
        """Keys and values of `n` tokens of what is stored, from column `first` on."""
        if first:
            arrays = [array[:, :, first : first + n] for array in arrays]
        return self._storage.decode_both(arrays, n, *self._rows[2:4])

    def next_place(self, n: int = 1) -> Place | None:
        """See `Stepping`: of n tokens, in buffers that hold all of them."""
        return self._place(self.offset, n) if self.offset + n <= self.capacity else None

    def stepped(self, keys: mx.array, values: mx.array, n: int = 1) -> None:
        """See `Stepping`."""
        self.buffers, self.offset = [keys, values], self.offset + n

    def _place(self, column: int, n: int = 1, length: int | None = None) -> Place | None:
        """A place in native buffers of one sequence alone; None where these are not.

        Args:
            column: of the first of n tokens, which stand beside each other.
            length: columns that it sees; None for those up to its own.
        """
        rows = self._rows
        if self.row is not None or not rows or rows[0] != 1 or len(self.buffers) != 2:
            return None
        if not isinstance(self._storage, Native):
            return None
        keys, values = self.buffers
        seen = column + 1 if length is None else length
        if n == 1:
            return Place(keys, values, (self.offset,), (column,), (seen,))
        behind = (tuple(range(first, first + n)) for first in (self.offset, column, seen))
        return Place(keys, values, *behind)

    @property
    def first(self) -> int:
        """The oldest position held."""
        raise NotImplementedError

    def read(self, start: int, stop: int) -> Slice:
        raise NotImplementedError

    def converted(self, kv_type: str) -> Self:
        """An empty cache of the same kind in another format, with what this one holds."""
        cache = self._empty(kv_type)
        if self.offset:
            held = self.read(self.first, self.offset)
            k, v = self.decoded(held.arrays, held.stop - held.start)
            arrays = cache.encoded(*dense_both(k, v))
            cache._rows = self._rows
            cache.load([Slice(tuple(arrays), held.start, held.stop)])
        return cache

    def _empty(self, kv_type: str) -> Self:
        raise NotImplementedError

    def load(self, parts: Sequence[Slice], room: int = 0) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything and give the buffers back."""
        self.offset = 0
        self._rows = ()
        self._release()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """`update` for mlx-lm's model definitions, which cannot read quantized rows."""
        return dense_both(*self.update(keys, values))

    def update(self, k: mx.array, v: mx.array) -> tuple[Rows, Rows]:
        raise NotImplementedError

    def _check(self, k: mx.array, v: mx.array) -> int:
        """Number of new tokens; raises where they do not fit what is held."""
        (B, H, L, k_dim), (vB, vH, vL, v_dim) = _four(k), _four(v)
        rows = (B, H, k_dim, v_dim, k.dtype, v.dtype)
        if self._rows != rows or vB != B or vH != H or vL != L or L == 0:
            self._refuse_misfit(k, v)
            self._rows = rows
        return L

    def _refuse_misfit(self, k: mx.array, v: mx.array) -> None:
        (B, H, L, k_dim), (*v_rows, v_dim) = k.shape, v.shape
        if v_rows != [B, H, L] or L == 0:
            raise UsageError(f"keys {k.shape} and values {v.shape} must hold the same tokens")
        if self._rows:
            raise UsageError(
                f"a cache of [B, H, k_dim, v_dim, dtypes] = {list(self._rows)} cannot take keys "
                f"{k.shape} {k.dtype} and values {v.shape} {v.dtype}; reset() it first"
            )
        spec = self.spec
        if spec is not None and (H, k_dim, v_dim) != (spec.n_kv_heads, spec.k_dim, spec.v_dim):
            raise UsageError(f"keys {k.shape} and values {v.shape} do not fit {spec}")

    def _check_range(self, start: int, stop: int, first: int) -> None:
        if not first <= start <= stop <= self.offset:
            raise UsageError(
                f"positions [{start}, {stop}) are not held; this cache has [{first}, {self.offset})"
            )

    def _check_rewind(self, offset: int) -> None:
        if not 0 <= offset <= self.offset:
            raise UsageError(f"cannot rewind to {offset}: allowed is 0 to {self.offset}")

    def _load(self, parts: Sequence[Slice], first_needed: int, capacity: int) -> int:
        """Take over consecutive slices, the rows from `first_needed` on; how many those are."""
        start, stop = parts[0].start, parts[-1].stop
        at = start
        for part in parts:
            n = part.stop - part.start
            if part.start != at or any(x.shape[2] != n for x in part.arrays):
                raise UsageError(
                    f"slices must follow each other; [{part.start}, {part.stop}) does "
                    f"not go on from {at}"
                )
            at = part.stop
        if start > first_needed:
            raise UsageError(f"positions [{first_needed}, {start}) are missing")
        rows = self._rows_of(parts)
        self.reset()
        self._rows = rows
        n = min(stop - start, capacity)
        first = stop - n
        kept = [part for part in parts if part.stop > first]
        skip = first - kept[0].start
        self.buffers = [
            _filled(arrays, skip, capacity)
            for arrays in zip(*(part.arrays for part in kept), strict=True)
        ]
        self.offset = stop
        return n

    def _rows_of(self, parts: Sequence[Slice]) -> tuple[Any, ...]:
        """What `_check` compares, of slices; raises where they are not of this cache's format."""
        spec, arrays, storage = self.spec, parts[0].arrays, self._storage
        native = isinstance(storage, Native)
        if spec is None and not native:
            raise UsageError("a cache without a spec cannot load quantized slices")
        n = storage.n_arrays(*((spec.k_dim, spec.v_dim) if spec else (1, 1)))
        if len(arrays) != n or any(x.ndim != 4 for part in parts for x in part.arrays):
            raise UsageError(f"slices of {len(arrays)} arrays are not of KV format {self.kv_type}")
        B, H = arrays[0].shape[:2]
        v_dtype = arrays[-1].dtype  # of quantized rows: the biases', and so the keys' as well
        dtype = arrays[0].dtype if native else v_dtype
        if spec is None:
            return B, H, arrays[0].shape[3], arrays[1].shape[3], dtype, v_dtype
        if not mx.issubdtype(dtype, mx.floating):
            raise UsageError(f"slices of {dtype} are not of KV format {self.kv_type}")
        H = spec.n_kv_heads
        blank = mx.zeros((B, H, 1, spec.k_dim), dtype), mx.zeros((B, H, 1, spec.v_dim), v_dtype)
        wanted = [_row(x) for x in storage.encode_both(*blank)]
        for part in parts:
            got = [_row(x) for x in part.arrays]
            if got != wanted:
                raise UsageError(f"slices of [B, heads, row, dtype] {got} do not fit {spec}")
        return B, H, spec.k_dim, spec.v_dim, dtype, v_dtype

    def _nothing(self) -> tuple[mx.array, ...]:
        spec = self.spec or CacheSpec(0, 0, 0)
        blank = (mx.zeros((1, spec.n_kv_heads, 1, dim)) for dim in (spec.k_dim, spec.v_dim))
        return tuple(x[:, :, :0] for x in self._storage.encode_both(*blank))

    def _written(
        self, buffers: list[mx.array], arrays: Sequence[mx.array], start: int, stop: int
    ) -> list[mx.array]:
        """Buffers with rows written in place."""
        if (start, stop) == (0, buffers[0].shape[2]):
            # MLX would return the rows themselves, a view of an array that has the queries too.
            return [self.copied(x) for x in arrays]
        for buffer, x in zip(buffers, arrays, strict=True):
            buffer[:, :, start:stop] = x
        return buffers

    def _reserved(self, arrays: Sequence[mx.array], n_used: int, capacity: int) -> list[mx.array]:
        """Buffers for `capacity` tokens, with the first `n_used` copied."""
        held = self.arrays
        if not held:
            return [_rows_like(x, capacity) for x in arrays]
        if capacity == self.capacity:
            return held
        return [extended(buffer, n_used, capacity) for buffer in held]


def _row(x: mx.array) -> tuple[int, int, int, mx.Dtype]:
    """What all slices of a cache have in common."""
    B, H, _, D = x.shape
    return B, H, D, x.dtype


def _four(x: mx.array) -> tuple[int, ...]:
    shape = x.shape
    if len(shape) != 4:
        raise UsageError(f"keys and values are [B, H, L, D]; got {shape}")
    return shape


def _rows_like(x: mx.array, n_rows: int) -> mx.array:
    B, H, _, D = x.shape
    return mx.zeros((B, H, n_rows, D), x.dtype)


def extended(buffer: mx.array, n_used: int, capacity: int) -> mx.array:
    """The first `n_used` rows of a buffer `[B, H, S, D]`, in one of `capacity` rows."""
    # Not with an array of zeros behind them, which would take the room once more.
    return mx.pad(buffer[:, :, :n_used], [(0, 0), (0, 0), (0, capacity - n_used), (0, 0)])


def _filled(arrays: Sequence[mx.array], skip: int, capacity: int) -> mx.array:
    """A buffer of `capacity` rows that begins with the rows of `arrays`, the first few skipped."""
    first, *rest = arrays
    arrays = [first[:, :, skip:], *rest]
    n = sum(x.shape[2] for x in arrays)
    room = [_rows_like(first, capacity - n)] if n < capacity else []
    return mx.contiguous(mx.concatenate([*arrays, *room], axis=2))
