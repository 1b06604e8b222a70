"""Requests that programs sent: `tests/server/recordings`.

Structure, field names, types, roles and order are theirs. Texts are not: `{{words N M}}` stands for
text number N of a recording, M characters of our own words. Of their tools there are those that
differ in form, with descriptions, enumerations and patterns of ours; ids are made up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "server" / "recordings"
_WORDS = re.compile(r"\{\{words (\d+) (\d+)\}\}")
_MARK = re.compile(r"#(\d+)#")
_FILLER = "plain words that stand for a longer text, line by line and page by page, "


@dataclass(frozen=True, slots=True)
class Recording:
    """One program's conversation.

    Args:
        name: the file's.
        path: where the program sends its requests, with the query.
        headers: that name the program.
        requests: the first, the one with the result of a call, and one of the second turn.
    """

    name: str
    path: str
    headers: dict[str, str]
    requests: list[dict[str, Any]]

    @property
    def is_responses(self) -> bool:
        """Whether it is for OpenAI's Responses API."""
        return self.path == "/v1/responses"

    def shrunk(self, divisor: int) -> list[dict[str, Any]]:
        """The requests with texts of a part of their length."""
        return [_expanded(request, divisor) for request in self._raw()]

    def _raw(self) -> list[dict[str, Any]]:
        return json.loads((FOLDER / f"{self.name}.json").read_text())["requests"]


def names() -> list[str]:
    """All recordings."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name: str) -> Recording:
    """A recording with its texts at their length."""
    made = json.loads((FOLDER / f"{name}.json").read_text())
    path = "?".join(filter(None, (made["path"], made["query"])))
    requests = [_expanded(request, 1) for request in made["requests"]]
    return Recording(name, path, made["headers"], requests)


def conversation(request: dict[str, Any]) -> list[Any]:
    """What of a request the model reads, tools aside, in the order in which it reads it."""
    fields = ("instructions", "system", "messages", "input")
    return [request[field] for field in fields if field in request]


def marks(value: Any) -> list[int]:
    """The numbers of the texts in a value, in order."""
    return [int(n) for text in strings(value) for n in _MARK.findall(text)]


def strings(value: Any) -> Iterator[str]:
    """All strings of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


def _expanded(value: Any, divisor: int) -> Any:
    if isinstance(value, dict):
        return {key: _expanded(each, divisor) for key, each in value.items()}
    if isinstance(value, list):
        return [_expanded(each, divisor) for each in value]
    if isinstance(value, str):
        return _WORDS.sub(lambda found: _words(found[1], int(found[2]) // divisor), value)
    return value


def _words(number: str, length: int) -> str:
    mark = f"#{number}# "
    return mark + (_FILLER * (length // len(_FILLER) + 1))[: max(0, length - len(mark))]
