"""KV caches: what one layer remembers of the tokens it has seen.

Invariants:
- A cache holds the KV of the positions `[offset - n, offset)` in temporal order, `n` of them.
  A growing cache has `n == offset`; a rotating one may have dropped the oldest.
- Buffers are allocated in steps of `STEP` tokens and written in place; `nbytes` is what they take.
- `mask(L)` describes the KV that the next `update` of `L` tokens returns.
- Everything is lazy: no method evaluates, and none reads a value back.
- An update or a rewind changes all of a cache at its end, with nothing called in between: an
  interrupt finds it as it was before or as it is after.
- What is handed out stays as it was: writing `buffer[...] = x` rebinds that very array object, so
  a buffer never leaves the cache itself, only views of it do.
- While a sequence is decoded beside others its KV may lie in buffers that they share (`slots`): the
  cache is a row of them then. It reads through views, and the first write of its own copies it out.

The design follows Ollama's image engine (a `KVCache` that grows by 256 and a `RotatingKVCache`),
without its defects on chunks that wrap: docs/design.md says which.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import mlx.core as mx

from mlxkv.errors import UsageError
from mlxkv.kv_format import KV, KVFormat, Native, Rows, dense_both, storage_of

STEP = 256
"""Tokens by which a live cache grows: the unit of planning, sharing and storing as well."""

Mask = mx.array | str | None
"""`None`: every query sees every key; `"causal"`: aligned at the end; else bool `[L, S]`."""


def ceil_step(n_tokens: int) -> int:
    """The smallest multiple of `STEP` that holds `n_tokens`."""
    return -(-n_tokens // STEP) * STEP


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The only description of one layer's memory.

    Args:
        n_kv_heads: heads of keys and values; query heads do not matter.
        k_dim: values per key.
        v_dim: values per value vector.
        window: tokens that a sliding-window layer sees, its own included; None for all.
    """

    n_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None

    def n_rows(self, n_tokens: int) -> int:
        """Tokens that a live cache has room for once it has seen `n_tokens`."""
        rows = ceil_step(n_tokens)
        return rows if self.window is None else min(rows, self.window)

    def nbytes(self, n_tokens: int, kv: KVFormat) -> int:
        """Bytes that a live cache of one sequence allocates for `n_tokens`.

        n_kv_heads * (k_dim + v_dim) * bytes per value * min(n_tokens up to the next 256, window).
        """
        row = kv.row_bytes(self.k_dim) + kv.row_bytes(self.v_dim)
        return self.n_kv_heads * row * self.n_rows(n_tokens)

    @property
    def opaque(self) -> bool:
        """Whether what the layer keeps is something else than keys and values of tokens."""
        return self.n_kv_heads == 0

    def make(self, kv_type: str = "native") -> Cache:
        """An empty cache for this layer."""
        if self.window is None:
            return KVCache(self, kv_type)
        return RotatingKVCache(self.window, self, kv_type)


@dataclass(frozen=True, slots=True)
class Slice:
    """KV of the positions `[start, stop)`, as a cache stores it.

    Args:
        arrays: those of the keys, then those of the values; tokens lie along axis 2 of each.
        start: the first position.
        stop: the one behind the last.
    """

    arrays: tuple[mx.array, ...]
    start: int
    stop: int

    @property
    def k(self) -> mx.array:
        """Native keys `[B, H, stop - start, k_dim]`."""
        k, _ = self.arrays
        return k

    @property
    def v(self) -> mx.array:
        """Native values `[B, H, stop - start, v_dim]`."""
        _, v = self.arrays
        return v


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the next token of each of several sequences stands; not all at the same.

    Args:
        of: one position per sequence.
    """

    of: tuple[int, ...]

    @property
    def array(self) -> mx.array:
        """int32 `[B]`."""
        return _int32(self.of)

    def __add__(self, n: int) -> Positions:
        return Positions(tuple(position + n for position in self.of))


@functools.lru_cache(maxsize=8)
def _int32(numbers: tuple[int, ...]) -> mx.array:
    """Made once for a step's layers."""
    return mx.array(numbers, dtype=mx.int32)


Offset = int | Positions
"""Position of the next token: one for all sequences, or one for each."""


class LayerCache(Protocol):
    """What a model's layer asks of the cache it is given."""

    @property
    def offset(self) -> Offset: ...
    def update(self, k: mx.array, v: mx.array) -> tuple[KV, KV]: ...
    def mask(self, L: int) -> Mask: ...


