"""Words for a terminal: sizes, tables, and one line of progress on stderr."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from mlxkv.base.units import human_bytes
from mlxkv.terminal.word_wrap import wrap_for

MIN_INTERVAL_S = 0.1


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


class ProgressLine:
    """One line on stderr that is overwritten; nothing on a terminal that cannot erase a line."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False):
        self._stream = sys.stderr if stream is None else stream
        self._on = self._stream.isatty() and not quiet and os.environ.get("TERM") != "dumb"
        self._shown = ""
        self._last_s = 0.0

    @property
    def on(self) -> bool:
        """Whether anything is written."""
        return self._on

    def __call__(self, label: str, done: int = 0, total: int = 0) -> None:
        """Show what is being done, and how much of it is done, in bytes."""
        if not self._on:
            return
        now_s = time.monotonic()
        same_step = self._shown.startswith(label)
        if same_step and done < total and now_s - self._last_s < MIN_INTERVAL_S:
            return
        self._last_s = now_s
        text = label
        if total > 0:
            share = min(done / total, 1.0)
            filled = round(20 * share)
            bar = "#" * filled + "." * (20 - filled)
            text = f"{label}  [{bar}] {share:4.0%}  {human_bytes(done)} of {human_bytes(total)}"
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
