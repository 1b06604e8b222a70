"""Prefix pages: KV that was computed once, found again by the tokens it was computed from.

Invariants:
- A page holds the KV of `STEP` consecutive tokens, of all layers; of fewer only where a sequence
  stopped (a tip). Its full part is what layers without a window need, its window part the rest.
- Its name is the chain of all tokens up to its end. Names know no model: one `Pages` serves one
  model in one dtype and KV format, and on disk the folder's name says which.
- To go on at position p, full parts of [0, p) are needed and window parts of [p - window, p).
- `match` decides and changes nothing; `load` acts. Nothing is computed here: what caches held goes
  back into caches bit for bit.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxkv.cache import STEP, Cache, CacheSpec, Slice
from mlxkv.errors import UsageError
from mlxkv.page_format import ROOT, PageKey, page_name

if TYPE_CHECKING:
    from mlxkv.page_disk import PageDisk

FULL, WINDOW = "full", "window"
CLOSEST = 16
"""Pages behind one point that are looked at to say where a prompt left what is known."""

Part = tuple[Slice, ...]
"""One slice for each layer that the part belongs to, all of the same positions."""


@dataclass(frozen=True, slots=True)
class Kinds:
    """Which caches the parts of a page belong to.

    Args:
        full: indices of the caches that keep everything.
        window: indices of those that rotate.
        reach: tokens before a position that a window layer may see, with one to spare.
        stride: tokens after which the smallest window has overwritten itself.
    """

    full: tuple[int, ...]
    window: tuple[int, ...]
    reach: int
    stride: int

    @classmethod
    def of(cls, specs: Iterable[CacheSpec | None]) -> Kinds | None:
        """Of a model's layers; None where one keeps a state that has no keys and values."""
        owned = [spec for spec in specs if spec is not None]
        if not owned or any(spec.opaque for spec in owned):
            return None
        windows = [spec.window for spec in owned if spec.window is not None]
        return cls(
            tuple(i for i, spec in enumerate(owned) if spec.window is None),
            tuple(i for i, spec in enumerate(owned) if spec.window is not None),
            max(windows, default=0),
            min(windows, default=0),
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that a page of this model has."""
        return (FULL,) * bool(self.full) + (WINDOW,) * bool(self.window)

    def caches(self, part: str) -> tuple[int, ...]:
        """Indices of the caches of a part."""
        return self.full if part == FULL else self.window


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


@dataclass(frozen=True, slots=True)
class Match:
    """What of a prompt can be restored.

    Args:
        links: its pages from position 0 on; the last may be a tip.
        n_tokens: tokens that they hold.
        shared: leading tokens of the prompt that some known sequence has as well.
        held: that sequence's tokens from `shared` on, some of them.
        n_known: how far that sequence is known.
    """

    links: tuple[Link, ...] = ()
    n_tokens: int = 0
    shared: int = 0
    held: tuple[int, ...] = ()
    n_known: int = 0


@dataclass(slots=True)
class Page:
    """A page in RAM; a part that was dropped is missing from `parts`."""

    link: Link
    tokens: bytes
    parts: dict[str, Part] = field(default_factory=dict)
    used: int = 0

    def nbytes(self, part: str) -> int:
        """Bytes of one part."""
        return sum(x.nbytes for piece in self.parts.get(part, ()) for x in piece.arrays)


class Pages:
    """The pages of one model.

    Args:
        kinds: of its layers.
        budget_bytes: what pages may take in RAM.
        stable: tokens of a sequence up to which KV does not depend on what follows; None for all.
        open_disk: gives the pages on disk, asked for at the first prompt that has a whole page.
    """

    def __init__(
        self,
        kinds: Kinds,
        budget_bytes: int,
        stable: int | None = None,
        open_disk: Callable[[], PageDisk | None] | None = None,
    ):
        self.kinds = kinds
        self.budget_bytes = budget_bytes
        self.stable = stable
        self.nbytes = 0
        self._open_disk = open_disk
        self._disk: PageDisk | None = None
        self._pages: dict[str, Page] = {}
        self._behind: dict[str, set[str]] = {}
        self._pinned: set[str] = set()
        self._starts: set[str] = set()
        self._unreadable: set[PageKey] = set()
        self._tick = 0
        self._writes_through = False

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def disk(self) -> PageDisk | None:
        """The pages on disk, None where there are none to be."""
        self._open()
        return self._disk

    def _open(self) -> None:
        # The model's name on disk is a hash of its weights, which short prompts do not wait for.
        if self._open_disk is not None:
            self._disk, self._open_disk = self._open_disk(), None

    def match(self, tokens: Sequence[int], limit: int) -> Match:
        """The longest prefix that can be restored.

        Args:
            tokens: a prompt.
            limit: tokens to restore at most.
        """
        data = packed(tokens)
        if self.stable is not None:
            limit = min(limit, self.stable)
        if limit >= STEP:
            self._open()
        links = self._chain(data, limit // STEP)
        usable = self._usable(links, data, limit)
        last = links[-1] if links else None
        at = last.stop if last else 0
        parent = last.name if last else ROOT
        name, n, shared, held = self._closest(parent, data[4 * at :])
        return Match(
            tuple(usable),
            usable[-1].stop if usable else 0,
            at + shared,
            tuple(unpacked(held)),
            self._known_until(name, at + n),
        )

    def load(self, match: Match, caches: Sequence[Cache]) -> int | None:
        """Fill caches with what was matched.

        Returns:
            Tokens of it that came from disk; None, with the caches as they were or empty, where a
            page could not be read any more: match again.
        """
        links = match.links
        needed = {part: self._needed(links, part) for part in self.kinds.parts}
        read = self._bring(needed)
        if read is None:
            return None
        try:
            for part, some in needed.items():
                slices = [self._pages[link.name].parts[part] for link in some]
                for i, index in enumerate(self.kinds.caches(part)):
                    caches[index].load([part_slices[i] for part_slices in slices])
                    mx.eval(caches[index].state)
        except UsageError:
            self._forget(links)
            return None
        self._touch(links)
        self._keep_on_disk(link for link in links if link.n_tokens == STEP)
        self._shrink()
        # Pages that no layer needs any more count as the first that one does.
        first = next(iter(needed.values()))[0]
        return sum(
            link.n_tokens
            for link in links
            if (first if link.start < first.start else link).name in read
        )

    def tip_rows(self, link: Link) -> Part | None:
        """The window part of a page in RAM."""
        page = self._pages.get(link.name)
        return page.parts.get(WINDOW) if page else None

    def has(self, link: Link) -> bool:
        """Whether a page is in RAM with all its parts."""
        page = self._pages.get(link.name)
        return page is not None and len(page.parts) == len(self.kinds.parts)

    def add(self, link: Link, tokens: bytes, parts: dict[str, Part]) -> None:
        """Keep a page, or the parts of it that are not here yet.

        Args:
            link: its place.
            tokens: its own, packed.
            parts: evaluated.
        """
        page = self._put(link, tokens, parts)
        if self._writes_through:
            self._keep_on_disk([link], named=True)
        for name in [*self._behind.get(link.parent, ())]:
            tip = self._pages[name]
            went_on = tip.link.n_tokens < link.n_tokens and tokens.startswith(tip.tokens)
            if went_on and tip is not page and name not in self._pinned | self._starts:
                self._drop(tip, tuple(tip.parts))
        self._shrink()

    def touch(self, links: Iterable[Link]) -> None:
        """Say that a sequence goes on from these pages."""
        self._touch(links)

    def pin(self, links: Iterable[Link]) -> None:
        """Keep pages in RAM whatever the budget says."""
        self._pinned |= {link.name for link in links}

    def start_from(self, name: str) -> None:
        """Say that many sequences go on from a page: a tip stays when one of them has."""
        self._starts.add(name)

    def keep(self, links: Iterable[Link] | None = None, *, named: bool = False) -> None:
        """Write pages to disk in the background: the given ones, or all that are in RAM.

        Args:
            links: of pages in RAM.
            named: they belong to named KV, see `PageFiles.write`.
        """
        if links is None:
            links = sorted((page.link for page in self._pages.values()), key=lambda x: x.start)
        self._keep_on_disk(links, named)

    @contextmanager
    def writing_through(self) -> Iterator[None]:
        """Meanwhile what is cut goes to disk at once, so that RAM need not hold all of it."""
        self._writes_through = True
        try:
            yield
        finally:
            self._writes_through = False

    def keys_to_resume(self, links: Sequence[Link]) -> list[PageKey]:
        """Names on disk of what is needed to go on behind the last of some pages."""
        return [link.key(part) for part in self.kinds.parts for link in self._needed(links, part)]

    def clear(self) -> None:
        """Forget what is in RAM."""
        self._pages.clear()
        self._behind.clear()
        self._pinned.clear()
        self.nbytes = 0

    def close(self) -> None:
        """Write what is worth keeping, wait for it, and forget what is in RAM."""
        # A sequence of less than a page is computed faster than a process starts.
        if any(page.link.stop >= STEP for page in self._pages.values()):
            self.keep()
        if self._disk is not None:
            self._disk.close()
            self._disk = None
        self.clear()

    def _chain(self, data: bytes, n_pages: int) -> list[Link]:
        """The complete pages of a prompt as far as their full parts are known."""
        links: list[Link] = []
        parent = ROOT
        for i in range(n_pages):
            name = page_name(parent, data[4 * STEP * i : 4 * STEP * (i + 1)])
            link = Link(parent, name, STEP * i)
            if self.kinds.full and not self._held(link, FULL):
                break
            links.append(link)
            parent = name
        while links and not self.kinds.full and not self._held(links[-1], WINDOW):
            links.pop()
        return links

    def _usable(self, links: list[Link], data: bytes, limit: int) -> list[Link]:
        """As much of a chain as window parts allow, with a tip behind it where one fits."""
        at = links[-1].stop if links else 0
        tip = self._tip(links[-1].name if links else ROOT, at, data[4 * at : 4 * limit])
        chain = [*links, tip] if tip else links
        while chain and not all(self._held(x, WINDOW) for x in self._needed(chain, WINDOW)):
            chain = chain[:-1]
        return chain

    def _needed(self, links: Sequence[Link], part: str) -> list[Link]:
        """The pages whose part is needed to go on behind the last one."""
        if not links or not self.kinds.caches(part):
            return []
        if part == FULL:
            return list(links)
        # One row less is enough; where a page more would be read for it, it is left out.
        first = max(0, links[-1].stop - (self.kinds.reach - 1))
        return [link for link in links if link.stop > first or link is links[-1]]

    def _held(self, link: Link, part: str) -> bool:
        page = self._pages.get(link.name)
        if page is not None and part in page.parts:
            return True
        key = link.key(part)
        return self._disk is not None and key not in self._unreadable and key in self._disk

    def _tip(self, parent: str, at: int, rest: bytes) -> Link | None:
        """The longest tip behind a page that the prompt goes on from."""
        best: Link | None = None
        for name, n in self._children(parent):
            if not (best.n_tokens if best else 0) < n < STEP or 4 * n > len(rest):
                continue
            link = Link(parent, name, at, n)
            held = all(self._held(link, part) for part in self.kinds.parts)
            if held and page_name(parent, rest[: 4 * n]) == name:
                best = link
        return best

    def _children(self, parent: str) -> Iterator[tuple[str, int]]:
        """(name, tokens) of the pages behind one, those in RAM first."""
        in_ram = self._behind.get(parent, set())
        for name in in_ram:
            yield name, self._pages[name].link.n_tokens
        if self._disk is not None:
            for name, n in self._disk.children(parent):
                if name not in in_ram:
                    yield name, n

    def _closest(self, parent: str, rest: bytes) -> tuple[str, int, int, bytes]:
        """The page behind `parent` that has most in common with the rest of a prompt.

        Returns:
            Its name, its tokens, how many of them are shared, and those that follow there; the
            parent's own name and nothing where there is no page.
        """
        best = parent, 0, 0, b""
        for name, n in islice(self._children(parent), CLOSEST) if rest else ():
            tokens = self._tokens(Link(parent, name, 0, n))
            shared = n_common(tokens, rest)
            if shared > best[2] or best[0] == parent:
                best = name, n, shared, tokens[4 * shared :]
        name, n, shared, following = best
        behind = next(self._children(name), None) if n else None
        if behind is not None:
            following += self._tokens(Link(name, behind[0], 0, behind[1]))
        return name, n, shared, following

    def _tokens(self, link: Link) -> bytes:
        page = self._pages.get(link.name)
        if page is not None:
            return page.tokens
        assert self._disk is not None
        found = (self._disk.tokens(link.key(part)) for part in self.kinds.parts)
        return next((tokens for tokens in found if tokens), b"")

    def _known_until(self, name: str, at: int) -> int:
        """How far a sequence is known, of which a page ends at `at`."""
        while behind := [(n, child) for child, n in self._children(name)]:
            n, name = max(behind)
            at += n
        return at

    def _bring(self, needed: dict[str, list[Link]]) -> set[str] | None:
        """Read what is not in RAM; names of the pages read, None where one is gone."""
        missing = [
            (link, part)
            for part, links in needed.items()
            for link in links
            if link.name not in self._pages or part not in self._pages[link.name].parts
        ]
        if not missing:
            return set()
        if self._disk is None:
            return None
        found = self._disk.read([link.key(part) for link, part in missing])
        for (link, part), file in zip(missing, found, strict=True):
            if file is None:
                # Also a file that stays where it is and cannot be read is not asked for again.
                self._unreadable.add(link.key(part))
                continue
            tokens, slices = file
            self._put(link, tokens, {part: slices})
        if None in found:
            return None
        return {link.name for link, _ in missing}

    def _put(self, link: Link, tokens: bytes, parts: dict[str, Part]) -> Page:
        page = self._pages.get(link.name)
        if page is None:
            page = self._pages[link.name] = Page(link, tokens)
            self._behind.setdefault(link.parent, set()).add(link.name)
        for part, slices in parts.items():
            if part not in page.parts:
                page.parts[part] = slices
                self.nbytes += page.nbytes(part)
        self._tick += 1
        page.used = self._tick
        return page

    def _touch(self, links: Iterable[Link]) -> None:
        self._tick += 1
        used = list(links)
        for link in used:
            if link.name in self._pages:
                self._pages[link.name].used = self._tick
        if self._disk is not None:
            self._disk.used([link.key(part) for link in used for part in self.kinds.parts])

    def _keep_on_disk(self, links: Iterable[Link], named: bool = False) -> None:
        self._open()
        if self._disk is None:
            return
        pages = [self._pages[link.name] for link in links if link.name in self._pages]
        self._disk.write(
            (
                (page.link.key(part), page.link.start, page.tokens, slices)
                for page in pages
                for part, slices in page.parts.items()
            ),
            named,
        )

    def _forget(self, links: Iterable[Link]) -> None:
        """Pages that do not fit the model's caches: out of RAM and off the disk."""
        for link in links:
            if link.name in self._pages:
                self._drop(self._pages[link.name], self.kinds.parts)
            if self._disk is not None:
                for part in self.kinds.parts:
                    self._disk.remove(link.key(part))

    def _drop(self, page: Page, parts: Iterable[str]) -> None:
        for part in parts:
            self.nbytes -= page.nbytes(part)
            page.parts.pop(part, None)
        if not page.parts:
            del self._pages[page.link.name]
            siblings = self._behind[page.link.parent]
            siblings.discard(page.link.name)
            if not siblings:
                del self._behind[page.link.parent]

    def _shrink(self) -> None:
        """Back under the budget: far window parts, then leaves; least recently used first."""
        if self.nbytes <= self.budget_bytes:
            return
        near = self._near()
        far = [
            page
            for name, page in self._pages.items()
            if WINDOW in page.parts and name not in near and name not in self._pinned
        ]
        for page in sorted(far, key=lambda page: (page.used, page.link.start)):
            self._drop(page, [WINDOW])
            if self.nbytes <= self.budget_bytes:
                return
        self._drop_leaves()

    def _near(self) -> set[str]:
        """Pages whose window part somebody needs who goes on at a tip or a fork."""
        near: set[str] = set()
        for name, page in self._pages.items():
            if len(self._behind.get(name, ())) == 1:
                continue
            first = page.link.stop - (self.kinds.reach - 1)
            at: Page | None = page
            while at is not None and (at.link.stop > first or at is page):
                near.add(at.link.name)
                at = self._pages.get(at.link.parent)
        return near

    def _drop_leaves(self) -> None:
        def entry(page: Page) -> tuple[int, int, str]:
            return page.used, -page.link.start, page.link.name

        leaves = [entry(p) for name, p in self._pages.items() if name not in self._behind]
        heapq.heapify(leaves)
        while leaves and self.nbytes > self.budget_bytes:
            name = heapq.heappop(leaves)[2]
            if name in self._pinned:
                continue
            page = self._pages[name]
            for part in (WINDOW, FULL):
                if self.nbytes > self.budget_bytes and part in page.parts:
                    self._drop(page, [part])
            parent = self._pages.get(page.link.parent)
            is_leaf = page.link.parent not in self._behind
            if name not in self._pages and parent is not None and is_leaf:
                heapq.heappush(leaves, entry(parent))


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32."""
    return array("i", tokens).tobytes()


def unpacked(data: bytes) -> array[int]:
    """The inverse of `packed`."""
    ids = array("i")
    ids.frombytes(data)
    return ids


def n_common(a: bytes, b: bytes) -> int:
    """Leading tokens that two packed sequences share."""
    n = min(len(a), len(b)) // 4
    if a[: 4 * n] == b[: 4 * n]:
        return n
    x, y = unpacked(a[: 4 * n]), unpacked(b[: 4 * n])
    return next(i for i in range(n) if x[i] != y[i])
