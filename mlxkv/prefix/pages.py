"""Prefix pages: KV that was computed once, found again by the tokens it was computed from.

Invariants:
- A page holds the KV of `STEP` consecutive tokens, of all layers; of fewer only where a sequence
  stopped (a tip). Its full part is what layers without a window need, its window part the rest.
- Its name is the chain of all tokens up to its end. Names know no model: one `Pages` serves one
  model in one dtype and KV format, and on disk the folder's name says which.
- To go on at position p, full parts of [0, p) are needed and window parts of [p - window, p). The
  last page may be used in part: its first tokens do not depend on those behind them.
- What RAM holds is bounded in bytes and in arrays, of which a page has one for each part. Others
  make way before a page counts, whether it was computed, read for a prompt or fetched ahead. What
  finds no room beside the pages that a prompt needs goes into its caches and is not kept.
- `match.plan_match` plans and changes nothing; `Pages.load` acts. Nothing is computed here: what
  caches held goes back into caches bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxkv.errors import UsageError
from mlxkv.kv.layout import Cache
from mlxkv.kv.types import STEP
from mlxkv.prefix.checkpoints import Checkpoints
from mlxkv.prefix.layout import WINDOW, Kinds, Link, part_names, token_bytes
from mlxkv.prefix.match import WORTH, Match, plan_match
from mlxkv.prefix.on_disk.format import PageKey
from mlxkv.prefix.on_disk.part import Part, load_parts
from mlxkv.prefix.ram import RamPages
from mlxkv.prefix.room import RamRoom
from mlxkv.prefix.shared import SharedPrefixes

if TYPE_CHECKING:
    from mlxkv.prefix.on_disk.disk import PageDisk

FETCH_BYTES = 256 << 20
"""Bytes that are held of what was fetched, at most."""


class Pages:
    """The pages of one model.

    Args:
        kinds: of its layers.
        budget_bytes: what pages may take in RAM.
        stable: tokens of a sequence up to which KV does not depend on what follows; None for all.
        open_disk: gives the pages on disk, asked for at the first prompt that has a whole page.

    Attributes:
        room: what they may take in RAM.
        checkpoints: which ends of conversations go to disk.
        weight: their part of an owner's room; 1 for pages of all layers.
    """

    def __init__(
        self,
        kinds: Kinds,
        budget_bytes: int,
        stable: int | None = None,
        open_disk: Callable[[], PageDisk | None] | None = None,
    ):
        self.kinds, self.stable, self.weight = kinds, stable, 1.0
        self.ram = RamPages(kinds)
        self._shared = SharedPrefixes(kinds)
        self.room = RamRoom(self.ram, self._shared, budget_bytes)
        self._open_disk = open_disk
        self._disk: PageDisk | None = None
        self._unreadable: set[PageKey] = set()
        self._writes_through = False
        self.checkpoints = Checkpoints(self)

    @property
    def nbytes(self) -> int:
        """Bytes that pages take in RAM, and those that were fetched for a prompt."""
        return self.ram.nbytes + (0 if self._disk is None else self._disk.fetcher.nbytes)

    @property
    def disk(self) -> PageDisk | None:
        """The pages on disk, None where there are none to be."""
        self._open()
        return self._disk

    @property
    def ssd_bytes(self) -> int:
        """Bytes that those pages have in files."""
        return 0 if self._disk is None else self._disk.files.usage().n_bytes

    @property
    def opened_disk(self) -> PageDisk | None:
        """The pages on disk, None where there are none, or no prompt had a whole page."""
        return self._disk

    def _open(self) -> None:
        # The model's name on disk is a hash of its weights, which short prompts do not wait for.
        if self._open_disk is not None:
            self._disk, self._open_disk = self._open_disk(), None
            if self._disk is not None:
                self.room.fetcher = self._disk.fetcher
                for name, links in self._disk.shared_prefixes().items():
                    self._shared.put(name, links)

    def match(self, tokens: Sequence[int], limit: int, worth: int = WORTH) -> Match:
        """The longest prefix that can be restored.

        Args:
            tokens: a prompt.
            limit: tokens to restore at most.
            worth: tokens of a page that must be shared for it to be restored in part.
        """
        if self.stable is not None:
            limit = min(limit, self.stable)
        if limit >= STEP:
            self._open()
        return plan_match(self, token_bytes(tokens), limit, worth)

    def holds(self, link: Link, part: str) -> bool:
        """Whether a part of a page is in RAM, or can be read from disk."""
        if self.ram.has(link, part):
            return True
        key = link.key(part)
        return self._disk is not None and key not in self._unreadable and key in self._disk

    def is_in_ram(self, link: Link) -> bool:
        """Whether any part of a page is in RAM."""
        return self.ram.get(link.name) is not None

    def children(self, parent: str, at: int) -> Iterator[Link]:
        """The pages that follow the page `parent` at position `at`, those in RAM first."""
        in_ram = self.ram.behind(parent)
        for page in in_ram:
            yield page.link
        known = {page.link.name for page in in_ram}
        for name, n in self._disk.children(parent) if self._disk is not None else ():
            if name not in known:
                yield Link(parent, name, at, n)

    def tokens(self, link: Link) -> bytes:
        """A page's tokens, packed; none where they cannot be read."""
        if (page := self.ram.get(link.name)) is not None:
            return page.tokens
        if self._disk is None:
            return b""
        found = (self._disk.tokens(link.key(part)) for part in self.kinds.parts)
        return next((tokens for tokens in found if tokens), b"")

    def fetch(self, links: Sequence[Link], free_bytes: int, *, is_guess: bool = False) -> None:
        """Begin to read in the background what is on disk alone of a sequence's pages.

        Args:
            links: of a sequence that is likely to be gone on from.
            free_bytes: that may be taken for it, until `load`.
            is_guess: whether no request is known to need them.
        """
        if self._disk is None or not links:
            return
        needed = self.kinds.all_needed(links, links[-1].stop)
        wanted = [
            link.key(part)
            for part, some in needed.items()
            for link in some
            if not self.ram.has(link, part) and link.key(part) in self._disk
        ]
        fetcher = self._disk.fetcher
        most = min(FETCH_BYTES, max(0, free_bytes) + fetcher.nbytes)
        n_bytes = min(most, fetcher.nbytes + sum(map(self._disk.files.at.nbytes, wanted)))
        has_room = self.room.make_ahead(n_bytes, part_names(needed))
        fetcher.fetch(wanted, has_room, is_guess=is_guess)

    def fetched(self) -> tuple[int, float]:
        """Bytes that `load` had fetched already since the last call, and seconds that saved."""
        return (0, 0.0) if self._disk is None else self._disk.fetcher.spent()

    def load(self, match: Match, caches: Sequence[Cache], room: int = 0) -> int | None:
        """Fill caches with what was matched.

        `room` are tokens that come next; for a step of them caches need not grow.

        Returns:
            Tokens of it that came from disk; None, with the caches in any state, where a page
            could not be read any more: match again.
        """
        links, stop = match.links, match.n_tokens
        needed = self.kinds.all_needed(links, stop)
        kept, read = part_names(needed), set[str]()
        try:
            for part, some in needed.items():
                if (parts := self._bring(part, some, kept, read)) is None:
                    return None
                load_parts([caches[i] for i in self.kinds.caches(part)], parts, stop, room)
        except UsageError:
            self.forget(links)
            return None
        self.touch(links)
        again = self.checkpoints.loaded(links)
        self.keep(again if self._disk is not None else ())
        # Pages that no layer needs any more count as the first that one does.
        first = next(iter(needed.values()))[0]
        from_disk = (x for x in links if (first if x.start < first.start else x).name in read)
        return sum(min(link.stop, stop) - link.start for link in from_disk)

    def rows_before(self, link: Link, stop: int) -> Part | None:
        """The window rows of a page in RAM before position `stop`, in an array of their own."""
        if self.kinds.states or not self.ram.has(link, WINDOW):
            return None
        rows = self.ram.part(link, WINDOW).before(stop)
        mx.eval(rows.words)
        return rows

    def has(self, link: Link) -> bool:
        """Whether a page is in RAM with all its parts."""
        return all(self.ram.has(link, part) for part in self.kinds.parts)

    def add(
        self, link: Link, tokens: bytes, parts: dict[str, Part], chain: Sequence[Link] = ()
    ) -> None:
        """Keep a page, or the parts of it that are not here yet.

        Args:
            link: its place.
            tokens: its own, packed.
            parts: evaluated.
            chain: the pages before it, which are in use as well: where not all of a sequence finds
                room, it is its end that does not.
        """
        with self.ram.arriving():
            self.ram.put(link, tokens, parts)
            self.ram.touch([*chain, link])
            if self._writes_through:
                self.keep([link], named=True)
            self.ram.drop_outgrown(link, tokens)
            self.room.fit()

    def touch(self, links: Sequence[Link]) -> None:
        """Say that a sequence goes on from these pages."""
        self.ram.touch(links)
        if self._disk is not None:
            self._disk.used([link.key(part) for link in links for part in self.kinds.parts])

    @property
    def shared(self) -> Mapping[str, Sequence[Link]]:
        """The prefixes that `share` named, here or before a restart."""
        return self._shared.chains

    def share(self, name: str, links: Sequence[Link]) -> None:
        """Evict the pages of a prefix that many sequences share after all others.

        Args:
            name: one that had other pages gives those up.
            links: whole pages from position 0 on.
        """
        self._shared.put(name, links)
        self.keep(links)
        self.note_shared()

    def note_shared(self) -> None:
        """Have the disk remember the shared prefixes, as soon as its folder is free."""
        if self._disk is not None:
            self._disk.shared.write(self._shared.chains)

    def keep(self, links: Iterable[Link], *, named: bool = False, wait: bool = False) -> None:
        """Write pages that are in RAM to disk, in the background.

        Args:
            links: trunk first.
            named: they belong to named KV, see `PageFiles.write`.
            wait: for room in the writer's queue.
        """
        if not (links := list(links)) or self.disk is None:
            return
        pages = [page for link in links if (page := self.ram.get(link.name)) is not None]
        if named:
            self.checkpoints.forget(page.link for page in pages)
        self.disk.write(
            (
                (page.link.key(part), page.link.start, page.tokens, kv)
                for page in pages
                for part, kv in page.parts.items()
            ),
            named=named,
            wait=wait or named,
        )

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
        needed = self.kinds.all_needed(links, links[-1].stop).items()
        return [link.key(part) for part, some in needed for link in some]

    def forget(self, links: Iterable[Link]) -> None:
        """Give up pages that hold no KV of this model, in RAM and on disk."""
        for link in links:
            if (page := self.ram.get(link.name)) is not None:
                self.ram.drop(page, self.kinds.parts)
            for key in map(link.key, self.kinds.parts):
                if self._disk is not None:
                    self._disk.remove(key)
                    if key in self._disk:  # in a folder that cannot be written
                        self._unreadable.add(key)

    def give_back(self, n_bytes: int) -> int:
        """Give up so much of RAM until `take_share`.

        Where there is a disk, what goes is written there first.

        Returns:
            Bytes that were given up; fewer than asked for where pages are pinned.
        """
        fetched = 0 if self._disk is None else self._disk.fetcher.clear()
        n_bytes -= fetched
        if n_bytes <= 0:
            return fetched
        before, pages = self.ram.nbytes, list(self.ram)
        going = {page.link.name: dict(page.parts) for page in pages}
        self.room.cap_bytes = max(0, before - n_bytes)
        self.room.fit()
        if before == self.ram.nbytes:
            return fetched
        if self._disk is not None:
            self._disk.write(
                (
                    (page.link.key(part), page.link.start, page.tokens, kv)
                    for page in pages
                    for part, kv in going[page.link.name].items()
                    if part not in page.parts
                ),
                wait=True,
            )
            self._disk.flush()
        return fetched + before - self.ram.nbytes

    def take_share(self) -> None:
        """What was given back may be taken again."""
        self.room.cap_bytes = None

    def clear(self) -> None:
        """Forget what is in RAM."""
        self.ram.clear()

    def close(self, *, at_exit: bool = False) -> None:
        """Write what is worth keeping, wait for it, and forget what is in RAM.

        Args:
            at_exit: the interpreter is ending: no disk is opened any more.
        """
        links = self.checkpoints.closing()
        # A sequence of less than a page is computed faster than a process starts.
        if links and links[-1].stop >= STEP and not (at_exit and self._disk is None):
            self.keep(links, wait=True)
        if self._disk is not None:
            self._disk.close()
            self._disk = None
        self.clear()

    def _bring(
        self, part: str, links: Sequence[Link], kept: Set[tuple[str, str]], read: set[str]
    ) -> list[Part] | None:
        """A part of some pages, read from disk where it is not in RAM; None where one is gone.

        Args:
            part: of the pages.
            links: the pages.
            kept: (page, part) that does not make way for what is read.
            read: the names of pages that were read are added.
        """
        found: list[Part] = []
        has_room = True
        for i, link in enumerate(links):
            if self.ram.has(link, part):
                found.append(self.ram.part(link, part))
                continue
            file = None if self._disk is None else self._disk.read(link.key(part))
            if file is None:
                # What is gone may be written again; what is still there cannot be read.
                if self._disk is not None and link.key(part) in self._disk:
                    self._unreadable.add(link.key(part))
                continue  # those behind it may be gone as well: they are not matched again
            tokens, kv = file
            if has_room and not self.room.has(kv.nbytes):
                # At once for all that will be read: each time takes a walk over all pages.
                coming = [x.n_tokens for x in links[i:] if not self.ram.has(x, part)]
                n_bytes = kv.nbytes * sum(coming) // link.n_tokens
                self.room.make(n_bytes, len(coming), kept)
                has_room = self.room.has(kv.nbytes)
            if has_room:
                self.ram.put(link, tokens, {part: kv})
            found.append(kv)
            read.add(link.name)
        return found if len(found) == len(links) else None
