"""Cut a sequence's KV into pages, before a rotating cache overwrites it.

Invariants:
- Pages are complete up to `_start`; rows between `_start` and the caches' offset are either still
  in every cache or, for window layers, in `_rows`.
- Rows are copied and evaluated: a view would keep a cache's buffer alive, and its next update would
  copy it.
- Layers that keep a state have it at the caches' offset alone: a page gets it where the caches are
  at the page's end just then, and it is one of the grid, or a mark (`prefix.marks`), or the end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import mlx.core as mx

from mlxkv.kv.layout import Cache
from mlxkv.kv.types import STEP
from mlxkv.prefix.checkpoints import goes_on
from mlxkv.prefix.layout import FULL, GRID, WINDOW, Link, chain_of, is_on_grid, token_bytes
from mlxkv.prefix.marks import end_marks, until
from mlxkv.prefix.match import Match
from mlxkv.prefix.on_disk.format import ROOT, page_name
from mlxkv.prefix.on_disk.part import Part
from mlxkv.prefix.pages import Pages

AHEAD = 2
"""Tokens that may be fed before the next call of `advance`: decoding has one step in flight."""


class Cutter:
    """Cuts the pages of one sequence's caches for `Pages`."""

    def __init__(self, pages: Pages, caches: Sequence[Cache]):
        self._pages = pages
        self._full = [caches[i] for i in pages.kinds.full]
        behind = [caches[i] for i in pages.kinds.window]
        self._window = [] if pages.kinds.states else behind
        self._states = behind if pages.kinds.states else []
        self._marks: Collection[int] = ()
        self.restart([])

    def restart(self, tokens: Sequence[int], tip: Part | None = None) -> None:
        """Start from the tokens that the caches hold now.

        `tip`: window rows of the tokens behind the last complete page.
        """
        n_pages, data = len(tokens) // STEP, token_bytes(tokens)
        self._links = list(chain_of(data, n_pages))
        self._is_gone_on = bool(self._states) and goes_on(self._pages, self._links, data)
        self._last_end: Link | None = None
        self._parent = self._links[-1].name if self._links else ROOT
        self._start = self._kept = STEP * n_pages
        self._rows: list[Part] | None = []
        if self._window and tip is not None and tip.start == self._start:
            self._rows, self._kept = [tip], tip.stop

    def resume(self, tokens: Sequence[int], match: Match) -> None:
        """`restart`, with the window rows that pages have of a prompt.

        Args:
            tokens: that the caches hold now.
            match: what was found of the prompt.
        """
        rows = None
        if match.links and match.links[-1].start < len(tokens) <= match.n_tokens:
            rows = self._pages.rows_before(match.links[-1], len(tokens))
        self.restart(tokens, rows)

    def forget(self, n: int) -> None:
        """Have the pages forget those of the sequence's that end behind `n` tokens."""
        self._pages.forget(link for link in self._links if link.stop > n)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept for the next page."""
        return sum(part.nbytes for part in list(self._rows or ()))

    def is_due(self, n: int) -> bool:
        """Whether `advance` has work at `n` tokens: a page, or rows about to be overwritten."""
        if n - self._start >= STEP:
            return True
        return bool(self._window) and n + AHEAD - self._kept > self._pages.kinds.stride

    def advance(self, tokens: Sequence[int], n: int) -> None:
        """Cut the pages that are complete.

        Args:
            tokens: of the sequence, at least `n`.
            n: tokens that every cache holds.
        """
        while self._start + STEP <= n:
            link = self._store(tokens, STEP, self._start + STEP == n and n % GRID == 0)
            self._links.append(link)
            self._parent, self._start = link.name, link.stop
            self._rows, self._kept = [], link.stop
        if self._window and n > self._kept:
            rows = self._read_rows(n)
            if rows is not None and self._rows is not None:
                mx.eval(rows.words)
                self._rows.append(rows)
            self._kept = n
        if self._states and n % GRID == 0:
            far = (x for x in self._links if x.stop % GRID == 0 and not is_on_grid(x.stop, n))
            self._pages.ram.thin(far)
        if n in self._marks:
            self._end(tokens, n)

    def expect(self, tokens: Sequence[int], ends: Collection[int]) -> None:
        """A prompt is about to be computed, in which these tokens end turns."""
        self._marks = end_marks(tokens, ends) if self._states else set()

    def until(self, at: int, n_new: int) -> int:
        """As many of the next `n_new` tokens from position `at` on as end where a state is kept."""
        return until(at, n_new, self._marks) if self._states else n_new

    def _end(self, tokens: Sequence[int], n: int) -> list[Link]:
        """Cut the tokens behind the last complete page, with the state there; all pages."""
        if n > self._start:
            return [*self._links, self._store(tokens, n - self._start, True)]
        if self._states and self._links:
            self._add_state(self._links[-1], token_bytes(tokens[n - STEP : n]))
        return list(self._links)

    def _add_state(self, link: Link, data: bytes) -> None:
        """Have a whole page, at whose end the caches are, keep the state."""
        if self._pages.ram.has(link, WINDOW) or (state := self._state_at(link.stop)) is None:
            return
        mx.eval(state.words)
        self._pages.add(link, data, {WINDOW: state}, self._links)

    def finish(self, tokens: Sequence[int], n: int) -> list[Link]:
        """Cut the tokens behind the last complete page as a tip; return the sequence's pages."""
        self.advance(tokens, n)
        links = self._end(tokens, n)
        self._pages.touch(links)
        if self._is_gone_on:
            self._pages.keep(self._pages.checkpoints.ended(links))
        if self._states and links:  # what goes on in these caches goes on from here
            if self._last_end is not None and self._last_end.name != links[-1].name:
                self._pages.ram.again(self._last_end)
            self._is_gone_on, self._last_end = True, links[-1]
        return links

    def _store(self, tokens: Sequence[int], n_tokens: int, with_state: bool) -> Link:
        """Store the page that begins at `_start`, if it is new; perhaps with its end's state."""
        start, stop = self._start, self._start + n_tokens
        data = token_bytes(tokens[start:stop])
        link = Link(self._parent, page_name(self._parent, data), start, n_tokens)
        if self._pages.has(link) or not (with_state or self._lacks_rows(link)):
            return link
        parts: dict[str, Part] = {}
        if self._full:
            parts[FULL] = Part.of([cache.read(start, stop) for cache in self._full])
        rows = self._state_at(stop) if with_state else None
        rows = self._page_rows(stop) if rows is None else rows
        if rows is not None:
            parts[WINDOW] = rows
        mx.eval([part.words for part in parts.values()])
        if parts:
            self._pages.add(link, data, parts, self._links)
        return link

    def _lacks_rows(self, link: Link) -> bool:
        """Whether a page that gets no state is worth storing."""
        return not self._states or not self._pages.ram.has(link, FULL)

    def _state_at(self, stop: int) -> Part | None:
        """The state behind `stop` tokens, in an array of its own; None where it has gone on."""
        if not self._states or any(cache.offset != stop for cache in self._states):
            return None
        return Part.of([cache.read(stop - 1, stop) for cache in self._states])

    def _page_rows(self, stop: int) -> Part | None:
        """Window rows from `_start` to `stop`; None where some are overwritten."""
        if not self._window or self._rows is None:
            return None
        pieces = list(self._rows)
        if stop > self._kept:
            rows = self._read_rows(stop)
            if rows is None:
                return None
            pieces.append(rows)
        return Part.join(pieces)

    def _read_rows(self, stop: int) -> Part | None:
        """Rows from `_kept` to `stop` of every window layer, in an array of their own."""
        if any(cache.first > self._kept for cache in self._window):
            self._rows = None  # a gap: this page will have no window part
            return None
        return Part.of([cache.read(self._kept, stop) for cache in self._window])
