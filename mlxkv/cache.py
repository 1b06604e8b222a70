"""KV caches: the keys and values of one layer. `RecurrentCache` is that of a layer with a state.

Invariants:
- A cache holds the KV of the positions `[offset - n, offset)` in temporal order, `n` of them.
  A growing cache has `n == offset`; a rotating one may have dropped the oldest.
- Buffers are allocated in steps of `STEP` tokens and written in place; `nbytes` is what they take.
- `mask(L)` describes the KV that the next `update` of `L` tokens returns.
- Everything is lazy: no method evaluates, and none reads a value back.
- An update or a rewind stores everything at its end, with nothing called in between: an
  interrupt finds the cache as it was before or as it is after.
- Arrays that were returned do not change: `buffer[...] = x` rebinds the array object that it is
  called on, so a cache returns only views of a buffer, never the buffer.
- While a sequence is decoded in a batch, its KV may be a row of shared buffers (`slots`). The cache
  reads it through views, and its first write outside of the batch copies it out.

The design follows Ollama's image engine (a `KVCache` that grows by 256 and a `RotatingKVCache`),
without its defects on chunks that wrap: docs/design.md says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from mlxkv.errors import UsageError
from mlxkv.kv.buffers import Buffers
from mlxkv.kv.layout import Cache, Mask, Place, SharedRow, Slice, StateSpec, windowed_mask
from mlxkv.kv.recurrent import RecurrentCache
from mlxkv.kv.sliding import Sliding
from mlxkv.kv.storage import Rows
from mlxkv.kv.types import CacheSpec, KVFormat, RecurrentSpec, ceil_step


class KVCache(Buffers):
    """Grows without bound, `STEP` tokens at a time.

    Args:
        spec: the layer's shape, checked on the first update; None: not checked.
        kv_type: one of `KV_TYPES`.
    """

    __slots__ = ()

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
        arrays, buffers = self.encoded(k, v), self.arrays
        if stop > self.capacity:
            buffers = self._reserved(arrays, start, ceil_step(stop))
        buffers = self._written(buffers, arrays, start, stop)
        self.buffers, self.row, self.offset = buffers, None, stop
        return self.decoded(buffers, stop)

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

    def load(self, parts: Sequence[Slice], room: int = 0) -> None:
        """Hold exactly the tokens of consecutive slices, from position 0 on.

        Args:
            parts: the slices.
            room: tokens that come next, for which buffers need not grow.

        Raises:
            UsageError: they do not begin at 0, leave a gap, or have other shapes.
        """
        self._load(parts, 0, ceil_step(parts[-1].stop + room))

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
        return self.columns(self.offset)


class RotatingKVCache(Sliding):
    """Keeps what a sliding window of `max_size` tokens needs.

    Single tokens are written in place, over the oldest once `max_size` are held. A chunk of L
    tokens is appended in temporal order to at most `max_size - 1` earlier ones, so that its first
    query sees its whole window; the surplus is dropped by the next update, and until then
    `rewind` can give it back. Drafts are written into room behind the window (`make_room`).

    Rows are in temporal order from `_head` on and wrap at `capacity`; `_head` is not 0 only in a
    full ring of `max_size`, and in longer buffers, which do not wrap.

    Args:
        max_size: tokens that a query sees, itself included; at least 1.
        spec: the layer's shape, checked on the first update; None: not checked.
        kv_type: one of `KV_TYPES`.

    Raises:
        UsageError: `max_size` is not positive.
    """

    __slots__ = ()

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
        arrays = self.encoded(k, v)
        if self._has_behind(L):
            return self._behind(arrays, L)
        if self._head and self._n < self.max_size:
            self._straighten()  # a row of shared buffers, or what was taken back
        if self._n + L <= self.max_size:
            buffers, n, head = self._appended(arrays, L)
        elif L == 1:
            buffers, n, head = self._overwritten(arrays)
        else:
            buffers, n, head = self._concatenated(arrays, L)
        offset = self.offset + L
        self.buffers, self.row, self._n, self._head, self.offset = buffers, None, n, head, offset
        return self.decoded(buffers, n)

    def _appended(self, arrays: Sequence[mx.array], L: int) -> tuple[list[mx.array], int, int]:
        start, stop, buffers = self._n, self._n + L, self.arrays
        # Too large where a chunk's surplus was rewound: no longer needed, so given back.
        if stop > self.capacity or self.capacity > self.max_size:
            buffers = self._reserved(arrays, start, min(ceil_step(stop), self.max_size))
        return self._written(buffers, arrays, start, stop), stop, self._head

    def _overwritten(self, arrays: Sequence[mx.array]) -> tuple[list[mx.array], int, int]:
        # New array objects on the same memory: the old ones stay valid until the update is done.
        at, buffers = self._head, [array[...] for array in self.arrays]
        if self._n > self.max_size or self.capacity > self.max_size:
            # Drop a chunk's surplus: from here on this is a ring of max_size rows. A view would
            # keep the surplus allocated.
            old = self._temporal(self._n - self.max_size, self._n)
            at, buffers = 0, [self.copied(x) for x in old]
        head = (at + 1) % self.max_size
        return self._written(buffers, arrays, at, at + 1), self.max_size, head

    def _concatenated(self, arrays: Sequence[mx.array], L: int) -> tuple[list[mx.array], int, int]:
        kept = min(self._n, self.max_size - 1)
        if kept == 0:
            # The caller's array may be a view into something larger.
            return [self.copied(x) for x in arrays], L, 0
        old = self._temporal(self._n - kept, self._n)
        pairs = zip(old, arrays, strict=True)
        return [mx.concatenate(list(pair), axis=2) for pair in pairs], kept + L, 0

    def next_place(self, n: int = 1) -> Place | None:
        held, size, capacity = self._n, self.max_size, self.capacity
        if self._has_behind(n):
            return self._place_behind(n)
        if n > 1:  # over the oldest ones they could not be taken back
            return self._place(held, n) if held + n <= capacity <= size else None
        fits = capacity == size or held < capacity < size
        column, length = held if held < size else self._head, min(held + 1, size)
        return self._place(column, length=length) if fits else None

    def stepped(self, keys: mx.array, values: mx.array, n: int = 1) -> None:
        if self._has_behind(n):
            self._moved_on([keys, values], n)
            return
        held, head, offset = self._n + n, self._head, self.offset + n
        if held > self.max_size:
            held, head = self.max_size, (head + 1) % self.max_size
        self.buffers, self._n, self._head, self.offset = [keys, values], held, head, offset

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
        self._head = (self.offset - n) % self.max_size

    @classmethod
    def advance(cls, caches: Iterable[Any], offsets: Iterable[int]) -> None:
        for cache, offset in zip(caches, offsets, strict=True):
            cache.offset = offset
            if cache._n < cache.max_size:
                cache._n += 1  # behind the others: the oldest stays where it is
            else:
                cache._head = offset % cache.max_size

    @property
    def first(self) -> int:
        """The oldest position held."""
        return self.offset - self._n

    def load(self, parts: Sequence[Slice], room: int = 0) -> None:
        """Hold what the window needs of consecutive slices.

        Args:
            parts: the slices.
            room: tokens that come next, for which buffers need not grow.

        Raises:
            UsageError: they hold less than `max_size - 1` tokens before their end and do not begin
                at 0, leave a gap, or have other shapes.
        """
        stop = parts[-1].stop
        needed = max(0, stop - (self.max_size - 1))
        # A whole window if there is one: the next token then sees the same rows as in a cache that
        # was never interrupted.
        self._n = self._load(parts, needed, min(ceil_step(stop + room), self.max_size))

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
        if self._head and (self._wraps or self.row is not None):
            self._straighten()
        self._n, self.offset = max(0, offset - first), offset
        return True

    @property
    def state(self) -> list[mx.array]:
        """Arrays held, to evaluate or save; `[]` if none. A ring is in its own order."""
        if self._head and not self._wraps:
            return list(self._temporal(0, self._n))
        return self.columns(self._n)


class _HasSpecs(Protocol):
    def cache_specs(self) -> Iterable[CacheSpec | None]: ...


def make_caches(model: _HasSpecs, kv_type: str = "native") -> list[Cache]:
    """Empty caches for a model, one for each layer that owns KV.

    Args:
        model: gives a spec of each layer.
        kv_type: one of `KV_TYPES`, or formats of layers, like `k8v4,0=native`.

    Raises:
        UsageError: `kv_type` is neither, or names a layer that is not there.
    """
    return [_make(spec, kv.name) for spec, kv in KVFormat(kv_type).layers(model.cache_specs())]


def _make(spec: CacheSpec, kv_type: str) -> Cache:
    if isinstance(spec, RecurrentSpec):
        return RecurrentCache(spec)
    return spec.make() if isinstance(spec, StateSpec) else make_cache(spec, kv_type)


def convert_caches(caches: list[Cache], kv_type: str) -> None:
    """Put caches of keys and values into another format, in place and one after the other."""
    for i, cache in enumerate(caches):
        if isinstance(cache, KVCache | RotatingKVCache):
            caches[i] = cache = cache.converted(kv_type)
            mx.eval(cache.state)


def make_cache(spec: CacheSpec, kv_type: str = "native") -> KVCache | RotatingKVCache:
    """An empty cache for one layer of keys and values.

    Raises:
        UsageError: `kv_type` is not one of `KV_TYPES`.
    """
    if spec.window is None:
        return KVCache(spec, kv_type)
    return RotatingKVCache(spec.window, spec, kv_type)
