"""What a notation of calls can do, and the one that half of the models write: JSON.

A notation answers questions about the text after a call's opening marker: can it still become a
call, would a closing marker here lie inside a string, which calls is it, and where do they end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Protocol

from mlxkv.parsers.notations.loose import Reader, read_loosely
from mlxkv.parsers.notations.tools import Found, Tools
from mlxkv.parsers.notations.values import Unreadable, read_json_prefix, read_object

_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_JSON_NAME = re.compile(r"""(?<!\w)["']?(?:name|function)["']?\s*:\s*["']((?:[^"'\\]|\\.)+)["']""")
_OF_A_CALL = frozenset({"name", "arguments", "parameters", "id", "type", "index", "function"})


class Notation(Protocol):
    """How calls are written between two markers."""

    def possible(self, body: str) -> bool:
        """Whether this can be the beginning of a call."""
        ...

    def inside_string(self, body: str) -> bool:
        """Whether a closing marker that follows would be part of a string."""
        ...

    def parse(self, body: str, tools: Tools, closed: bool = True) -> list[Found]:
        """The calls; none where no function is named.

        Args:
            body: the text.
            tools: what the model was told of.
            closed: a marker has ended it. If not, a call of which anything is missing has an error.
        """
        ...

    def length(self, body: str) -> int:
        """How much of the text is calls, as far as it shows: no marker has ended it."""
        ...


class JsonCalls:
    """`{"name": ..., "arguments": {...}}`, a list of them, or several with `;` between.

    Hermes and Qwen; Llama says `parameters`.
    """

    _START = re.compile(r"\s*(?:\[\s*)?(?:\{\s*(?:[\"'}].*|\w+\s*(?::.*)?)?)?", re.DOTALL)

    def possible(self, body: str) -> bool:
        return self._START.fullmatch(body) is not None

    def inside_string(self, body: str) -> bool:
        return '"' in _JSON_STRING.sub("", body)

    def parse(self, body: str, tools: Tools, closed: bool = True) -> list[Found]:
        found: list[Found] = []
        try:
            for value, _, mended in self._values(body, closed):
                calls = json_calls(value, tools)
                if not calls:
                    return []
                found += [checked(call, tools) for call in calls] if mended else calls
        except _Broken as broken:
            named = _JSON_NAME.search(broken.rest)
            name = named[1] if named else found[-1].name if found else ""
            return [*found, Found(name, error=str(broken))] if name else []
        return found

    def length(self, body: str) -> int:
        end = len(body)
        try:
            for _, end, _ in self._values(body, closed=False):  # noqa: B007
                pass
        except _Broken as broken:
            return len(body) if end == len(body) or "{" in broken.rest else end
        return end

    @staticmethod
    def _values(body: str, closed: bool) -> Iterator[tuple[Any, int, bool]]:
        """The values in a row, where each ends, and whether it lacked a bracket.

        What follows the last is left out.
        """
        at = 0
        while rest := body[at:].lstrip(" \t\r\n;,"):
            if at and "{" not in rest:
                return
            try:
                value, after, mended = prefix(rest, closed)
            except Unreadable as error:
                raise _Broken(str(error), rest) from None
            at = len(body) - len(after)
            yield value, at, mended


class _Broken(Unreadable):
    """What begins here is no value."""

    def __init__(self, message: str, rest: str):
        super().__init__(message)
        self.rest = rest


def prefix(text: str, closed: bool = True) -> tuple[Any, str, bool]:
    """The value that a text begins with as JSON or nearly so, and what follows it.

    The last says whether a bracket was missing, see `checked`.

    Raises:
        Unreadable: there is none.
    """
    try:
        return (*read_json_prefix(text), False)
    except Unreadable:
        reader = Reader(text, closed=closed)
        value = reader.value()
        return value, text[reader.at :], reader.mended


def checked(call: Found, tools: Tools) -> Found:
    """A call that lacked a bracket, with an error where the schema says that it was another one."""
    try:
        tools.check_nesting(tools.name_of(call.name), call.arguments)
    except Unreadable as error:
        return Found(call.name, error=str(error), id=call.id)
    return call


def arguments_of(text: str, closed: bool = True) -> dict[str, Any]:
    """A call's arguments; nothing at all is none.

    Raises:
        Unreadable: they are no object.
    """
    try:
        return read_object(text)
    except Unreadable:
        reader = Reader(text, closed=closed)
        value = reader.value()
        if isinstance(value, str):
            value = read_loosely(value)
        if not isinstance(value, dict) or not reader.is_done:
            raise
        return value


def json_calls(value: Any, tools: Tools) -> list[Found]:
    """The calls that a JSON value is; none where a part of it is no call."""
    found = [_json_call(item, tools) for item in (value if isinstance(value, list) else [value])]
    return [call for call in found if call is not None] if None not in found else []


def _json_call(value: Any, tools: Tools) -> Found | None:
    if not isinstance(value, dict):
        return None
    function = value.get("function")
    inner = function if isinstance(function, dict) else value
    name = inner.get("name", function)
    if not isinstance(name, str) or not name:
        return None
    identifier = value.get("id") if isinstance(value.get("id"), str) else None
    given = inner.get("arguments", inner.get("parameters"))
    if isinstance(given, str):
        try:
            given = arguments_of(given)
        except Unreadable as error:
            return Found(name, error=str(error), id=identifier)
    if given is not None and not isinstance(given, dict):
        return Found(name, error=f"not a JSON object but {type(given).__name__}", id=identifier)
    beside = {key: value for key, value in inner.items() if key not in _OF_A_CALL}
    known = set(tools.parameters(tools.name_of(name)))
    if given is None and beside:
        # Arguments beside the name: read where the schema has them all.
        if not beside.keys() <= known:
            return Found(name, error=f"'arguments' expected; found {next(iter(beside))[:20]!r}")
        given = beside
    elif outside := known & beside.keys():
        return Found(name, error=f"{min(outside)!r} stands outside of the arguments")
    return Found(name, given or {}, id=identifier)