class Cache(Protocol):
    """What one layer remembers, for B sequences of equal length."""

    spec: CacheSpec | None
    offset: int

    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def update(self, k: mx.array, v: mx.array) -> tuple[Rows, Rows]: ...
    def mask(self, L: int) -> Mask: ...
    @property
    def first(self) -> int: ...
    def read(self, start: int, stop: int) -> Slice: ...
    def load(self, parts: Sequence[Slice]) -> None: ...
    def rewind(self, offset: int) -> bool: ...
    @property
    def state(self) -> list[mx.array]: ...
    def reset(self) -> None: ...


def windowed_mask(L: int, n_before: int, window: int) -> mx.array:
    """Causal mask of a sliding window.

    Query `i` stands at position `n_before + i` of the keys and sees the last `window` of them,
    itself included.

    Returns:
        bool `[L, n_before + L]`.
    """
    queries = mx.arange(n_before, n_before + L)[:, None]
    keys = mx.arange(n_before + L)[None]
    return (keys <= queries) & (keys > queries - window)


class SharedRow(Protocol):
    """A row of buffers that several sequences share."""

    @property
    def nbytes(self) -> int: ...
    def views(self, n_rows: int) -> list[mx.array]: ...


class _Buffers:
    """Buffers `[B, H, capacity, D]` of the arrays that a format keeps of keys and values.

    Attributes:
        buffers: its own; `[]` while it is empty or `row` is set.
        row: where its KV is while its buffers are shared.
    """

    def __init__(self, spec: CacheSpec | None = None, kv_type: str = "native"):
        self.spec = spec
        self.kv_type = kv_type
        self.offset = 0
        self._storage = storage_of(kv_type)
        self._rows: tuple[Any, ...] = ()
        self.row: SharedRow | None = None
        self._release()

    def _release(self) -> None:
        self.buffers: list[mx.array] = []
        self.row = None

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
        allocated = sum(array.nbytes for array in self.arrays)
        return allocated * (self.offset - self.first) // max(self.capacity, 1)

    @property
    def max_rows(self) -> int | None:
        """Tokens that are held at the most while one comes at a time; None for any number."""
        raise NotImplementedError

    def n_rows(self, n_tokens: int) -> int:
        """Tokens that there is room for once it has seen `n_tokens`."""
        rows = ceil_step(n_tokens)
        return rows if self.max_rows is None else min(rows, self.max_rows)

    def share(self, row: SharedRow) -> None:
        """Have the KV held lie in a row of shared buffers from here on.

        The token at position p is at `p % max_rows` there, or at `p`.
        """
        self.buffers, self.row = [], row

    def advance(self) -> None:
        """One more token was written into the shared row."""
        self.offset += 1

    def encoded(self, k: mx.array, v: mx.array) -> list[mx.array]:
        """What is stored of keys and values `[B, H, L, D]`, of B sequences like this one."""
        return self._storage.encode_both(k, v)

    def decoded(self, arrays: Sequence[mx.array], n: int) -> tuple[Rows, Rows]:
        """Keys and values of the first `n` tokens of what is stored."""
        return self._storage.decode_both(arrays, n, *self._rows[2:4])

    @property
    def first(self) -> int:
        """The oldest position held."""
        raise NotImplementedError

    def read(self, start: int, stop: int) -> Slice:
        raise NotImplementedError

    def repacked(self, kv_type: str) -> Self:
        """An empty cache of the same kind in another format, with what this one holds."""
        cache = self._empty(kv_type)
        if self.offset:
            held = self.read(self.first, self.offset)
            n = held.stop - held.start
            k, v = self._storage.decode_both(held.arrays, n, *self._rows[2:4])
            arrays = cache._storage.encode_both(*dense_both(k, v))
            cache._rows = self._rows
            cache.load([Slice(tuple(arrays), held.start, held.stop)])
        return cache

    def _empty(self, kv_type: str) -> Self:
        raise NotImplementedError

    def load(self, parts: Sequence[Slice]) -> None:
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything and give the buffers back."""
        self.offset = 0
        self._rows = ()
        self._release()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """`update` for mlx-lm's model definitions, which know nothing of packed rows."""
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
            raise UsageError("a cache without a spec does not know what packed slices hold")
        n = storage.n_arrays(*((spec.k_dim, spec.v_dim) if spec else (1, 1)))
        if len(arrays) != n or any(x.ndim != 4 for part in parts for x in part.arrays):
            raise UsageError(f"slices of {len(arrays)} arrays are not of KV format {self.kv_type}")
        B, H = arrays[0].shape[:2]
        v_dtype = arrays[-1].dtype  # of packed rows: of the biases, and so the keys' as well
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

    def _reserved(self, arrays: Sequence[mx.array], n_used: int, capacity: int) -> list[mx.array]:
        """Buffers for `capacity` tokens, the first `n_used` kept: growth copies, here."""
        held = self.arrays
        if not held:
            return [_rows_like(x, capacity) for x in arrays]
        if capacity == self.capacity:
            return held
        return [extended(buffer, n_used, capacity) for buffer in held]


