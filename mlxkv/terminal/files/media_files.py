"""Messages with pictures and sound, as a chat's file has them: the path and SHA-256 of each file,
not its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxkv.errors import MlxkvError
from mlxkv.terminal.files.attachments import WORDS, Content, printable, read

VERSION = 2
"""Of a file that has media; 1 for others, which earlier releases read."""


def has_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message has parts."""
    return any(isinstance(message["content"], list) for message in messages)


def stored(messages: Sequence[Mapping[str, Any]], paths: Mapping[str, str]) -> list[dict[str, Any]]:
    """Messages for a file.

    Args:
        paths: SHA-256 of a file's bytes -> its path.
    """
    return [{**turn, "content": stored_content(turn["content"], paths)} for turn in messages]


def stored_content(content: Content, paths: Mapping[str, str]) -> Content:
    """A message's content for a file; arguments as for `stored`."""
    if isinstance(content, str):
        return content
    return [_stored_part(part, paths) for part in content]


def _stored_part(part: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    kind = part["type"]
    if kind not in WORDS:
        return dict(part)
    digest = hashlib.sha256(part[kind]).hexdigest()
    kept = {name: value for name, value in part.items() if name != kind}
    return {**kept, "path": paths.get(digest), "sha256": digest}


def is_content(content: Any) -> bool:
    """Whether a file's content of a message can be read."""
    if isinstance(content, str):
        return True
    return isinstance(content, list) and bool(content) and all(map(_is_part, content))


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    if part.get("type") == "text":
        return isinstance(part.get("text"), str)
    path, budget = part.get("path"), part.get("budget")
    is_file = isinstance(path, str | None) and isinstance(part.get("sha256"), str)
    has_name = isinstance(part.get("name"), str) and type(budget) in (int, type(None))
    return part.get("type") in WORDS and is_file and has_name


class Restored:
    """Reads the media of a file's messages again.

    Attributes:
        paths: SHA-256 of what was read -> its path.
        gone: lines on files that are gone, or have changed; a note stands for each in its message.
    """

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}
        self.gone: list[str] = []

    def content(self, content: Content) -> Content:
        """A message's content, see `is_content`."""
        if isinstance(content, str):
            return content
        parts = [self._part(part) for part in content]
        if any(part["type"] in WORDS for part in parts):
            return parts
        return "\n".join(part["text"] for part in parts)

    def _part(self, part: Mapping[str, Any]) -> dict[str, Any]:
        kind, path = part["type"], part.get("path")
        if kind not in WORDS:
            return dict(part)
        what, why = f"{WORDS[kind]} {printable(part['name'])}", "was not kept"
        if path is not None:
            try:
                made = read(Path(path), kind)
                why = None if made.digest == part["sha256"] else "has changed"
            except MlxkvError:
                made, why = None, "is gone"
            if made is not None and why is None:
                self.paths[made.digest] = path
                kept = {k: v for k, v in part.items() if k not in ("path", "sha256")}
                return {**kept, kind: made.data}
        line = f"{what} {why}: a note stands in its place"
        if line not in self.gone:
            self.gone.append(line)
        return {"type": "text", "text": f"[{what}, which is not here any more]"}
