"""Tab in the chat: commands, and the paths of their files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document

from mlxkv.terminal.files.attachments import AUDIO, IMAGE, SUFFIXES

_PATHS: Mapping[str, str | None] = {"/image": IMAGE, "/audio": AUDIO, "/save": None, "/load": None}
"""Commands that take files -> the kind of those that are shown; None for all."""
_LAST = re.compile(r"(?:\\.|[^ \t\\])*\Z")
_SPECIAL = re.compile(r"([^\w@%+=:,./-])")


class Completions(Completer):
    """What a line that begins with a slash may go on with.

    Args:
        commands: their names.
    """

    def __init__(self, commands: Iterable[str]):
        self._commands = sorted(commands)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        """See `Completer`."""
        line = document.text_before_cursor
        name, blank, rest = line.partition(" ")
        if not line.startswith("/") or "\n" in line:
            return
        if not blank:
            for command in self._commands:
                if command.startswith(name):
                    yield Completion(command, -len(name))
        elif name in _PATHS:
            yield from _files(rest, _PATHS[name])


def _files(text: str, kind: str | None) -> Iterator[Completion]:
    """Files and folders whose path begins with the last word, spelled for a shell."""
    found = _LAST.search(text)
    typed = re.sub(r"\\(.)", r"\1", found[0]) if found else ""
    folder, _, begun = typed.rpartition("/")
    where = Path(f"{folder}/" if "/" in typed else ".").expanduser()
    try:
        entries = sorted(where.iterdir())
    except OSError:
        return
    for entry in entries:
        is_hidden = entry.name.startswith(".") and not begun.startswith(".")
        if is_hidden or not entry.name.startswith(begun):
            continue
        is_folder = entry.is_dir()
        if is_folder or kind in (None, SUFFIXES.get(entry.suffix.lower())):
            end = "/" if is_folder else ""
            spelled = _SPECIAL.sub(r"\\\1", entry.name[len(begun) :]) + end
            yield Completion(spelled, 0, display=entry.name + end)