def _write(buffers: Sequence[mx.array], arrays: Sequence[mx.array], start: int, stop: int) -> None:
    """Write rows in place."""
    for buffer, x in zip(buffers, arrays, strict=True):
        buffer[:, :, start:stop] = x


def _row(x: mx.array) -> tuple[int, int, int, mx.Dtype]:
    """What tokens have in common."""
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
    room = _rows_like(buffer, capacity - n_used)
    return mx.concatenate([buffer[:, :, :n_used], room], axis=2)


def _filled(arrays: Sequence[mx.array], skip: int, capacity: int) -> mx.array:
    """A buffer of `capacity` rows that begins with the rows of `arrays`, the first few skipped."""
    first, *rest = arrays
    arrays = [first[:, :, skip:], *rest]
    n = sum(x.shape[2] for x in arrays)
    room = [_rows_like(first, capacity - n)] if n < capacity else []
    return mx.contiguous(mx.concatenate([*arrays, *room], axis=2))


class KVCache(_Buffers):
    """Grows without bound, `STEP` tokens at a time.

    Args:
        spec: the layer's shape, checked on the first update; None takes what comes.
        kv_type: one of `KV_TYPES`.
    """

    def __len__(self) -> int:
        return self.offset

    def _empty(self, kv_type: str) -> KVCache:
        return KVCache(self.spec, kv_type)

    def update(self, k: mx.array, v: mx.array) -> tuple[Rows, Rows]:
        """Append L tokens.

        Args:
            k: `[B, H, L, k_dim]`.
            v: `[B, H, L, v_dim]`.

        Returns:
            All keys `[B, H, offset, k_dim]` and values.

        Raises:
            UsageError: the shapes do not fit each other or what is held.
        """
        start, stop = self.offset, self.offset + self._check(k, v)
        arrays, buffers = self._storage.encode_both(k, v), self.arrays
        if stop > self.capacity:
            buffers = self._reserved(arrays, start, ceil_step(stop))
        _write(buffers, arrays, start, stop)  # behind what is held
        self.buffers, self.row, self.offset = buffers, None, stop
        return self._storage.decode_both(buffers, stop, *self._rows[2:4])

    def mask(self, L: int) -> Mask:
        """Mask for the KV that an update of `L` tokens will return."""
        return None if L == 1 else "causal"

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """`mask` under the name and with the options that mlx-lm's model definitions use."""
        stop = self.offset + N
        if window_size is not None and stop > window_size:
            return windowed_mask(N, self.offset, window_size)
        if return_array and N > 1:
            return windowed_mask(N, self.offset, stop)
        return self.mask(N)

    @property
    def max_rows(self) -> int | None:
        """None: all tokens are held."""
        return None

    @property
    def first(self) -> int:
        """The oldest position held."""
        return 0

    def load(self, parts: Sequence[Slice]) -> None:
        """Hold exactly the tokens of consecutive slices, from position 0 on.

        Raises:
            UsageError: they do not begin at 0, leave a gap, or have other shapes.
        """
        self._load(parts, 0, ceil_step(parts[-1].stop))

    def read(self, start: int, stop: int) -> Slice:
        """KV of the positions `[start, stop)`.

        Raises:
            UsageError: some of them are not held.
        """
        self._check_range(start, stop, 0)
        arrays = self.arrays
        if not arrays:
            return Slice(self._nothing(), start, stop)
        return Slice(tuple(array[:, :, start:stop] for array in arrays), start, stop)

    def rewind(self, offset: int) -> bool:
        """Forget the tokens from `offset` on; always possible, and the buffers stay.

        Raises:
            UsageError: `offset` is negative or lies ahead.
        """
        self._check_rewind(offset)
        self.offset = offset
        return True

    @property
    def state(self) -> list[mx.array]:
        """Arrays held, to evaluate or save; `[]` when empty."""
        if self.offset == 0:
            return []
        return [array[:, :, : self.offset] for array in self.arrays]


