"""Paths of pictures and recordings in a message, as a terminal writes files that are dropped on it.

macOS's Terminal and iTerm escape blanks by backslashes, others quote the path or write a file://
address; a pasted path may have blanks as they are. A word counts only if it begins like a path, and
is a file that is a picture or a recording. In a message of several lines only lines that are
nothing but paths count: the others may be text that was pasted.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from mlxkv.errors import UsageError
from mlxkv.terminal.files.attachments import (
    PLURALS,
    SUFFIXES,
    Attachment,
    checked,
    kind_of,
    printable,
)

if TYPE_CHECKING:
    from mlxkv.terminal.backend import Speaker

MAX_TRIED = 64
"""Words of a message that are looked up as files."""

_WORD = re.compile(r"""(?:'[^'\n]*'|"[^"\n]*"|\\.|[^ \t\r\n\\'"])+""")
_START = re.compile(r"(?<![^ \t\r\n(\[,])(?=['\"]?(?:/|~/|\.{1,2}/|file://))")
_SUFFIX = re.compile(f"(?:{'|'.join(map(re.escape, SUFFIXES))})(?!\\w)", re.IGNORECASE)


def split(text: str) -> list[str | Path]:
    """A message as its texts and paths, in order; its text alone if it has none."""
    if "\n" not in text.strip():
        return _split_line(text)
    parts: list[str | Path] = []
    for line in text.splitlines(keepends=True):
        found = _split_line(line)
        are_paths = all(isinstance(part, Path) or not part.strip() for part in found)
        parts += found if are_paths else [line]
    return _merged(parts)


def has_path(text: str) -> bool:
    """Whether a message has the path of a picture or a recording."""
    return any(isinstance(part, Path) for part in split(text))


def with_files(speaker: Speaker, text: str) -> list[str | Attachment]:
    """A message with the files of its paths in their places.

    A path of what the model cannot take stays text, and a line on stderr says so.

    Raises:
        UsageError: the message is nothing but such paths, or a file cannot be read.
    """
    made: list[str | Attachment] = []
    parts = split(text)
    only_paths = all(isinstance(part, Path) or not part.strip() for part in parts)
    for part in parts:
        kind = kind_of(part) if isinstance(part, Path) else None
        if isinstance(part, str) or kind is None:
            made.append(str(part))
        elif kind in speaker.media_kinds:
            made.append(checked(part))
        elif only_paths:
            raise UsageError(f"{printable(part.name)}: {speaker.name} takes no {PLURALS[kind]}")
        else:
            note = f"{speaker.name} takes no {PLURALS[kind]}: {printable(part.name)} stays a text"
            print(f"({note})", file=sys.stderr)
            made.append(str(part))
    return made if any(isinstance(part, Attachment) for part in made) else [text]


def _split_line(line: str) -> list[str | Path]:
    parts: list[str | Path] = []
    at = n_tried = 0
    while n_tried < MAX_TRIED and (start := _START.search(line, at)):
        n_tried += 1
        path, end = _path_at(line, start.start())
        if path is None:
            at, begin = start.start() + 1, at
            parts.append(line[begin:at])
            continue
        parts += [line[at : start.start()], path]
        at = end
    return _merged([*parts, line[at:]])


def _merged(parts: list[str | Path]) -> list[str | Path]:
    """Parts with neighbouring texts joined, and without empty ones."""
    made: list[str | Path] = []
    for part in parts:
        if isinstance(part, str) and made and isinstance(made[-1], str):
            made[-1] += part
        elif part != "":
            made.append(part)
    return made or [""]


def _path_at(line: str, start: int) -> tuple[Path | None, int]:
    """The file whose path begins there, and where it ends."""
    for text, end in _readings(line, start):
        path = Path(text)
        try:
            if path.expanduser().is_file() and kind_of(path.expanduser()):
                return path.expanduser(), end
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such home
            continue
    return None, start


def _readings(line: str, start: int) -> Iterator[tuple[str, int]]:
    """What a path there may be: as a shell reads it, and with blanks as they are."""
    word = _WORD.match(line, start)
    if word:
        raw = word[0]
        for text in dict.fromkeys((raw, raw.rstrip(".,;:!?)]"))):
            yield from ((one, start + len(text)) for one in _unquoted(text))
    for suffix in _SUFFIX.finditer(line, start):
        yield line[start : suffix.end()], suffix.end()


def _unquoted(word: str) -> Iterator[str]:
    if word.startswith("file://"):
        url = urlsplit(word)
        if url.netloc in ("", "localhost"):
            yield unquote(url.path)
        return
    try:
        words = shlex.split(word)
    except ValueError:
        return
    if len(words) == 1:
        yield words[0]
