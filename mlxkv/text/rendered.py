"""A rendered conversation: its text, and which of its characters are never control tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Span = tuple[int, int]
"""First character, and the one behind the last."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a chat template wrote.

    Args:
        text: all of it, control tokens written out.
        plain: spans of the text that are ordinary text, in order and apart: `<|im_end|>` inside
            one is ten characters that a user wrote. Outside of them a control token's text is
            that token.
    """

    text: str
    plain: tuple[Span, ...] = ()

    @classmethod
    def of(cls, segments: Iterable[tuple[str, bool]]) -> Rendered:
        """Join segments of text, each with whether it is plain."""
        texts: list[str] = []
        plain: list[Span] = []
        end = 0
        for text, is_plain in segments:
            start, end = end, end + len(text)
            texts.append(text)
            if not is_plain or start == end:
                continue
            if plain and plain[-1][1] == start:
                start = plain.pop()[0]
            plain.append((start, end))
        return cls("".join(texts), tuple(plain))

    def behind(self, n: int) -> Rendered:
        """All but the first n characters."""
        spans = ((max(start - n, 0), end - n) for start, end in self.plain if end > n)
        return Rendered(self.text[n:], tuple(spans))

    def before(self, n: int) -> Rendered:
        """The first n characters."""
        spans = ((start, min(end, n)) for start, end in self.plain if start < n)
        return Rendered(self.text[:n], tuple(spans))

    def segments(self) -> list[tuple[str, bool]]:
        """The text in parts, each with whether it is plain; joined they are the text."""
        parts: list[tuple[str, bool]] = []
        at = 0
        for start, end in self.plain:
            parts += [(self.text[at:start], False), (self.text[start:end], True)]
            at = end
        parts.append((self.text[at:], False))
        return [part for part in parts if part[0]]
