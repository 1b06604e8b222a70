"""How much RAM pages may take, and which make way for others.

Invariants:
- What `RamPages` counts, and what `PageFetcher` holds or may still read, is together never more
  than allowed, but for pinned pages and where less is allowed than was before, until `fit`.
- Pages make way before those that they make way for are there.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from mlxkv.prefix.ram import RamPages
from mlxkv.prefix.shared import SharedPrefixes

if TYPE_CHECKING:
    from mlxkv.prefix.on_disk.fetch import PageFetcher


class RamRoom:
    """The room of one model's pages.

    Args:
        ram: the pages.
        shared: those that make way after all others.
        budget_bytes: what pages may take.

    Attributes:
        cap_bytes: what they may take while memory is short; None for the budget.
        max_arrays: that pages may hold; None for any number. See `needs.page_arrays`.
        fetcher: of the pages that are read ahead; None where there is no disk.
    """

    def __init__(self, ram: RamPages, shared: SharedPrefixes, budget_bytes: int):
        self._ram, self._shared = ram, shared
        self.budget_bytes = budget_bytes
        self.cap_bytes: int | None = None
        self.max_arrays: int | None = None
        self.fetcher: PageFetcher | None = None
        self._pinned: tuple[int | None, ...] = ()

    @property
    def _allowed_bytes(self) -> int:
        capped = self.cap_bytes
        return self.budget_bytes if capped is None else min(self.budget_bytes, capped)

    @property
    def _fetched_bytes(self) -> int:
        return 0 if self.fetcher is None else self.fetcher.limit_bytes

    def fit(self) -> None:
        """Give up what is beyond what is allowed."""
        if self.fetcher is not None and self._fetched_bytes > self._allowed_bytes:
            self.fetcher.clear()
        allowed = self._allowed_bytes - self._fetched_bytes
        if not self._ram.is_over(allowed, self.max_arrays):
            self._pinned = ()
            return
        # Asked in each step of a decoder: what stayed the last time is pinned, and stays now.
        if self._pinned != (allowed, self.max_arrays, *self._ram.sizes):
            spared = self._shared.spared(self._ram.size, allowed)
            self._ram.shrink(allowed, self.max_arrays, spared)
            self._pinned = allowed, self.max_arrays, *self._ram.sizes

    def has(self, n_bytes: int) -> bool:
        """Whether there is room for an array of so many bytes."""
        most = None if self.max_arrays is None else self.max_arrays - 1
        allowed = self._allowed_bytes - self._fetched_bytes
        return not self._ram.is_over(allowed - n_bytes, most)

    def make(self, n_bytes: int, n_arrays: int, kept: Set[tuple[str, str]]) -> None:
        """Have others make way for so much, as far as they may.

        Args:
            n_bytes: of the pages to come.
            n_arrays: of them.
            kept: (page, part) that does not make way, as shared prefixes do not.
        """
        self._make(self._allowed_bytes - self._fetched_bytes, n_bytes, n_arrays, kept)

    def make_ahead(self, n_bytes: int, kept: Set[tuple[str, str]]) -> int:
        """`make` for all that is fetched ahead; how many of those bytes there is room for."""
        self._make(self._allowed_bytes, n_bytes, 0, kept)
        return max(0, min(n_bytes, self._allowed_bytes - self._ram.nbytes))

    def _make(self, allowed: int, n_bytes: int, n_arrays: int, kept: Set[tuple[str, str]]) -> None:
        most = None if self.max_arrays is None else max(0, self.max_arrays - n_arrays)
        if self._ram.is_over(allowed - n_bytes, most):
            spared = self._shared.spared(self._ram.size, allowed)
            self._ram.shrink(max(0, allowed - n_bytes), most, kept=spared | kept)
