"""The texts of a recording's windows as one text, while they come.

Invariants:
- What `feed` and `end` return, one after another, is the whole text.
- Text is held back only where two windows overlap: the last words before the seam and the first
  ones behind it. They are joined at the longest run of words that both have.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

HELD = 16
"""Words on either side of a seam that are compared: more than are spoken in its two seconds."""
TORN = {1: (1, 1), 2: (3, 3), 3: (4, 8)}
"""Length of a run of words -> how many may stand behind it before the seam, and before it behind
the seam: those next to a cut are cut themselves, or misheard. 3 stands for all longer ones."""

_WORD = re.compile(
    r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u2e80-\u9fff]+(?:['\u2019-]\w+)*"
)


@dataclass(frozen=True, slots=True)
class Segment:
    """What was said from one time to another, in seconds.

    Args:
        is_cut: the text ends at the limit of tokens, not by itself.
    """

    start_s: float
    end_s: float
    text: str
    is_cut: bool = False


class Seams:
    """Joins the texts of windows: for each `begin`, `feed` for each piece, and `end`.

    Attributes:
        texts: of the windows so far; the last one's end may still be held back.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._tail = ""  # of the window before, held back
        self._text, self._shown = "", 0
        self._joined, self._holds, self._last = True, False, ""

    def begin(self, *, overlaps: bool, overlapped: bool) -> None:
        """Begin the next window.

        Args:
            overlaps: it begins before the end of the one before it.
            overlapped: the next one begins before its end.
        """
        self.texts.append("")
        self._text, self._shown = "", 0
        self._joined, self._holds = not (overlaps and self._tail), overlapped

    def feed(self, piece: str) -> str:
        """Add to the window's text; what can be shown now."""
        piece = re.sub(r"\s+", " ", piece)
        begins = not self._text or self._text.endswith(" ")
        self._text += piece.lstrip(" ") if begins else piece
        words = list(_WORD.finditer(self._text))
        out = ""
        if not self._joined:
            if len(words) <= HELD:
                return ""
            out = self._join()
        stop = len(self._text.rstrip(" "))
        if self._holds:
            stop = words[-HELD - 1].end() if len(words) > HELD else 0
        return out + self._show(stop)

    def end(self) -> str:
        """End the window; what can be shown now."""
        out = "" if self._joined else self._join()
        self._text = self._text.rstrip(" ")
        if not self._holds:
            return out + self._show(len(self._text))
        self._tail = self._text[self._shown :]
        return out

    def _join(self) -> str:
        """Show the end of the window before, up to where this one goes on."""
        n_tail, n_head = joint(self._tail, self._text)
        tail, self._tail, self._joined = self._tail[:n_tail], "", True
        mark = re.match(r"[^\w\s]+", self._text[n_head:]) if n_head else None
        if mark:  # a comma or a full stop belongs to the words before it
            tail, n_head = tail + mark[0], n_head + len(mark[0])
        self._shown = n_head
        return self._add(tail, len(self.texts) - 2)

    def _show(self, stop: int) -> str:
        text, self._shown = self._text[self._shown : stop], max(self._shown, stop)
        return self._add(text, len(self.texts) - 1)

    def _add(self, text: str, window: int) -> str:
        """Add to a window's final text, with the space that parts it from the one before."""
        if not self.texts[window]:
            text = text.lstrip(" ")
        if not text:
            return ""
        is_first = not self.texts[window]
        self.texts[window] += text
        apart = is_first and self._last and not _joins(self._last, text[0])
        self._last = text[-1]
        return f" {text}" if apart else text


def joint(tail: str, head: str) -> tuple[int, int]:
    """Where two texts of overlapping sound meet: characters of `tail`, and of `head` to leave out.

    Both whole where they have no words in common.
    """
    before = list(_WORD.finditer(tail))[-HELD:]
    behind = list(_WORD.finditer(head))[:HELD]
    a, b = [w[0].casefold() for w in before], [w[0].casefold() for w in behind]
    best = 0, 0, 0
    for i in range(len(a)):
        for j in range(len(b)):
            n = 0
            while i + n < len(a) and j + n < len(b) and a[i + n] == b[j + n]:
                n += 1
            if n > best[0] and _is_sure(a[i : i + n], len(a) - i - n, j):
                best = n, i + n, j + n
    n, in_tail, in_head = best
    if n == 0:
        return len(tail), 0
    return before[in_tail - 1].end(), behind[in_head - 1].end()


def _is_sure(run: list[str], behind: int, before: int) -> bool:
    """Whether a run of words that two texts have is the same sound.

    Args:
        behind: words of the first text behind it.
        before: words of the second text before it.
    """
    most_behind, most_before = TORN[min(len(run), 3)]
    if len(run) == 1 and len(run[0]) <= 3:  # "a", "the"
        return behind == before == 0
    return behind <= most_behind and before <= most_before


def _joins(a: str, b: str) -> bool:
    """Whether no space parts two texts: Chinese and Japanese have none."""
    return all(_is_ideographic(c) for c in (a, b)) or a == " " or b == " "


def _is_ideographic(c: str) -> bool:
    return "\u2e80" <= c <= "\uffef" and unicodedata.east_asian_width(c) in "WF"