class RotatingKVCache(_Buffers):
    """Keeps what a sliding window of `max_size` tokens needs.

    Single tokens are written in place, over the oldest once `max_size` are held. A chunk of L
    tokens is appended in temporal order to at most `max_size - 1` earlier ones, so that its first
    query sees its whole window; the surplus is dropped by the next update, and until then
    `rewind` can give it back.

    Rows lie in temporal order from `_head` on and wrap at `capacity`; `_head` is other than 0
    only in a full ring of `max_size`.

    Args:
        max_size: tokens that a query sees, itself included; at least 1.
        spec: the layer's shape, checked on the first update; None takes what comes.
        kv_type: one of `KV_TYPES`.

    Raises:
        UsageError: `max_size` is not positive.
    """

    def __init__(self, max_size: int, spec: CacheSpec | None = None, kv_type: str = "native"):
        if max_size < 1:
            raise UsageError(f"max_size must be at least 1; got {max_size}")
        super().__init__(spec, kv_type)
        self.max_size = max_size
        self._n = 0
        self._head = 0

    def __len__(self) -> int:
        return min(self._n, self.max_size)

    def _empty(self, kv_type: str) -> RotatingKVCache:
        return RotatingKVCache(self.max_size, self.spec, kv_type)

    def reset(self) -> None:
        """Forget everything and give the buffers back."""
        super().reset()
        self._n = self._head = 0

    def update(self, k: mx.array, v: mx.array) -> tuple[Rows, Rows]:
        """Append L tokens.

        Args:
            k: `[B, H, L, k_dim]`.
            v: `[B, H, L, v_dim]`.

        Returns:
            Keys `[B, H, S, k_dim]` and values. One token: everything its window holds, in any
            order. A chunk: at most `max_size - 1` earlier tokens and the chunk, in temporal order.

        Raises:
            UsageError: the shapes do not fit each other or what is held.
        """
        L = self._check(k, v)
        arrays = self._storage.encode_both(k, v)
        if self.row is not None and self._head and self._n < self.max_size:
            self._straighten()  # in buffers of its own only a full ring begins behind 0
        if self._n + L <= self.max_size:
            buffers, n, head = self._appended(arrays, L)
        elif L == 1:
            buffers, n, head = self._overwritten(arrays)
        else:
            buffers, n, head = self._concatenated(arrays, L)
        self.buffers, self.row, self._n, self._head, self.offset = (
            buffers,
            None,
            n,
            head,
            self.offset + L,
        )
        return self._storage.decode_both(buffers, n, *self._rows[2:4])

    def _appended(self, arrays: Sequence[mx.array], L: int) -> tuple[list[mx.array], int, int]:
        start, stop, buffers = self._n, self._n + L, self.arrays
        # Too large where a chunk's surplus was rewound: no longer needed, so given back.
        if stop > self.capacity or self.capacity > self.max_size:
            buffers = self._reserved(arrays, start, min(ceil_step(stop), self.max_size))
        _write(buffers, arrays, start, stop)  # behind what is held
        return buffers, stop, self._head

    def _overwritten(self, arrays: Sequence[mx.array]) -> tuple[list[mx.array], int, int]:
        # New handles on the same memory: until the update is done the old ones show what was held.
        at, buffers = self._head, [array[...] for array in self.arrays]
        if self._n > self.max_size or self.capacity > self.max_size:
            # The surplus of a chunk: from here on it is a ring of max_size rows. A view would keep
            # the surplus allocated for as long as the ring lives.
            old = self._temporal(self._n - self.max_size, self._n)
            at, buffers = 0, [mx.contiguous(x) for x in old]
        head = (at + 1) % self.max_size
        _write(buffers, arrays, at, at + 1)
        return buffers, self.max_size, head

    def _concatenated(self, arrays: Sequence[mx.array], L: int) -> tuple[list[mx.array], int, int]:
        kept = min(self._n, self.max_size - 1)
        if kept == 0:
            # The caller's array may be a view into something larger.
            return [mx.contiguous(x) for x in arrays], L, 0
        old = self._temporal(self._n - kept, self._n)
        pairs = zip(old, arrays, strict=True)
        return [mx.concatenate(list(pair), axis=2) for pair in pairs], kept + L, 0

    def _temporal(self, start: int, stop: int) -> tuple[mx.array, ...]:
        """Rows `[start, stop)` counted from the oldest, in temporal order."""
        start, stop = start + self._head, stop + self._head
        arrays, capacity = self.arrays, self.capacity
        if start >= capacity:
            start, stop = start - capacity, stop - capacity
        if stop <= capacity:
            return tuple(array[:, :, start:stop] for array in arrays)
        stop -= capacity
        return tuple(
            mx.concatenate([array[:, :, start:], array[:, :, :stop]], axis=2) for array in arrays
        )

    def mask(self, L: int) -> Mask:
        """Mask for the KV that an update of `L` tokens will return."""
        if L == 1:
            return None
        kept = min(self._n, self.max_size - 1)
        if kept + L <= self.max_size:
            return "causal"
        return windowed_mask(L, kept, self.max_size)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """`mask` under the name and with the options that mlx-lm's model definitions use."""
        window = min(self.max_size, window_size or self.max_size)
        if window < self.max_size:
            raise UsageError(f"a cache of window {self.max_size} cannot mask one of {window}")
        if return_array and N > 1:
            return windowed_mask(N, min(self._n, self.max_size - 1), window)
        return self.mask(N)

    @property
    def max_rows(self) -> int | None:
        """The window."""
        return self.max_size

    def share(self, row: SharedRow) -> None:
        n = min(self._n, self.max_size)
        self.buffers, self.row, self._n = [], row, n
        self._head = self._ring_head()

    def advance(self) -> None:
        self.offset, self._n = self.offset + 1, min(self._n + 1, self.max_size)
        self._head = self._ring_head()

    def _ring_head(self) -> int:
        """Where the oldest token is if that at position p is at `p % max_size`."""
        return (self.offset - self._n) % self.max_size

    @property
    def first(self) -> int:
        """The oldest position held."""
        return self.offset - self._n

    def load(self, parts: Sequence[Slice]) -> None:
        """Go on behind consecutive slices: what the window needs of them is held.

        Raises:
            UsageError: they hold less than `max_size - 1` tokens before their end and do not begin
                at 0, leave a gap, or have other shapes.
        """
        stop = parts[-1].stop
        needed = max(0, stop - (self.max_size - 1))
        # A whole window where there is one: the next single token then meets the very rows that a
        # cache which never stopped has.
        self._n = self._load(parts, needed, min(ceil_step(stop), self.max_size))

    def read(self, start: int, stop: int) -> Slice:
        """KV of the positions `[start, stop)`, in temporal order.

        Raises:
            UsageError: some of them are not held.
        """
        first = self.first
        self._check_range(start, stop, first)
        if not self.arrays:
            return Slice(self._nothing(), start, stop)
        return Slice(self._temporal(start - first, stop - first), start, stop)

    def rewind(self, offset: int) -> bool:
        """Forget the tokens from `offset` on.

        Returns:
            False, with nothing changed, where a token that the next one would see is gone.

        Raises:
            UsageError: `offset` is negative or lies ahead.
        """
        self._check_rewind(offset)
        if offset == self.offset:
            return True
        first = self.first
        first_needed = max(0, offset - (self.max_size - 1))
        if first_needed < offset and first > first_needed:
            return False
        if self._head:
            self._straighten()
        self._n, self.offset = max(0, offset - first), offset
        return True

    def _straighten(self) -> None:
        """Have the rows begin at 0, in buffers of its own."""
        buffers = list(self._temporal(0, self._n))
        self.buffers, self.row, self._head = buffers, None, 0

    @property
    def state(self) -> list[mx.array]:
        """Arrays held, to evaluate or save; `[]` if none. A ring is in its own order."""
        if self._n == 0:
            return []
        return [array[:, :, : self._n] for array in self.arrays]


class _HasSpecs(Protocol):
    def cache_specs(self) -> Iterable[CacheSpec | None]: ...


def make_caches(model: _HasSpecs, kv_type: str = "native") -> list[Cache]:
    """Empty caches for a model, one for each layer that owns KV.

    Raises:
        UsageError: `kv_type` is not one of `KV_TYPES`.
    """
    storage_of(kv_type)
    return [spec.make(kv_type) for spec in model.cache_specs() if spec is not None]
