"""The RAM of prefix pages: each owner gets the same share, however many pages of adapters it has.

An owner's pages under each adapter get the same part of its share, those of some layers alone as
much less as they have fewer bytes a token (`Pages.weight`).
"""

from __future__ import annotations

from collections import defaultdict

from mlxkv.memory import needs
from mlxkv.prefix.pages import Pages


class PageShares:
    """The prefix pages of one model, of every owner; None where it has none."""

    def __init__(self, pages: Pages | None):
        self._all: list[Pages] = []
        self._owners: list[str] = []  # of each
        self._n_bytes: int | None = None
        self._n_arrays = needs.page_arrays()
        if pages is not None:
            self.adopt(pages, "")

    @property
    def nbytes(self) -> int:
        return sum(pages.nbytes for pages in self._all)

    def adopt(self, pages: Pages, owner: str) -> None:
        self._all.append(pages)
        self._owners.append(owner)
        self._divide()

    def release(self, pages: Pages) -> None:
        """Take pages that are closed out."""
        i = next(i for i, each in enumerate(self._all) if each is pages)
        del self._all[i], self._owners[i]
        self._divide()

    def set_bytes(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._divide()

    def set_arrays(self, n_arrays: int | None) -> None:
        """Set how many arrays the pages of all owners may hold; see `needs.page_arrays`."""
        self._n_arrays = n_arrays
        self._divide()

    def _divide(self) -> None:
        weights: defaultdict[str, float] = defaultdict(float)
        n_of: defaultdict[str, int] = defaultdict(int)
        for pages, owner in zip(self._all, self._owners, strict=True):
            weights[owner] += pages.weight
            n_of[owner] += 1
        for pages, owner in zip(self._all, self._owners, strict=True):
            if self._n_bytes is not None:
                n = len(weights) * weights[owner]
                pages.room.budget_bytes = int(self._n_bytes * pages.weight // n)
            n_arrays = self._n_arrays and self._n_arrays // (len(n_of) * n_of[owner])
            pages.room.max_arrays = n_arrays
            pages.room.fit()

    def give_back(self, n_bytes: int) -> int:
        """Drop pages from RAM, of the largest owner first, and return the bytes freed.

        Pinned pages stay.
        """
        freed = 0
        for pages in sorted(self._all, key=lambda pages: -pages.nbytes):
            if freed < n_bytes:
                freed += pages.give_back(n_bytes - freed)
        return freed

    def take_share(self) -> None:
        """Allow pages their whole share again after `give_back`."""
        for pages in self._all:
            pages.take_share()
