"""The types of a cache's interface: slices of tokens, positions, masks, protocols."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import mlx.core as mx

from mlxkv.kv.storage import KV, Rows
from mlxkv.kv.types import CacheSpec


@dataclass(frozen=True, slots=True)
class TwoWayMask:
    """The mask of a chunk with runs of tokens that see each other both ways.

    Args:
        array: bool `[L, S]`.
        runs: first token of each run and the one behind its last, counted within the chunk.
    """

    array: mx.array
    runs: Sequence[tuple[int, int]]

    def n_seen(self, stop: int) -> int:
        """How many of the chunk's tokens its queries before `stop` see."""
        return next((end for start, end in self.runs if start < stop <= end), stop)


Mask = mx.array | TwoWayMask | str | None
"""`None`: every query sees every key; `"causal"`: aligned at the end; else bool `[L, S]`."""


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


@dataclass(frozen=True)
class Positions:
    """Positions of the next token of several sequences, which differ."""

    of: tuple[int, ...]

    @functools.cached_property
    def array(self) -> mx.array:
        """int32 `[B]`, made once for a step's layers."""
        return mx.array(self.of, dtype=mx.int32)

    def __add__(self, n: int) -> Positions:
        return Positions(tuple(position + n for position in self.of))


Offset = int | Positions
"""Position of the next token: one for all sequences, or one for each."""


class Place(NamedTuple):
    """Where a kernel writes the next token of each of B sequences, and what that token sees; or the
    next B tokens of one.

    Args:
        keys: a buffer `[B, H, capacity, k_dim]`, `[1, ...]` of one sequence; float or not.
        values: the same of the values.
        positions: of the tokens.
        columns: where their keys and values are written.
        lengths: columns that they see.
        starts: the first of these; () for the buffers' first.
    """

    keys: mx.array
    values: mx.array
    positions: tuple[int, ...]
    columns: tuple[int, ...]
    lengths: tuple[int, ...]
    starts: tuple[int, ...] = ()


class Stepping:
    """A layer's KV that a kernel may extend: by a token of each sequence, or by several of one."""

    __slots__ = ()

    def next_place(self) -> Place | None:
        """Where to; None where only `update` can do it: it has to grow, or is quantized."""
        raise NotImplementedError

    def stepped(self, keys: mx.array, values: mx.array) -> None:
        """Take the buffers of `next_place` with the tokens' keys and values in them."""
        raise NotImplementedError


class LayerCache(Protocol):
    """What a model's layer needs of a cache."""

    @property
    def offset(self) -> Offset: ...
    def update(self, k: mx.array, v: mx.array) -> tuple[KV, KV]: ...
    def mask(self, L: int) -> Mask: ...


Replay = Callable[[int], Sequence[mx.array]]
"""How many tokens of the last `store` -> the state behind these; behind 0 the one before."""


class StateCache(Protocol):
    """What a layer that keeps a state needs of a cache."""

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The state of each sequence, along the first axis; `()` before the first token."""
        ...

    @property
    def is_drafted(self) -> bool:
        """Whether some of the next tokens may be taken back: `store` is given `replay`."""
        ...

    def store(self, arrays: Sequence[mx.array], n_new: int, replay: Replay | None = None) -> None:
        """Replace it by the one that `n_new` more tokens leave."""
        ...


Caches = Sequence[LayerCache] | None
"""One for each layer that owns KV; None for one pass over a whole sequence."""


class Cache(Protocol):
    """The KV of one layer, for B sequences of equal length."""

    spec: CacheSpec | None

    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def update(self, k: mx.array, v: mx.array) -> tuple[Rows, Rows]: ...
    def mask(self, L: int) -> Mask: ...
    @property
    def first(self) -> int: ...
    def read(self, start: int, stop: int) -> Slice: ...
    def load(self, parts: Sequence[Slice], room: int = 0) -> None: ...
    def rewind(self, offset: int) -> bool: ...
    @property
    def state(self) -> list[mx.array]: ...
    def reset(self) -> None: ...


@runtime_checkable
class StateSpec(Protocol):
    """A spec of a state other than keys and values, which makes its own cache."""

    def make(self) -> Cache: ...


def windowed_mask(L: int, n_before: int, window: int) -> mx.array:
    """Causal mask of a sliding window.

    Query `i` is at position `n_before + i` of the keys and sees `window` keys up to its own.

    Returns:
        bool `[L, n_before + L]`.
    """
    queries = mx.arange(n_before, n_before + L)[:, None]
    keys = mx.arange(n_before + L)[None]
    return (keys <= queries) & (keys > queries - window)


def two_way_mask(
    L: int, n_before: int, window: int | None, runs: Sequence[tuple[int, int]]
) -> TwoWayMask:
    """`windowed_mask`, where a query in one of `runs` sees that run to its end.

    Args:
        L: tokens of the chunk.
        n_before: keys before it.
        window: None for no window.
        runs: see `TwoWayMask`; in order and apart.
    """
    last = list(range(n_before, n_before + L))
    for start, stop in runs:
        last[start:stop] = [n_before + stop - 1] * (stop - start)
    keys = mx.arange(n_before + L)[None]
    seen = keys <= mx.array(last)[:, None]
    if window is not None and n_before + L > window:
        seen = seen & (keys > mx.arange(n_before - window, n_before - window + L)[:, None])
    return TwoWayMask(seen, runs)


class SharedRow(Protocol):
    """A row of buffers that several sequences share."""

    @property
    def nbytes(self) -> int: ...
    @property
    def token_bytes(self) -> int: ...
    def views(self, n_rows: int) -> list[mx.array]: ...
