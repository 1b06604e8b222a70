"""Commands of the chat that give the next message a picture or a recording; the text to print."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxkv.errors import UsageError
from mlxkv.terminal.files import attachments, dropped
from mlxkv.terminal.files.attachments import AUDIO, PLURALS, Attachment

if TYPE_CHECKING:
    from mlxkv.terminal.backend import Speaker


def attach(speaker: Speaker, attached: list[Attachment], found: Sequence[Attachment]) -> str:
    """Add files to those of the next message.

    Raises:
        UsageError: the model cannot take them.
    """
    attachments.check_able(speaker, found)
    attached += found
    return "".join(f"(the next message has {each})\n" for each in found)


def file(speaker: Speaker, attached: list[Attachment], rest: str, kind: str) -> str:
    """`/image FILE...` and `/audio FILE...`.

    Raises:
        UsageError: the model takes no such files, or one cannot be read.
    """
    _check(speaker, kind)
    found = [attachments.checked(path, kind) for path in _paths(rest, kind)]
    return attach(speaker, attached, found)


def mic(speaker: Speaker, attached: list[Attachment]) -> str:
    """`/mic`.

    Raises:
        UsageError: the model takes no sound, or nothing can be recorded.
    """
    _check(speaker, AUDIO)
    return attach(speaker, attached, [attachments.recorded()])


def _check(speaker: Speaker, kind: str) -> None:
    if kind not in speaker.media_kinds:
        raise UsageError(f"{speaker.name} takes no {PLURALS[kind]}")


def _paths(text: str, kind: str) -> list[Path]:
    """Paths as a terminal writes them for files that are dropped on it, or typed without quotes."""
    found = [part for part in dropped.split(text) if isinstance(part, Path) or part.strip()]
    paths = [part for part in found if isinstance(part, Path)]
    if paths and len(paths) == len(found):
        return paths
    if text and Path(text).expanduser().is_file():
        return [Path(text)]
    try:
        words = shlex.split(text)
    except ValueError:
        words = [text]
    if not words:
        raise UsageError(f"/{kind} takes the path of a file")
    return [Path(word) for word in words]
