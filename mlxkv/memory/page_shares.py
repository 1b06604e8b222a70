"""What prefix pages of all owners take in RAM: each owner gets the same share."""

from __future__ import annotations

from mlxkv.memory import needs
from mlxkv.prefix.pages import Pages


class PageShares:
    """The prefix pages of one model, of every owner.

    Args:
        pages: the first owner's; None where the model has none.
    """

    def __init__(self, pages: Pages | None):
        self._all = [] if pages is None else [pages]
        self._n_bytes: int | None = None
        self._n_arrays = needs.page_arrays()
        self._divide()

    @property
    def nbytes(self) -> int:
        """Bytes of all pages in RAM."""
        return sum(pages.nbytes for pages in self._all)

    def adopt(self, pages: Pages) -> None:
        """Add another owner's pages; the shares of all become smaller."""
        self._all.append(pages)
        self._divide()

    def set_bytes(self, n_bytes: int) -> None:
        """Set how many bytes all pages may take together."""
        self._n_bytes = n_bytes
        self._divide()

    def set_arrays(self, n_arrays: int | None) -> None:
        """Set how many arrays all pages may hold together; None for any number."""
        self._n_arrays = n_arrays
        self._divide()

    def _divide(self) -> None:
        for pages in self._all:
            if self._n_bytes is not None:
                pages.budget_bytes = self._n_bytes // len(self._all)
            pages.max_arrays = self._n_arrays and self._n_arrays // len(self._all)

    def give_back(self, n_bytes: int) -> int:
        """Drop pages from RAM, of the largest owner first.

        Returns:
            Bytes freed; fewer than asked for where the rest is pinned.
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
