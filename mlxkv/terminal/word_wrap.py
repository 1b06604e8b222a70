"""Word wrap of text that is streamed to a terminal.

Invariants:
- Text is written as it comes. A word that reaches the edge is erased and written again on the next
  line, so nothing but spaces is ever held back.
- Lines of a fenced code block and rows of a table stay whole, and so does a word that is longer
  than a line: the terminal wraps these itself, and copies them as one line.
- The last column stays free: a cursor behind it cannot be moved back on all terminals alike.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TextIO

MIN_COLUMNS = 16
"""A narrower terminal gets the text as it is."""
MAX_LINE_START = 200
"""Characters of a line that are looked at for its kind."""

_UNITS = re.compile(r"\n|[ \t]+|[^ \t\n]+")
_INDENT = re.compile(r"[ \t]*(?:(?:[-*+\u2022]|\d{1,3}[.)])[ \t]+)?")
_FENCE = re.compile(r"[ \t>]*(`{3,}(?=[^`]*\Z)|~{3,})(.*)")
_AS_IS = re.compile(r"[ \t>]*(?:\||`{3}(?=[^`]*\Z)|~{3})")


def wrap_for(stream: TextIO) -> WordWrap | None:
    """A word wrap for this stream; None if it is no terminal, or one without cursor movement."""
    try:
        if not stream.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
            return None
        number = stream.fileno()
        os.get_terminal_size(number)
    except (OSError, ValueError):
        return None
    return WordWrap(lambda: os.get_terminal_size(number).columns)


class WordWrap:
    """Turns the pieces of a text into what is to be written for them.

    Args:
        columns: the terminal's width now; it is read for each piece.

    Attributes:
        column: where the cursor is in its line, without spaces that are held back.
    """

    def __init__(self, columns: Callable[[], int]):
        self._columns, self._width = columns, columns()
        self._fence = ""
        self.start_over()

    def start_over(self) -> None:
        """The cursor is at the start of a line."""
        self.column = 0
        self._line = ""  # its first characters, as the text has it
        self._spaces = ""  # held back
        self._word, self._word_at = "", 0  # the end of what is written, and its first column
        self._end = 0  # the column behind what is before it
        self._fixed = False  # the word cannot be moved

    def __call__(self, text: str) -> str:
        """What to write for the next piece of the text."""
        self._measure()
        return "".join(map(self._written, _UNITS.findall(text)))

    def _measure(self) -> None:
        width = self._columns()
        if width != self._width:
            self._width, self._fixed = width, True
            self.column = min(self.column, width)

    def _written(self, unit: str) -> str:
        if unit == "\n":
            self._end_line()
            return unit
        if len(self._line) < MAX_LINE_START:
            self._line += unit
        if self._fence or self._width < MIN_COLUMNS:
            return unit
        if unit[0] in " \t":
            return self._space(unit)
        return "".join(map(self._part, _parts(unit)))

    def _end_line(self) -> None:
        fence = _FENCE.match(self._line)
        if fence and not self._fence:
            self._fence = fence[1]
        elif fence and fence[1].startswith(self._fence) and not fence[2].strip():
            self._fence = ""
        self.start_over()

    def _space(self, unit: str) -> str:
        if self._word:
            self._end_word()
        if self.column or self._spaces:
            self._spaces += unit
            return ""
        self.column = _gap(0, unit)
        return unit

    def _end_word(self) -> None:
        self._word, self._fixed = "", False
        if self.column > self._width:  # the terminal has wrapped it
            self.column = self.column % self._width or self._width

    def _part(self, part: str) -> str:
        """What to write for text inside which no line may end."""
        if self._word and _may_end_between(self._word[-1], part[0]):
            self._end_word()
        spaces, self._spaces = self._spaces, ""
        if not self._word:
            self._end, self._word_at = self.column, _gap(self.column, spaces)
        back = self.column - self._end
        self._word += part
        indent = self._indent()
        end = self._word_at + cells(self._word)
        whole = end < self._width or self._word_at <= indent or self._fixed
        if whole or _AS_IS.match(self._line):
            self.column = end
            return spaces + part
        erased = f"\x1b[{back}D\x1b[K" if back else ""
        self._word_at, self.column = indent, indent + cells(self._word)
        return f"{erased}\n{' ' * indent}{self._word}"

    def _indent(self) -> int:
        """Columns before the lines that continue this one: below the text of a list's item."""
        start = _INDENT.match(self._line)
        n = _gap(0, re.sub(r"[^ \t]", " ", start[0])) if start else 0
        return n if n <= self._width // 3 else 0


def cells(text: str) -> int:
    """Columns that text takes: two for a wide character, none for a mark on another one."""
    if text.isascii():
        return len(text) if text.isprintable() else sum(map(str.isprintable, text))
    from wcwidth import wcswidth, wcwidth

    n = wcswidth(text)
    return n if n >= 0 else sum(max(wcwidth(c), 0) for c in text)


def _gap(column: int, spaces: str) -> int:
    """The column behind spaces and tabs."""
    for c in spaces:
        column += 8 - column % 8 if c == "\t" else 1
    return column


def _parts(word: str) -> Iterator[str]:
    """The parts of a word between which a line may end."""
    if not word.isascii():
        begin = 0
        for i in range(1, len(word)):
            if _may_end_between(word[i - 1], word[i]):
                yield word[begin:i]
                begin = i
        word = word[begin:]
    yield word


@lru_cache(maxsize=4096)
def _may_end_between(a: str, b: str) -> bool:
    """Whether a line may end between two characters that are no spaces: beside Chinese, Japanese
    and Korean ones, but not before punctuation that closes, nor behind one that opens.
    """
    if not (_is_ideographic(a) or _is_ideographic(b)):
        return False
    if unicodedata.category(b) in ("Pe", "Pf", "Po", "Lm", "Mn", "Me", "Cf"):
        return False
    return unicodedata.category(a) not in ("Ps", "Pi") and " SMALL " not in unicodedata.name(b, "")


def _is_ideographic(c: str) -> bool:
    if not ("\u2e80" <= c < "\U0001f000" or c >= "\U00020000"):
        return False
    return unicodedata.east_asian_width(c) in "WF"
