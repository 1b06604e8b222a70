"""What the model was told of its functions, and values as their schemas want them.

Formats without quotes (GLM, Qwen's XML) write a value's text, and Gemma's models leave quotes out:
the parameter's schema says what such a text is. A text that no reading makes a value of an allowed
kind is an error, so that no function runs with an argument that the model did not write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxkv.parsers.json_schema import KINDS, kind_of, kinds_at
from mlxkv.parsers.notations.loose import Bare, read_loosely
from mlxkv.parsers.notations.values import Unreadable, read_literal

_OPEN = KINDS - {"integer"}
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Found:
    """One call: see `ToolCall`. `id` is what the model gave it."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    id: str | None = None


class Tools:
    """The functions that the model was told of.

    Args:
        tools: JSON schemas, with or without `{"type": "function", "function": ...}` around them.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None):
        functions = [tool.get("function", tool) for tool in tools or ()]
        self._parameters: dict[str, Any] = {
            function["name"]: function.get("parameters")
            for function in functions
            if isinstance(function, Mapping) and isinstance(function.get("name"), str)
        }

    @property
    def names(self) -> list[str]:
        """What they are called."""
        return list(self._parameters)

    def name_of(self, written: str) -> str:
        """The function that a model means; what it wrote where it means none of them.

        Models put name spaces before a name: `functions.write`, `google:mcp:write`.
        """
        if written in self._parameters:
            return written
        ends = [n for n in self._parameters if re.search(rf"[.:/]{re.escape(n)}\Z", written)]
        return max(ends, key=len, default=written)

    def parameters(self, name: str) -> list[str]:
        """Names of a function's parameters, in order."""
        parameters = self._parameters.get(name)
        found = parameters.get("properties") if isinstance(parameters, Mapping) else None
        return list(found) if isinstance(found, Mapping) else []

    def read(self, name: str, key: str, text: str) -> Any:
        """The value of a parameter that is written as raw text if it is a string, else as JSON.

        Where its schema allows strings and others, it is JSON if that is of a kind that it allows.
        A schema that says nothing takes all JSON for JSON, strings in quotes as well.

        Raises:
            Unreadable: its schema allows no strings, and the text is no other value.
        """
        try:
            return _read(text, self._kinds(name, [key]))
        except Unreadable as error:
            raise Unreadable(f"{key}: {error}") from None

    def conform(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments whose strings may lack quotes, or stand where the schema allows none.

        Raises:
            Unreadable: see `read`.
        """
        return {key: self._conformed(name, [key], value) for key, value in arguments.items()}

    def check_nesting(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Whether brackets that were put at the end belong there, as far as the schema tells.

        Raises:
            Unreadable: a value is of a kind, or has a key, that only an outer one may have.
        """
        parameters = self._parameters.get(name)
        outer = frozenset(self.parameters(name))
        for key, value in arguments.items():
            self._check_nested(name, [key], value, _declared(parameters, key), outer)

    def _check_nested(
        self, name: str, path: list[str | None], value: Any, schema: Any, outer: frozenset[str]
    ) -> None:
        kind, kinds = kind_of(value), self._kinds(name, path)
        if kind not in kinds and not (kind == "integer" and "number" in kinds):
            raise Unreadable(f"{path[0]}: {' or '.join(sorted(kinds))} expected; found {kind}")
        if isinstance(value, list):
            inner = schema.get("items") if isinstance(schema, Mapping) else None
            for each in value:
                self._check_nested(name, [*path, None], each, inner, outer)
        elif isinstance(value, Mapping):
            own = schema.get("properties") if isinstance(schema, Mapping) else None
            own = frozenset(own if isinstance(own, Mapping) else ())
            for key, each in value.items():
                if key in outer and key not in own:
                    raise Unreadable(f"{key!r} may belong to {path[0]!r}, or stand beside it")
                self._check_nested(name, [*path, key], each, _declared(schema, key), outer | own)

    def _conformed(self, name: str, path: list[str | None], value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: self._conformed(name, [*path, k], v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._conformed(name, [*path, None], each) for each in value]
        if not isinstance(value, str):
            return value
        kinds = self._kinds(name, path)
        try:
            if isinstance(value, Bare):
                return _unquoted(str(value), kinds)
            return value if "string" in kinds else _requoted(value, kinds)
        except Unreadable as error:
            raise Unreadable(f"{path[0]}: {error}") from None

    def _kinds(self, name: str, path: Sequence[str | None]) -> frozenset[str]:
        parameters = self._parameters.get(name)
        return kinds_at({} if parameters is None else parameters, path) or KINDS


def _declared(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(key) if isinstance(properties, Mapping) else None


def _read(text: str, kinds: frozenset[str]) -> Any:
    if kinds == {"string"}:
        return text
    try:
        value = read_literal(text) if "string" in kinds else read_loosely(text)
    except Unreadable:
        return _read_as_text(text, kinds)
    kind = kind_of(value)
    if "string" not in kinds:
        return _requoted(value, kinds) if kind == "string" else _numbered(value, kinds)
    if kinds >= _OPEN:
        return value
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    return value if fits and kind != "string" else text


def _read_as_text(text: str, kinds: frozenset[str]) -> Any:
    """What is neither JSON nor a literal of Python's."""
    word = text.strip().lower()
    if "string" in kinds:
        return text
    if "boolean" in kinds and word in _BOOLEANS:
        return _BOOLEANS[word]
    wanted = " or ".join(sorted(kinds)) or "a value"
    raise Unreadable(f"{wanted} expected; found {text.strip()[:20]!r}")


def _requoted(text: str, kinds: frozenset[str]) -> Any:
    """A string where none may be: the value that its text is, else the string itself."""
    try:
        value = read_loosely(text)
    except Unreadable:
        return text
    kind = kind_of(value)
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    return value if fits else text


def _numbered(value: Any, kinds: frozenset[str]) -> Any:
    """`5.0` is an integer to JSON Schema."""
    whole = isinstance(value, float) and value.is_integer() and "number" not in kinds
    return int(value) if whole and "integer" in kinds else value


def _unquoted(text: str, kinds: frozenset[str]) -> Any:
    """A text that stands where strings have quotes."""
    if kinds == {"string"} and text not in ("null", "None"):
        return text
    try:
        return _numbered(read_literal(text), kinds)
    except Unreadable:
        return _read_as_text(text, kinds)
