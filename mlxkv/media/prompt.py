"""The media of one prompt: where they stand in its tokens, and where it may be cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from mlxkv.errors import MediaError
from mlxkv.media.types import AUDIO, IMAGE, Medium

SURE = 8
"""Rows of a medium that have to be equal before KV behind them is used: one id has 31 bits of the
content's hash."""
WORDS = {IMAGE: "picture", AUDIO: "sound"}
"""What a kind is called in messages."""


class MediaSpan(NamedTuple):
    """A medium among tokens, from `start` to `stop`."""

    start: int
    stop: int
    medium: Medium


class PromptMedia:
    """The media of a prompt; spans are looked up in any tokens that hold some of them.

    Args:
        media: each content once or more often.
    """

    def __init__(self, media: Iterable[Medium] = ()):
        self._by_first: dict[int, Medium] = {}
        for medium in media:
            known = self._by_first.get(medium.ids[0])
            if known is None or known.data is None:
                self._by_first[medium.ids[0]] = medium

    def __iter__(self) -> Iterator[Medium]:
        return iter(self._by_first.values())

    def __bool__(self) -> bool:
        return bool(self._by_first)

    def __or__(self, other: PromptMedia) -> PromptMedia:
        """These and the others."""
        if not (self and other):
            return self or other
        return PromptMedia([*self, *other])

    def spans(self, tokens: Sequence[int]) -> list[MediaSpan]:
        """Where media stand, in order; the last may be cut short by the end of the tokens."""
        if not self:
            return []
        found: list[MediaSpan] = []
        at = 0
        for i, token in enumerate(tokens):
            if token < 0 and i >= at and (medium := self._by_first.get(token)) is not None:
                at = min(i + medium.n_tokens, len(tokens))
                found.append(MediaSpan(i, at, medium))
        return found

    def check(self, tokens: Sequence[int]) -> None:
        """Raise MediaError if tokens hold a medium that is not among these."""
        if min(tokens, default=0) >= 0:
            return
        stop = 0
        for start, end, _ in [*self.spans(tokens), MediaSpan(len(tokens), 0, _NONE)]:
            if min(tokens[stop:start], default=0) < 0:
                raise MediaError("a picture or sound of the prompt is not known any more")
            stop = end

    def vocabulary(self, tokens: Sequence[int]) -> list[int]:
        """Tokens as the vocabulary has them: where media stand, the tokens that stand for rows."""
        if min(tokens, default=0) >= 0:
            return list(tokens)
        known = self._medium_of
        return [x if x >= 0 else known[x].token if x in known else 0 for x in tokens]

    def resumable(self, tokens: Sequence[int], n: int, two_way: Collection[str] = ()) -> int:
        """The last place up to `n` tokens from which KV may be gone on from.

        Args:
            tokens: the prompt.
            n: leading tokens of it.
            two_way: kinds whose rows see each other both ways, see `CausalLM.two_way_kinds`.
        """
        for start, stop, medium in self.spans(tokens[:n] if self else ()):
            is_cut = stop == n and n - start < medium.n_tokens
            if is_cut and (medium.kind in two_way or n - start < SURE):
                return start
        return n

    def behind(self, tokens: Sequence[int], n: int) -> int:
        """The first place from `n` tokens on that is inside no medium."""
        return next((stop for start, stop, _ in self.spans(tokens) if start < n < stop), n)

    def text(
        self,
        tokens: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        numbers: Mapping[int, int] = MappingProxyType({}),
    ) -> str:
        """What tokens say, for messages: `Look: [picture 2: photo.jpg]`.

        Args:
            tokens: any, also a part of a medium's.
            decode: of tokens of the vocabulary.
            numbers: index of a token -> which medium of its kind it belongs to, see `numbers`.
        """
        parts, i = [], 0
        while i < len(tokens):
            is_text, j = tokens[i] >= 0, i + 1
            medium = self._medium_of.get(tokens[i])
            while j < len(tokens) and (tokens[j] >= 0) == is_text:
                if medium is not None and self._medium_of.get(tokens[j]) != medium:
                    break
                j += 1
            name = "another picture or sound" if medium is None else label(medium, numbers.get(i))
            parts.append(decode(list(tokens[i:j])) if is_text else f"[{name}]")
            i = j
        return "".join(parts)

    def numbers(self, tokens: Sequence[int], start: int, stop: int) -> dict[int, int]:
        """Of the media among some tokens of a prompt, which of their kind each is, from 1 on.

        Args:
            tokens: the prompt.
            start, stop: of the part that is asked for.

        Returns:
            For each token of a medium, counted from `start`.
        """
        found: dict[int, int] = {}
        n_seen: Counter[str] = Counter()
        for first, last, medium in self.spans(tokens):
            n_seen[medium.kind] += 1
            inside = range(max(first, start), min(last, stop))
            found.update((i - start, n_seen[medium.kind]) for i in inside)
        return found

    @cached_property
    def _medium_of(self) -> dict[int, Medium]:
        return {x: medium for medium in self for x in medium.ids}


_NONE = Medium(IMAGE, b"", 0, 0)
NO_MEDIA = PromptMedia()


def label(medium: Medium, number: int | None = None) -> str:
    """What messages call a medium: `picture photo.jpg`, or `picture 2: photo.jpg`."""
    word = WORDS[medium.kind]
    if number is None:
        return f"{word} {medium.name}".rstrip()
    return f"{word} {number}: {medium.name}" if medium.name else f"{word} {number}"


def chunk_within(
    spans: Sequence[MediaSpan], two_way: Collection[str], at: int, n: int
) -> tuple[int, bool]:
    """How many of the next `n` tokens may be computed at once, and whether not fewer.

    A chunk that would end inside a medium whose rows see each other both ways ends before it; one
    that begins with it takes the whole, also where that is more than `n`.

    Args:
        spans: media in their order.
        two_way: those kinds.
        at: position of the first of the tokens.
        n: tokens, at least one.
    """
    for start, stop, medium in spans:
        if start < at + n < stop and medium.kind in two_way:
            return (start - at, False) if start > at else (stop - at, True)
    return n, False
