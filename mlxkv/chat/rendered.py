"""A rendered conversation: its text, and which of its characters are never control tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Span = tuple[int, int]
"""First character, and the one behind the last."""


class Segment(NamedTuple):
    """A part of a rendered text.

    Args:
        text: what it reads.
        is_plain: whether it is ordinary text, control tokens that it spells included.
        tokens: its token ids, where they are known: what the model itself wrote.
    """

    text: str
    is_plain: bool = True
    tokens: Sequence[int] | None = None


class Known(NamedTuple):
    """A span whose token ids are known. What is before and behind it is encoded apart from it."""

    start: int
    end: int
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a chat template wrote.

    Args:
        text: all of it, control tokens written out.
        plain: spans of the text that are ordinary text, in order and apart: `<|im_end|>` inside
            one is ten characters that a user wrote. Outside of them a control token's text is
            that token.
        known: spans of which the token ids are known, in order and apart, and none of them plain.
        owner: whose conversation it is (an API key): what is remembered of its text is of use to
            the owner's later ones alone.
    """

    text: str
    plain: tuple[Span, ...] = ()
    known: tuple[Known, ...] = ()
    owner: str = ""

    @classmethod
    def of(cls, segments: Iterable[Segment], owner: str = "") -> Rendered:
        """Join segments."""
        texts: list[str] = []
        plain: list[Span] = []
        known: list[Known] = []
        end = 0
        for text, is_plain, tokens in segments:
            start, end = end, end + len(text)
            texts.append(text)
            if tokens is not None:
                known.append(Known(start, end, tokens))
            elif is_plain and text:
                if plain and plain[-1][1] == start:
                    start = plain.pop()[0]
                plain.append((start, end))
        return cls("".join(texts), tuple(plain), tuple(known), owner)

    def behind(self, n: int) -> Rendered:
        """All but the first n characters. A known span that is cut is encoded as control."""
        spans = ((max(start - n, 0), end - n) for start, end in self.plain if end > n)
        known = (Known(a - n, b - n, ids) for a, b, ids in self.known if a >= n)
        return Rendered(self.text[n:], tuple(spans), tuple(known), self.owner)

    def before(self, n: int) -> Rendered:
        """The first n characters. A known span that is cut is encoded as control."""
        spans = ((start, min(end, n)) for start, end in self.plain if start < n)
        known = tuple(k for k in self.known if k.end <= n)
        return Rendered(self.text[:n], tuple(spans), known, self.owner)

    def segments(self) -> list[Segment]:
        """The text in parts; joined they are the text."""
        spans = [(start, end, True, None) for start, end in self.plain]
        spans += [(start, end, False, tokens) for start, end, tokens in self.known]
        parts: list[Segment] = []
        at = 0
        for start, end, is_plain, tokens in sorted(spans, key=lambda span: span[:2]):
            parts.append(Segment(self.text[at:start], False))
            parts.append(Segment(self.text[start:end], is_plain, tokens))
            at = end
        parts.append(Segment(self.text[at:], False))
        return [part for part in parts if part.text]
