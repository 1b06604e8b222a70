"""The pages on disk that this process knows of, by the page that they follow."""

from __future__ import annotations

from mlxkv.prefix.on_disk.format import MAX_TOKENS, PageKey


class PageIndex:
    """Which parts of which pages are on disk; not locked."""

    def __init__(self) -> None:
        self._behind: dict[str, dict[tuple[str, int], set[str]]] = {}

    def __contains__(self, key: PageKey) -> bool:
        return key.part in self._behind.get(key.parent, {}).get((key.name, key.n_tokens), ())

    def children(self, parent: str) -> list[tuple[str, int]]:
        """(name, tokens) of the pages that follow a page."""
        return list(self._behind.get(parent, ()))

    def parents(self) -> dict[str, str]:
        """Of each whole page, the page that it follows."""
        return {
            name: parent
            for parent, pages in self._behind.items()
            for name, n_tokens in pages
            if n_tokens == MAX_TOKENS
        }

    def add(self, key: PageKey) -> None:
        """Learn of a part of a page."""
        pages = self._behind.setdefault(key.parent, {})
        pages.setdefault((key.name, key.n_tokens), set()).add(key.part)

    def discard(self, key: PageKey) -> None:
        """Forget a part of a page, and the page with its last part."""
        pages = self._behind.get(key.parent, {})
        parts = pages.get((key.name, key.n_tokens), set())
        parts.discard(key.part)
        if not parts:
            pages.pop((key.name, key.n_tokens), None)
        if not pages:
            self._behind.pop(key.parent, None)
