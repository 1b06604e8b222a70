"""Words for a terminal: sizes, tables, and one line of progress on stderr."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import TextIO

from mlxkv.base.units import human_bytes
from mlxkv.terminal.word_wrap import wrap_for

MIN_INTERVAL_S = 0.1
PLAIN_S = 10.0
"""Between two lines of progress where there is no terminal."""
RATE_S = 5.0
"""A rate is that of so many last seconds."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Aligned columns, two spaces apart; the columns named in `right` are aligned to the right."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


class Aside:
    """Text beside the result: a model's reasoning. It goes to stderr, so that stdout is the answer
    alone; dimmed and word-wrapped on a terminal, and elsewhere (or with NO_COLOR) after a label.
    """

    def __init__(self, stream: TextIO | None = None, label: str = "reasoning"):
        self._stream = sys.stderr if stream is None else stream
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        dim = self._stream.isatty() and not plain
        self._start, self._end = ("\x1b[2m", "\x1b[0m") if dim else (f"({label})\n", "")
        self._wrap = wrap_for(self._stream)
        self._open = False

    def write(self, text: str) -> None:
        """Write more of it."""
        text = self._wrap(text) if self._wrap else text
        self._stream.write(text if self._open else self._start + text)
        self._stream.flush()
        self._open = True

    def end(self) -> None:
        """End it with an empty line."""
        if self._open:
            self._stream.write(f"{self._end}\n\n")
            self._stream.flush()
            self._wrap = wrap_for(self._stream)
        self._open = False


class _Rate:
    """How fast one step goes on, over its last `RATE_S`."""

    def __init__(self) -> None:
        self._label = ""
        self._seen: deque[tuple[float, int]] = deque()

    def text(self, label: str, done: int, total: int, now_s: float) -> str:
        """`35.2 MiB/s, 1:23 left`; "" until a second has been seen."""
        if label != self._label or (self._seen and done < self._seen[-1][1]):
            self._label = label
            self._seen.clear()
        self._seen.append((now_s, done))
        while now_s - self._seen[0][0] > RATE_S and len(self._seen) > 2:
            self._seen.popleft()
        first_s, first = self._seen[0]
        if now_s - first_s < 1 or done <= first:
            return ""
        a_second = (done - first) / (now_s - first_s)
        left_s = math.ceil((total - done) / a_second)
        minutes, seconds = divmod(left_s, 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"{human_bytes(round(a_second))}/s, {left} left"


class ProgressLine:
    """One line on stderr that is overwritten; nothing on a terminal that cannot erase a line.

    Args:
        stream: instead of stderr.
        quiet: write nothing.
        plain: elsewhere than on a terminal, a line of its own every `PLAIN_S` of a long step.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False, plain: bool = False):
        self._stream = sys.stderr if stream is None else stream
        self._on = self._stream.isatty() and not quiet and os.environ.get("TERM") != "dumb"
        self._plain = plain and not quiet and not self._on
        self._shown = ""
        self._last_s = time.monotonic() if self._plain else 0.0
        self._rate = _Rate()

    @property
    def on(self) -> bool:
        """Whether a line is overwritten."""
        return self._on

    def __call__(self, label: str, done: int = 0, total: int = 0) -> None:
        """Show what is being done, and how much of it is done, in bytes."""
        if not (self._on or self._plain):
            return
        now_s = time.monotonic()
        rate = self._rate.text(label, done, total, now_s) if total else ""
        amounts = f"{human_bytes(done)} of {human_bytes(total)}"
        if self._plain:
            if total and now_s - self._last_s >= PLAIN_S:
                self._last_s = now_s
                line = ", ".join(filter(None, (f"{label}: {amounts}", rate)))
                print(line, file=self._stream, flush=True)
            return
        same_step = self._shown.startswith(label)
        if same_step and done < total and now_s - self._last_s < MIN_INTERVAL_S:
            return
        self._last_s = now_s
        text = label
        if total > 0:
            share = min(done / total, 1.0)
            filled = round(20 * share)
            bar = "#" * filled + "." * (20 - filled)
            text = f"{label}  [{bar}] {share:4.0%}  {amounts}  {rate}".rstrip()
        text = text[: max(shutil.get_terminal_size().columns - 1, 20)]
        self._stream.write(f"\r\x1b[K{text}")
        self._stream.flush()
        self._shown = text

    def clear(self) -> None:
        """Erase the line."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = ""
