"""Ends of conversations on disk, where layers keep a state: a killed process loses little.

A state is as large as the keys and values of thousands of tokens, and good in one place. So an end
is written where a conversation goes on, and where it lies `STEP` tokens or more behind the last
state that disk has of it; ends that it went on from are deleted again.

Invariants:
- Of what is written here a conversation has two ends on disk, the last and the one before, which is
  whole when a process is killed while the last is written; more where they are worth it.
- An end that several sequences went on from, that is worth its bytes (`RamPages.is_passed`), or
  that belongs to named KV, is not deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from mlxkv.kv.types import STEP
from mlxkv.prefix.layout import WINDOW, Kinds, Link
from mlxkv.prefix.on_disk.disk import PageDisk
from mlxkv.prefix.on_disk.format import ROOT, page_name
from mlxkv.prefix.ram import RamPages

MOST_ENDS = 1024
"""Ends that are known at most; older ones are left to eviction."""


class Holds(Protocol):
    """The pages of one model, see `Pages`."""

    kinds: Kinds
    ram: RamPages

    @property
    def disk(self) -> PageDisk | None: ...
    @property
    def opened_disk(self) -> PageDisk | None: ...
    def tokens(self, link: Link) -> bytes: ...


class Checkpoints:
    """Writes the ends of sequences that are gone on from.

    Args:
        pages: of one model.
    """

    def __init__(self, pages: Holds):
        self._pages = pages
        self._ends: dict[str, Link] = {}

    def loaded(self, links: Sequence[Link]) -> list[Link]:
        """Of pages that a sequence goes on from, those to write: it is their second use.

        Whole ones; an unfinished one with a state too, where a second sequence goes on from it, or
        disk has no state near.
        """
        whole = [link for link in links if link.n_tokens == STEP]
        if not self._pages.kinds.states:
            return whole
        is_shared = self._pages.ram.again(links[-1])
        if len(whole) == len(links) or not (is_shared or not self._has_near(links)):
            return whole
        if not is_shared:
            self._note(links[-1])
        return list(links)

    def ended(self, links: Sequence[Link]) -> list[Link]:
        """Pages of a conversation to write at the end of an answer; none if disk has one near it.

        Ends of it but the last are deleted, and those that were left.
        """
        # A sequence of less than a page is computed faster than a process starts.
        if not links or links[-1].stop < STEP or self._pages.disk is None or self._has_near(links):
            return []
        self._drop_earlier(links)
        self._note(links[-1])
        return list(links)

    def closing(self) -> list[Link]:
        """The pages in RAM to write, trunk first, when they are given up; what their conversations
        have passed is deleted."""
        known = [page for end in self._ends.values() if (page := self._pages.ram.get(end.name))]
        self._delete([page.link for page in known if self._pages.ram.is_passed(page)])
        return self._pages.ram.worth_keeping()

    def forget(self, links: Iterable[Link]) -> None:
        """Never delete these."""
        for link in links:
            self._ends.pop(link.name, None)

    def _note(self, link: Link) -> None:
        if link.n_tokens < STEP:
            self._ends[link.name] = link
            while len(self._ends) > MOST_ENDS:
                del self._ends[next(iter(self._ends))]

    def _drop_earlier(self, links: Sequence[Link]) -> None:
        """Delete the files of earlier ends of a sequence, but for the last."""
        ram = self._pages.ram
        of_chain = {link.parent: link for link in links}
        found = []
        for end in self._ends.values():
            page = of_chain.get(end.parent)
            if page is None or end.n_tokens > page.n_tokens or end.name == page.name:
                continue
            if end.name == page_name(end.parent, self._pages.tokens(page)[: 4 * end.n_tokens]):
                found.append(end)
        going = sorted(found, key=lambda link: link.stop)[:-1]
        for end in self._ends.values():
            if (known := ram.get(end.name)) is not None and ram.is_left(known):
                going.append(end)
        self._delete(end for end in going if (p := ram.get(end.name)) is None or ram.is_passed(p))

    def _delete(self, going: Iterable[Link]) -> None:
        disk = self._pages.opened_disk
        for end in going:
            self._ends.pop(end.name, None)
            if disk is not None:
                for part in self._pages.kinds.parts:
                    disk.remove(end.key(part))

    def _has_near(self, links: Sequence[Link]) -> bool:
        """Whether disk has a state of a sequence less than `STEP` tokens before its end, or at
        it."""
        disk, stop = self._pages.opened_disk, links[-1].stop
        if disk is None:
            return False
        for link in links[-2:]:
            if stop - link.stop < STEP and link.key(WINDOW) in disk:
                return True
            data = self._pages.tokens(link)
            for name, n in disk.children(link.parent):
                tip = Link(link.parent, name, link.start, n)
                is_near = n < min(STEP, link.n_tokens) and stop - tip.stop < STEP
                is_own = is_near and name == page_name(link.parent, data[: 4 * n])
                if is_own and tip.key(WINDOW) in disk:
                    return True
        return False


def goes_on(pages: Holds, links: Sequence[Link], data: bytes) -> bool:
    """Whether a sequence is the first that goes on behind some tokens: a conversation, and no
    other question behind a system prompt.

    Args:
        pages: of the model.
        links: the whole pages that the sequence had there.
        data: the tokens, packed.
    """
    n_whole = len(links) * STEP * 4
    parent = links[-1].name if links else ROOT
    name = page_name(parent, data[n_whole:]) if len(data) > n_whole else parent
    page = pages.ram.get(name)
    return page is not None and page.n_loads == 1
