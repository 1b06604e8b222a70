"""The pages in RAM, and their eviction.

Invariants:
- `nbytes` and `n_arrays` are the bytes and the number of all parts' arrays, one for each part; of
  those that arrive, from the end of `arriving` on, when others have made way. Any thread may read
  them.
- Eviction order: 1. window parts not needed to resume at a leaf or branch, or in the page before
  it, anchors last; among them the states of turns that their conversation has passed; 2. leaves,
  window part first. LRU within each.
- What belongs to a prefix that many sequences share goes after all else. Pinned pages stay.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlxkv.kv.types import STEP
from mlxkv.prefix.layout import FULL, WINDOW, Kinds, Link
from mlxkv.prefix.on_disk.part import Part

ANCHORS = 8
"""Of the window parts far from any leaf or branch, one every so many windows is evicted last."""
SPARE = 64
"""Above the limit of arrays one in so many more is evicted: the order takes a walk over all pages,
and with small pages the next page would need it again."""


@dataclass(slots=True)
class Page:
    """A page; an evicted part is missing from `parts`. `n_loads`: see `RamPages.again`."""

    link: Link
    tokens: bytes
    parts: dict[str, Part] = field(default_factory=dict)
    used: int = 0
    n_loads: int = 0


class RamPages:
    """Pages by name, and the pages behind each.

    Args:
        kinds: of the model's layers.
    """

    def __init__(self, kinds: Kinds):
        self.nbytes = self.n_arrays = 0
        self._arriving: dict[tuple[str, str], int] = {}
        self._is_arriving = False
        self._kinds = kinds
        self._pages: dict[str, Page] = {}
        self._behind: dict[str, set[str]] = {}
        self._pinned: set[str] = set()
        self._tick = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[Page]:
        return iter(self._pages.values())

    def get(self, name: str) -> Page | None:
        """A page by its name."""
        return self._pages.get(name)

    def has(self, link: Link, part: str) -> bool:
        """Whether a part of a page is here."""
        page = self._pages.get(link.name)
        return page is not None and part in page.parts

    def part(self, link: Link, part: str) -> Part:
        """A part that is here."""
        return self._pages[link.name].parts[part]

    def size(self, link: Link, part: str) -> int | None:
        """Bytes of a part of a page; None if it is not here."""
        page = self._pages.get(link.name)
        return page.parts[part].nbytes if page is not None and part in page.parts else None

    def behind(self, name: str) -> list[Page]:
        """The pages behind one."""
        return [self._pages[child] for child in self._behind.get(name, ())]

    def put(self, link: Link, tokens: bytes, parts: Mapping[str, Part]) -> None:
        """Keep a page, or the parts of it that are not here yet."""
        page = self._pages.get(link.name)
        if page is None:
            page = self._pages[link.name] = Page(link, tokens)
            self._behind.setdefault(link.parent, set()).add(link.name)
        for part, kv in parts.items():
            if part not in page.parts:
                page.parts[part] = kv
                self._arriving[link.name, part] = kv.nbytes
        if not self._is_arriving:
            self._count()
        self.touch([link])

    @contextmanager
    def arriving(self) -> Iterator[None]:
        """What is put meanwhile counts at its end, as far as `shrink` has left it."""
        self._is_arriving = True
        try:
            yield
        finally:
            self._is_arriving = False
            self._count()

    def _count(self) -> None:
        self.nbytes += sum(self._arriving.values())
        self.n_arrays += len(self._arriving)
        self._arriving.clear()

    def touch(self, links: Iterable[Link]) -> None:
        """Mark pages as used, all at the same time."""
        self._tick += 1
        for link in links:
            if link.name in self._pages:
                self._pages[link.name].used = self._tick

    def again(self, link: Link) -> bool:
        """Count that a sequence goes on from a page's state; whether another did before.

        Several do behind a system prompt, one behind each answer.
        """
        page = self._pages.get(link.name)
        if page is not None:
            page.n_loads += 1
        return page is not None and page.n_loads > 1

    def pin(self, names: Iterable[str]) -> None:
        """Protect pages from eviction."""
        self._pinned.update(names)

    def drop_outgrown(self, link: Link, tokens: bytes) -> None:
        """Drop the tips that this page of the same sequence contains."""
        for page in self.behind(link.parent):
            went_on = page.link.n_tokens < link.n_tokens and tokens.startswith(page.tokens)
            is_end = self._kinds.states and WINDOW in page.parts  # its state is nowhere else
            if went_on and not is_end and page.link.name not in self._pinned:
                self.drop(page, tuple(page.parts))

    def thin(self, links: Iterable[Link]) -> None:
        """Drop the states of pages with one page behind them."""
        for link in links:
            page = self._pages.get(link.name)
            is_between = len(self._behind.get(link.name, ())) == 1
            if page is not None and is_between and link.name not in self._pinned:
                self.drop(page, [WINDOW])

    def drop(self, page: Page, parts: Iterable[str]) -> None:
        """Drop parts of a page, and the page with its last part."""
        for part in parts:
            kv = page.parts.pop(part, None)
            if kv is not None and self._arriving.pop((page.link.name, part), None) is None:
                self.nbytes -= kv.nbytes
                self.n_arrays -= 1
        if not page.parts:
            del self._pages[page.link.name]
            siblings = self._behind[page.link.parent]
            siblings.discard(page.link.name)
            if not siblings:
                del self._behind[page.link.parent]

    def clear(self) -> None:
        """Forget everything."""
        self._pages.clear()
        self._behind.clear()
        self._pinned.clear()
        self._arriving.clear()
        self.nbytes = self.n_arrays = 0

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes and arrays, those that arrive included."""
        return self.nbytes + sum(self._arriving.values()), self.n_arrays + len(self._arriving)

    def is_over(self, budget_bytes: int, max_arrays: int | None = None) -> bool:
        """Whether there is more than a budget allows."""
        most = sys.maxsize if max_arrays is None else max_arrays
        n_bytes, n_arrays = self.sizes
        return n_bytes > budget_bytes or n_arrays > most

    def shrink(
        self,
        budget_bytes: int,
        max_arrays: int | None = None,
        spared: Collection[tuple[str, str]] = (),
        kept: Collection[tuple[str, str]] = (),
    ) -> None:
        """Give up as much as the budget asks for.

        Args:
            budget_bytes: what stays at most.
            max_arrays: how many arrays stay at most; None for any number.
            spared: (page, part) of what goes after all else.
            kept: of what does not go.
        """
        if not self.is_over(budget_bytes, max_arrays):
            return
        most = max_arrays
        if most is not None and self.is_over(sys.maxsize, most):
            most -= most // SPARE

        def is_enough() -> bool:
            return not self.is_over(budget_bytes, most)

        for staying in ({*spared, *kept}, kept) if spared else (kept,):
            self._drop_far(is_enough, staying)
            self._drop_leaves(is_enough, staying)

    def _drop_far(self, is_enough: Callable[[], bool], spared: Collection[tuple[str, str]]) -> None:
        """Give up window parts that are not needed to go on at a tip or a fork."""
        near = self._near()
        far = [
            page
            for name, page in self._pages.items()
            if WINDOW in page.parts
            and (name not in near or self.is_passed(page))
            and name not in self._pinned
            and (name, WINDOW) not in spared
        ]
        for page in sorted(far, key=lambda p: (self._is_anchor(p), p.used, p.link.start)):
            if is_enough():
                return
            self.drop(page, [WINDOW] if page.link.n_tokens == STEP else tuple(page.parts))

    def worth_keeping(self) -> list[Link]:
        """The pages to write when all are given up, trunk first."""
        links = (page.link for page in self if not self.is_passed(page))
        return sorted(links, key=lambda link: link.start)

    def is_passed(self, page: Page) -> bool:
        """Whether it is the end of a turn that its conversation has passed, and no other went on
        from, whose state takes more than the keys and values of the tokens that it may save.

        Either the conversation went on from it, or from the state before it (`is_left`). Never so
        is the first state of a sequence: a system prompt's.
        """
        if not self._has_own_state(page) or page.n_loads > 1:
            return False
        before = self._state_before(page)
        if before is None or not (self.is_left(page) or self._is_gone_on(page)):
            return False
        token_bytes = page.parts[FULL].nbytes / page.link.n_tokens
        n_saved = page.link.stop - before.link.stop
        return n_saved * token_bytes < page.parts[WINDOW].nbytes

    def is_left(self, page: Page) -> bool:
        """Whether it is an end with a state that nothing went on from, but from the state before it
        since: an answer's whose client left out what was thought."""
        if page.n_loads or not self._has_own_state(page):
            return False
        before = self._state_before(page)
        return before is not None and before.n_loads > 0 and before.used > page.used

    def _has_own_state(self, page: Page) -> bool:
        is_tip = self._kinds.states and page.link.n_tokens < STEP
        return is_tip and FULL in page.parts and WINDOW in page.parts

    def _is_gone_on(self, page: Page) -> bool:
        """Whether what went on from a page has come further, within a page or beyond."""
        return page.n_loads > 0 and any(
            other.link.n_tokens > page.link.n_tokens and other.tokens.startswith(page.tokens)
            for other in self.behind(page.link.parent)
        )

    def _state_before(self, page: Page) -> Page | None:
        """The last page before one in its sequence that has a state."""
        at: Page | None = page
        while at is not None:
            shorter = [
                other
                for other in self.behind(at.link.parent)
                if WINDOW in other.parts
                and other.link.n_tokens < at.link.n_tokens
                and at.tokens.startswith(other.tokens)
            ]
            if shorter:
                return max(shorter, key=lambda other: other.link.n_tokens)
            at = self._pages.get(at.link.parent)
            if at is not None and WINDOW in at.parts:
                return at
        return None

    def _is_anchor(self, page: Page) -> bool:
        """Whether it is one of `ANCHORS`, from which a prompt that was edited far back resumes."""
        n_window = -(-self._kinds.reach // STEP)
        return page.link.start // STEP % (ANCHORS * n_window) < n_window

    def _near(self) -> set[str]:
        """Pages whose window part is needed to resume in the last page of a leaf or branch."""
        near: set[str] = set()
        for name, page in self._pages.items():
            if len(self._behind.get(name, ())) == 1:
                continue
            first = page.link.start - (self._kinds.reach - 1)
            at: Page | None = page
            while at is not None and (at.link.stop > first or at is page):
                near.add(at.link.name)
                at = self._pages.get(at.link.parent)
        return near

    def _drop_leaves(
        self, is_enough: Callable[[], bool], spared: Collection[tuple[str, str]]
    ) -> None:
        def entry(page: Page) -> tuple[int, int, str]:
            return page.used, -page.link.start, page.link.name

        leaves = [entry(p) for name, p in self._pages.items() if name not in self._behind]
        heapq.heapify(leaves)
        while leaves and not is_enough():
            name = heapq.heappop(leaves)[2]
            if name in self._pinned:
                continue
            page = self._pages[name]
            for part in (WINDOW, FULL):
                if part in page.parts and (name, part) not in spared and not is_enough():
                    self.drop(page, [part])
            parent = self._pages.get(page.link.parent)
            is_leaf = page.link.parent not in self._behind
            if name not in self._pages and parent is not None and is_leaf:
                heapq.heappush(leaves, entry(parent))
