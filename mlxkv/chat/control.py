"""Which texts are control tokens, and a mark that keeps them apart from text that spells one.

A user or a tool may write `<|im_end|>`. Before a conversation is rendered, a mark goes into every
such text; a template carries it along like any other character. Behind the rendering the marks come
out again, and their places are the spans that are no control (`rendered.Rendered`).

What the model wrote itself may hold the markers of reasoning and calls, which are ordinary added
tokens in some vocabularies and stay as they are; special tokens are text there, too.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlxkv.chat.interrupt import check_point
from mlxkv.chat.rendered import Rendered, Span

Message = Mapping[str, Any]

FALLBACK = frozenset(
    {"<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
)
"""Markers that are written where a template knows no tools, see `tool_prompt`."""
_HTML = re.compile(
    r"</?(a|b|blockquote|br|caption|code|em|h[1-6]|i|img|li|ol|p|s|strong|sub|sup|table|tbody|td|"
    r"tfoot|th|thead|tr|u|ul)>"
)
WINDOW = 1 << 18
"""Characters that are searched at a time."""
# Noncharacters: Unicode sets them apart for use inside a program.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class Written(str):
    """Text of an earlier answer as the model wrote it, its control tokens included."""

    __slots__ = ()


@dataclass(frozen=True)
class Controls:
    """Texts that an encoder turns into control tokens.

    Args:
        special: the special tokens.
        others: further added tokens that are control: those that the chat template writes.
    """

    special: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()

    @classmethod
    def of(cls, added: Mapping[str, bool], template: str) -> Controls:
        """The control tokens of a vocabulary.

        Args:
            added: the added tokens, with whether each is special.
            template: source of the chat template.
        """
        special = {text for text, is_special in added.items() if is_special and text}
        written = FALLBACK | {text for text in added if text in template}
        others = {
            text
            for text in written & (added.keys() - special)
            if text.strip() and not _HTML.fullmatch(text)
        }
        return cls(frozenset(special), frozenset(others))

    @cached_property
    def all(self) -> frozenset[str]:
        """Every text that is a control token."""
        return self.special | self.others

    def found(self, text: str) -> list[Span]:
        """Where a text spells control tokens; spans may overlap."""
        return [] if self._any is None else list(_spans(self._any, text))

    def mark(self, messages: Sequence[Message], *more: Any) -> tuple[str, list[Any]]:
        """Mark what spells a control token in messages, and in any other texts beside them.

        Args:
            messages: the conversation.
            *more: tools, documents: JSON values, or None.

        Returns:
            The mark, "" if there is nothing to mark, and the arguments with it in them.
        """
        given = [messages, *more]
        if self._any is None or not any(self._spelled(value) for value in given):
            return "", given
        mark = _free_mark(given)
        marked = [self._message(message, mark) for message in messages]
        return mark, [marked, *(_mapped(value, self._any, mark) for value in more)]

    def unmark(self, text: str, mark: str) -> Rendered:
        """Take the marks out of a rendered text again."""
        if not mark:
            return Rendered(text)
        # A template may write JSON in ASCII.
        pieces = text.replace(_escaped(mark), mark).split(mark)
        clean = "".join(pieces)
        places, at = set(), 0
        for piece in pieces[:-1]:
            at += len(piece)
            places.add(at - 1)
        return Rendered(clean, _merged(span for span in self.found(clean) if span[0] in places))

    @cached_property
    def _any(self) -> re.Pattern[str] | None:
        return _pattern(self.all)

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        return _pattern(self.special)

    def _spelled(self, value: Any) -> bool:
        assert self._any is not None
        return any(next(_spans(self._any, text), None) for text in _texts(value))

    def _message(self, message: Any, mark: str) -> Any:
        if not isinstance(message, Mapping):
            return message
        own = message.get("role") == "assistant"
        pattern = self._special if own else self._any
        return {
            key: value if key == "role" else _mapped(value, pattern, mark)
            for key, value in message.items()
        }


def overlapping(spans: Iterable[Span], plain: Sequence[Span]) -> list[Span]:
    """Those of the spans that share a character with plain ones; both are in order."""
    found, i = [], 0
    for start, end in spans:
        while i < len(plain) and plain[i][1] <= start:
            i += 1
        if i < len(plain) and plain[i][0] < end:
            found.append((start, end))
    return found


def _merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _texts(value: Any) -> Iterable[str]:
    """All texts in a JSON value, names of keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _mapped(value: Any, pattern: re.Pattern[str] | None, mark: str) -> Any:
    """A copy with the mark behind the first character of what the pattern finds."""
    if pattern is None or isinstance(value, Written):
        return value
    if isinstance(value, str):
        places = [start + 1 for start, _ in _spans(pattern, value)]
        bounds = itertools.pairwise([0, *places, len(value)])
        return mark.join(value[start:end] for start, end in bounds) if places else value
    if isinstance(value, Mapping):
        items = value.items()
        return {_mapped(k, pattern, mark): _mapped(v, pattern, mark) for k, v in items}
    if isinstance(value, list | tuple):
        return [_mapped(item, pattern, mark) for item in value]
    return value


def _spans(pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    """Where a pattern matches, from each character on: matches may overlap."""
    longest = len(pattern.pattern)  # it spells all that it finds
    at = 0
    for end in range(WINDOW, len(text) + WINDOW, WINDOW):
        # No search takes longer than one window: it can be ended, and other threads run, between.
        check_point()
        while (found := pattern.search(text, at, end + longest)) and found.start() < end:
            yield found.span()
            at = found.start() + 1
        at = max(at, end)


def _pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Finds the longest of some texts; None for no texts."""
    listed = sorted(texts)
    return re.compile(_alternatives(listed)) if listed else None


def _alternatives(texts: Sequence[str]) -> str:
    """A pattern of sorted texts, common beginnings written once: a word is read but once then."""
    found = []
    for _, group in itertools.groupby(texts, lambda text: text[0]):
        same = list(group)
        head = _common_start(same[0], same[-1])
        tails = [text[len(head) :] for text in same if text != head]
        optional = "?" if len(tails) < len(same) else ""
        found.append(re.escape(head) + (f"(?:{_alternatives(tails)}){optional}" if tails else ""))
    return "|".join(found)


def _common_start(a: str, b: str) -> str:
    n = min(len(a), len(b))
    return a[: next((i for i in range(n) if a[i] != b[i]), n)]


def _free_mark(values: Iterable[Any]) -> str:
    """A mark that occurs in none of the texts, as it is or escaped."""
    texts = list(_texts(list(values)))
    for mark in _MARKS:
        if not any(mark in text or _escaped(mark) in text for text in texts):
            return mark
    return _MARKS[0] + secrets.token_hex(16)


def _escaped(mark: str) -> str:
    return json.dumps(mark)[1:-1]
