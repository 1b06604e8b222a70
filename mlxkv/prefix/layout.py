"""The parts of a page, and its place in its chain."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from struct import pack

from mlxkv.kv.types import STEP, CacheSpec, RecurrentSpec
from mlxkv.prefix.on_disk.format import ROOT, PageKey, page_name

FULL, WINDOW = "full", "window"
"""The parts of a page: KV of the layers without a window, and of the others. In models with layers
that keep a state the second is their state behind the page's last token, which few pages have."""
GRID = 8 * STEP
"""Tokens between the states that are kept of a long sequence, see `is_on_grid`."""


@dataclass(frozen=True, slots=True)
class Kinds:
    """The caches that the parts of a page belong to.

    Args:
        full: indices of the caches that keep every token.
        window: indices of those that rotate.
        reach: the largest window: tokens that a layer attends to, the next one included.
        stride: the smallest window: tokens after which a cache has overwritten itself.
        states: whether those of `window` keep a state: what a page has of it is good for going on
            behind its last token, and nowhere else.
    """

    full: tuple[int, ...]
    window: tuple[int, ...]
    reach: int
    stride: int
    states: bool = False

    @classmethod
    def of(cls, specs: Iterable[CacheSpec | None]) -> Kinds | None:
        """The kinds of a model's layers; None where one keeps a state that cannot be taken out, or
        all keep states, or some beside windows."""
        owned = [spec for spec in specs if spec is not None]
        if any(isinstance(spec, RecurrentSpec) for spec in owned):
            return cls._of_states(owned)
        if not owned or any(spec.opaque for spec in owned):
            return None
        windows = [spec.window for spec in owned if spec.window is not None]
        return cls(
            tuple(i for i, spec in enumerate(owned) if spec.window is None),
            tuple(i for i, spec in enumerate(owned) if spec.window is not None),
            max(windows, default=0),
            min(windows, default=0),
        )

    @classmethod
    def _of_states(cls, owned: Sequence[CacheSpec]) -> Kinds | None:
        full = tuple(i for i, spec in enumerate(owned) if not spec.opaque)
        states = tuple(i for i, spec in enumerate(owned) if isinstance(spec, RecurrentSpec))
        windows = any(spec.window is not None for spec in owned)
        if not full or windows or len(full) + len(states) < len(owned):
            return None
        return cls(full, states, reach=1, stride=STEP, states=True)

    def within(self, start: int, stop: int) -> Kinds:
        """Those of the caches from `start` to the one before `stop` alone."""
        full, window = (
            tuple(i for i in some if start <= i < stop) for some in (self.full, self.window)
        )
        return replace(self, full=full, window=window)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that a page of this model has."""
        return (FULL,) * bool(self.full) + (WINDOW,) * bool(self.window)

    def caches(self, part: str) -> tuple[int, ...]:
        """Indices of the caches of a part."""
        return self.full if part == FULL else self.window

    def needed(self, links: Sequence[Link], part: str, stop: int) -> list[Link]:
        """The pages of a chain from position 0 whose part is needed to resume at `stop`."""
        if not links or not self.caches(part):
            return []
        if part == FULL:
            return list(links)
        return list(links[self.first_needed(links[-1], stop) :])

    def all_needed(self, links: Sequence[Link], stop: int) -> dict[str, list[Link]]:
        """`needed` of each part."""
        return {part: self.needed(links, part, stop) for part in self.parts}

    def first_needed(self, last: Link, stop: int) -> int:
        """Number of the first page whose window part is needed to resume at `stop` in `last`."""
        # One row less than the window is enough; the last page gives the position.
        return max(0, min(stop - (self.reach - 1), last.start)) // STEP


@dataclass(frozen=True, slots=True)
class Link:
    """The place of a page in its chain.

    Args:
        parent: name of the page before it.
        name: its own.
        start: position of its first token.
        n_tokens: `STEP`, or fewer for a tip.
    """

    parent: str
    name: str
    start: int
    n_tokens: int = STEP

    @property
    def stop(self) -> int:
        """The position behind its last token."""
        return self.start + self.n_tokens

    def key(self, part: str) -> PageKey:
        """Its name on disk."""
        return PageKey(self.parent, self.name, self.n_tokens, part)


def is_on_grid(n: int, n_tokens: int) -> bool:
    """Whether the state behind `n` tokens is kept of a sequence that has come to `n_tokens`.

    At each multiple of `GRID` near its end, and with doubling distance before: behind 16 times
    `GRID` those at 16, 15, 14, 12, 8.
    """
    at, end = n // GRID, n_tokens // GRID
    return n % GRID == 0 and at > 0 and end - at <= at & -at


def n_states(n_tokens: int) -> int:
    """States that are kept of one sequence: of the grid, and of the ends of prompt and answer.

    Those of turns between make way for others.
    """
    return 2 + sum(is_on_grid(n, n_tokens) for n in range(GRID, n_tokens + 1, GRID))


def part_names(needed: Mapping[str, Sequence[Link]]) -> set[tuple[str, str]]:
    """(page, part) of some pages by part."""
    return {(link.name, part) for part, links in needed.items() for link in links}


def chain_of(data: bytes, n_pages: int) -> Iterator[Link]:
    """The first whole pages of int32 tokens, from position 0 on."""
    parent = ROOT
    for i in range(n_pages):
        link = Link(parent, page_name(parent, data[4 * STEP * i : 4 * STEP * (i + 1)]), STEP * i)
        yield link
        parent = link.name


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32."""
    return pack(f"{len(tokens)}i", *tokens)  # in half the time of `array`


def token_ids(data: bytes) -> array[int]:
    """The inverse of `token_bytes`."""
    ids = array("i")
    ids.frombytes(data)
    return ids


def n_common(a: bytes, b: bytes) -> int:
    """Leading tokens that two sequences of int32 share."""
    low, high = 0, min(len(a), len(b)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        same = a[4 * low : 4 * middle] == b[4 * low : 4 * middle]
        low, high = (middle, high) if same else (low, middle - 1)
    return low
