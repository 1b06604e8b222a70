"""Plan what to restore of a prompt, from the pages that are held. Nothing is changed or loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mlxkv.kv.types import STEP
from mlxkv.prefix.layout import FULL, WINDOW, Kinds, Link, chain_of, n_common, token_ids
from mlxkv.prefix.on_disk.format import ROOT, page_name

WORTH = 16
"""Tokens of a page that must be shared for the page to be restored in part, as a rule."""
HEADERS = 64
"""Files whose tokens are read to find where a prompt leaves a known sequence: 0.1 ms each."""


@dataclass(frozen=True, slots=True)
class Match:
    """What can be restored of a prompt.

    Args:
        links: its pages from position 0 on; perhaps not all tokens of the last.
        n_tokens: leading tokens of the prompt that these pages restore.
        shared: leading tokens of the prompt that some known sequence has as well.
        held: tokens of that sequence from `shared` on, some of them.
        n_known: how far that sequence is known.
        below: the same of the layers below a border, where those have pages apart (`border`).
    """

    links: tuple[Link, ...] = ()
    n_tokens: int = 0
    shared: int = 0
    held: tuple[int, ...] = ()
    n_known: int = 0
    below: Match | None = None


class Holdings(Protocol):
    """Pages that are held, in RAM or on disk."""

    @property
    def kinds(self) -> Kinds:
        """The kinds of the model's layers."""
        ...

    def holds(self, link: Link, part: str) -> bool:
        """Whether a part of a page can be had."""
        ...

    def is_in_ram(self, link: Link) -> bool:
        """Whether any part of a page is in RAM."""
        ...

    def children(self, parent: str, at: int) -> Iterator[Link]:
        """The pages that follow the page `parent` at position `at`, those in RAM first."""
        ...

    def tokens(self, link: Link) -> bytes:
        """A page's tokens, packed; none where they cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class _Neighbour:
    """A page that begins like the rest of a prompt, for `shared` tokens."""

    link: Link
    tokens: bytes
    shared: int


def plan_match(held: Holdings, data: bytes, limit: int, worth: int = WORTH) -> Match:
    """The longest prefix of a prompt that can be restored.

    Args:
        held: the pages to restore from.
        data: the prompt's tokens, packed.
        limit: tokens to restore at most.
        worth: tokens of a page that must be shared for it to be restored in part.
    """
    links = _chain(held, data, limit // STEP)
    at = links[-1].stop if links else 0
    parent = links[-1].name if links else ROOT
    near = _neighbours(held, parent, at, data[4 * at :])
    if held.kinds.states:
        usable, n_tokens = _with_state(held, links, data, limit)
    else:
        usable, n_tokens = _usable(held, links, limit, near, worth)
    if not near:
        return Match(tuple(usable), n_tokens, at, (), at)
    best = max(near, key=lambda page: page.shared)
    following = best.tokens[4 * best.shared :]
    if (child := next(held.children(best.link.name, best.link.stop), None)) is not None:
        following += held.tokens(child)
    known = _known_until(held, best.link)
    return Match(tuple(usable), n_tokens, at + best.shared, tuple(token_ids(following)), known)


def _chain(held: Holdings, data: bytes, n_pages: int) -> list[Link]:
    """The complete pages of a prompt as far as their full parts are held."""
    links: list[Link] = []
    for link in chain_of(data, n_pages):
        if held.kinds.full and not held.holds(link, FULL):
            break
        links.append(link)
    while links and not held.kinds.full and not held.holds(links[-1], WINDOW):
        links.pop()
    return links


def _usable(
    held: Holdings, links: list[Link], limit: int, near: Sequence[_Neighbour], worth: int
) -> tuple[list[Link], int]:
    """As much of a chain as window parts allow, with a part of a neighbour behind it."""
    kinds, at = held.kinds, links[-1].stop if links else 0
    for page in sorted(near, key=lambda page: -page.shared):
        n = min(page.shared, limit - at)
        if n < min(worth, page.link.n_tokens):
            break
        chain = [*links, page.link]
        has_full = not kinds.full or held.holds(page.link, FULL)
        windows = kinds.needed(chain, WINDOW, at + n)
        if has_full and all(held.holds(link, WINDOW) for link in windows):
            return chain, at + n
    for k in range(len(links), 0, -1):
        last = links[k - 1]
        windows = links[kinds.first_needed(last, last.stop) : k] if kinds.window else ()
        if all(held.holds(link, WINDOW) for link in windows):
            return links[:k], last.stop
    return [], 0


def _with_state(
    held: Holdings, links: list[Link], data: bytes, limit: int
) -> tuple[list[Link], int]:
    """As much of a chain, or of an unfinished page behind a page of it, as ends with a state."""
    for k in range(len(links), -1, -1):
        at, parent = (links[k - 1].stop, links[k - 1].name) if k else (0, ROOT)
        rest = data[4 * at : 4 * limit]
        ends = [
            link
            for link in held.children(parent, at)
            if link.n_tokens < STEP
            and 4 * link.n_tokens <= len(rest)
            and page_name(parent, rest[: 4 * link.n_tokens]) == link.name
            and held.holds(link, FULL)
            and held.holds(link, WINDOW)
        ]
        if ends:
            last = max(ends, key=lambda link: link.n_tokens)
            return [*links[:k], last], last.stop
        if k and held.holds(links[k - 1], WINDOW):
            return links[:k], links[k - 1].stop
    return [], 0


def _neighbours(held: Holdings, parent: str, at: int, rest: bytes) -> list[_Neighbour]:
    """The pages that follow `parent`, with the tokens each shares with the rest of a prompt."""
    near: list[_Neighbour] = []
    n_read = 0
    for link in held.children(parent, at) if rest else ():
        if not held.is_in_ram(link):
            mine = rest[: 4 * link.n_tokens]
            if page_name(parent, mine) == link.name:
                near.append(_Neighbour(link, mine, link.n_tokens))
                continue
            n_read += 1
            if n_read > HEADERS:
                continue
        tokens = held.tokens(link)
        near.append(_Neighbour(link, tokens, n_common(tokens, rest)))
    return near


def _known_until(held: Holdings, link: Link) -> int:
    """How far the sequence that goes through a page is known."""
    seen = {link.name}  # a file's name can be anything, also its own parent's
    while behind := [x for x in held.children(link.name, link.stop) if x.name not in seen]:
        link = max(behind, key=lambda child: (child.n_tokens, child.name))
        seen.add(link.name)
    return link.stop
