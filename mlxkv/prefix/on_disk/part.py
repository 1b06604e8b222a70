"""One part of a page in RAM: the KV of its layers in one array.

Invariants:
- A part is one array: Metal limits how many arrays a process may have.
- Arrays of one dtype and shape lie behind each other in a block, blocks of larger items first.
  Joining them costs one launch for each array, and one for each block where there are several.
- The array's items are unsigned and as large as the smallest item: every block begins at a multiple
  of its own items, and a part has fewer than 2**31 items, as MLX requires.
- A part keeps no cache's buffer alive: it is a copy, and a cache copies what it loads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import mlx.core as mx

from mlxkv.kv.layout import Cache, Slice
from mlxkv.kv.types import AT_ONCE, STEP

_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@dataclass(frozen=True, slots=True)
class Rows:
    """Dtype and shape `(B, H, D)` of one token in an array `[B, H, S, D]`."""

    dtype: mx.Dtype
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, x: mx.array) -> Self:
        """Those of an array `[B, H, S, D]`."""
        B, H, _, D = x.shape
        return cls(x.dtype, (B, H, D))


@dataclass(frozen=True, slots=True)
class Block:
    """Arrays of equal rows.

    Args:
        rows: of each of them.
        places: (layer, array of the layer) of each, in order.
    """

    rows: Rows
    places: tuple[tuple[int, int], ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all arrays."""
        return len(self.places) * prod(self.rows.shape) * self.rows.dtype.size

    def shape(self, n_tokens: int) -> tuple[int, int, int, int]:
        """Of all arrays behind each other: `[n * B, H, S, D]`."""
        B, H, D = self.rows.shape
        return len(self.places) * B, H, n_tokens, D


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the arrays of some layers lie in a part of any number of tokens."""

    blocks: tuple[Block, ...]
    n_layers: int

    @classmethod
    def of(cls, layers: Sequence[Iterable[Rows]]) -> Self:
        """Of the rows that each layer keeps."""
        found: dict[Rows, list[tuple[int, int]]] = {}
        for i, arrays in enumerate(layers):
            for j, rows in enumerate(arrays):
                found.setdefault(rows, []).append((i, j))
        blocks = [Block(rows, tuple(places)) for rows, places in found.items()]
        return cls(tuple(sorted(blocks, key=lambda x: -x.rows.dtype.size)), len(layers))

    @property
    def word(self) -> mx.Dtype:
        """The array's dtype."""
        return _WORDS[min(block.rows.dtype.size for block in self.blocks)]

    def spans(self, n_tokens: int) -> Iterator[tuple[Block, int, int]]:
        """Each block with its start and end in words."""
        start = 0
        for block in self.blocks:
            stop = start + n_tokens * block.token_bytes // self.word.size
            yield block, start, stop
            start = stop


@dataclass(frozen=True, slots=True)
class Part:
    """KV of some layers at the positions `[start, stop)`.

    Args:
        words: one dimension of `layout.word`.
        layout: of the array.
        start: the first position.
        stop: the one behind the last.
    """

    words: mx.array
    layout: Layout
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.words.nbytes

    @classmethod
    def of(cls, slices: Sequence[Slice]) -> Self:
        """A part of one slice of each layer at the same positions, lazily."""
        layout = Layout.of([map(Rows.of, piece.arrays) for piece in slices])
        blocks = [
            _copied([slices[i].arrays[j] for i, j in block.places], axis=0)
            for block in layout.blocks
        ]
        return cls(_flat(blocks, layout.word), layout, slices[0].start, slices[0].stop)

    @classmethod
    def join(cls, parts: Sequence[Part]) -> Part:
        """Consecutive parts of the same layers as one, lazily."""
        first, last = parts[0], parts[-1]
        if len(parts) == 1:
            return first
        assert all(part.layout == first.layout for part in parts)
        blocks = zip(*(part.blocks() for part in parts), strict=True)
        joined = [_copied(pieces, axis=2) for pieces in blocks]
        return cls(_flat(joined, first.layout.word), first.layout, first.start, last.stop)

    def before(self, stop: int) -> Part:
        """The part before position `stop`, as a copy unless that is all."""
        if stop >= self.stop:
            return self
        blocks = [mx.contiguous(block) for block in self.blocks(stop)]
        return Part(_flat(blocks, self.layout.word), self.layout, self.start, stop)

    def slices(self, stop: int | None = None) -> list[Slice]:
        """Views for each layer, of all positions or of those before `stop`."""
        stop = self.stop if stop is None else min(stop, self.stop)
        layers: list[dict[int, mx.array]] = [{} for _ in range(self.layout.n_layers)]
        for block, arrays in zip(self.layout.blocks, self.blocks(stop), strict=True):
            some = mx.split(arrays, len(block.places), axis=0)
            for (i, j), array in zip(block.places, some, strict=True):
                layers[i][j] = array
        return [
            Slice(tuple(arrays[j] for j in range(len(arrays))), self.start, stop)
            for arrays in layers
        ]

    def blocks(self, stop: int | None = None) -> list[mx.array]:
        """Views `[n * B, H, S, D]`, of all positions or of those before `stop`."""
        n_tokens = self.stop - self.start
        views = [
            self.words[start:end].view(block.rows.dtype).reshape(block.shape(n_tokens))
            for block, start, end in self.layout.spans(n_tokens)
        ]
        if stop is None or stop >= self.stop:
            return views
        return [view[:, :, : stop - self.start] for view in views]


def load_parts(caches: Sequence[Cache], parts: Sequence[Part], stop: int, room: int = 0) -> None:
    """Fill caches with the same part of consecutive pages, some caches at a time.

    Args:
        caches: of the part's layers.
        parts: what `Cache.load` needs.
        stop: the position to resume at.
        room: tokens that come next; for a step of them caches need not grow.

    Raises:
        UsageError: they do not fit the caches.
    """
    pages, loaded = [part.slices(stop) for part in parts], list[Cache]()
    for i, cache in enumerate(caches):
        cache.load([slices[i] for slices in pages], min(room, STEP))
        loaded.append(cache)
        if sum(cache.nbytes for cache in loaded) >= AT_ONCE:
            mx.eval([cache.state for cache in loaded])
            loaded.clear()
    mx.eval([cache.state for cache in loaded])


def _copied(arrays: Sequence[mx.array], axis: int) -> mx.array:
    """Arrays behind each other, copied."""
    # `concatenate` returns a single array itself. Its result of several is contiguous, and
    # `contiguous` would copy it again where Metal reused a buffer 16 KiB larger.
    return mx.concatenate(list(arrays), axis) if len(arrays) > 1 else mx.contiguous(arrays[0])


def _flat(blocks: Sequence[mx.array], word: mx.Dtype) -> mx.array:
    """Contiguous blocks behind each other as words."""
    return mx.concatenate([block.reshape(-1).view(word) for block in blocks if block.size])
