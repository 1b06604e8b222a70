"""Cut a sequence's KV into pages, before a rotating cache overwrites it.

Invariants:
- Pages are complete up to `_start`; rows between `_start` and the caches' offset are either still
  in every cache or, for window layers, in `_rows`.
- Rows are copied and evaluated: a view would keep a cache's buffer alive, and its next update would
  copy it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxkv.kv.layout import Cache
from mlxkv.kv.types import STEP
from mlxkv.prefix.layout import FULL, WINDOW, Link, chain_of, token_bytes
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
        self._window = [caches[i] for i in pages.kinds.window]
        self.restart([])

    def restart(self, tokens: Sequence[int], tip: Part | None = None) -> None:
        """Start from the tokens that the caches hold now.

        `tip`: window rows of the tokens behind the last complete page.
        """
        n_pages = len(tokens) // STEP
        self._links = list(chain_of(token_bytes(tokens), n_pages))
        self._parent = self._links[-1].name if self._links else ROOT
        self._start = self._kept = STEP * n_pages
        self._rows: list[Part] | None = []
        if tip is not None and tip.start == self._start:
            self._rows, self._kept = [tip], tip.stop

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
            link = self._store(tokens, STEP)
            self._links.append(link)
            self._parent, self._start = link.name, link.stop
            self._rows, self._kept = [], link.stop
        if self._window and n > self._kept:
            rows = self._read_rows(n)
            if rows is not None and self._rows is not None:
                mx.eval(rows.words)
                self._rows.append(rows)
            self._kept = n

    def finish(self, tokens: Sequence[int], n: int) -> list[Link]:
        """Cut the tokens behind the last complete page as a tip; return the sequence's pages."""
        self.advance(tokens, n)
        links = list(self._links)
        if n > self._start:
            links.append(self._store(tokens, n - self._start))
        self._pages.touch(links)
        return links

    def _store(self, tokens: Sequence[int], n_tokens: int) -> Link:
        """Store the page that begins at `_start`, if it is new."""
        start, stop = self._start, self._start + n_tokens
        data = token_bytes(tokens[start:stop])
        link = Link(self._parent, page_name(self._parent, data), start, n_tokens)
        if self._pages.has(link):
            return link
        parts: dict[str, Part] = {}
        if self._full:
            parts[FULL] = Part.of([cache.read(start, stop) for cache in self._full])
        rows = self._page_rows(stop)
        if rows is not None:
            parts[WINDOW] = rows
        mx.eval([part.words for part in parts.values()])
        if parts:
            self._pages.add(link, data, parts, self._links)
        return link

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
