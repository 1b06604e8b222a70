"""Tool calls between markers: one class for each notation.

All of them answer three questions about the text after the opening marker: can it still become a
call, would a closing marker here lie inside a string, and which calls is it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlxkv.parsers.json_schema import KINDS, argument_kinds, kind_of
from mlxkv.parsers.values import (
    GemmaReader,
    Unreadable,
    read_json,
    read_json_prefix,
    read_object,
    read_python_calls,
)

_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_JSON_NAME = re.compile(r'"(?:name|function)"\s*:\s*"((?:[^"\\]|\\.)+)"')


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

    def parameters(self, name: str) -> list[str]:
        """Names of a function's parameters, in order."""
        parameters = self._parameters.get(name)
        found = parameters.get("properties") if isinstance(parameters, Mapping) else None
        return list(found) if isinstance(found, Mapping) else []

    def read(self, name: str, key: str, text: str) -> Any:
        """The value of a parameter that is written as raw text if it is a string, else as JSON.

        Where its schema allows strings and others, it is JSON if that is of a kind that it allows.
        A schema that says nothing takes all JSON for JSON, strings in quotes as well.
        """
        parameters = self._parameters.get(name)
        kinds = argument_kinds({} if parameters is None else parameters, key)
        if kinds == {"string"}:
            return text
        try:
            value = read_json(text)
        except Unreadable:
            return text
        if "string" not in kinds or kinds >= KINDS - {"integer"}:
            return value
        kind = kind_of(value)
        fits = kind in kinds or (kind == "integer" and "number" in kinds)
        return value if fits and kind != "string" else text


class Notation(Protocol):
    """How calls are written between two markers.

    Attributes:
        shows_its_end: a call that is not complete cannot be read, so that one that can be is sound
            even where its closing marker is missing.
    """

    shows_its_end: bool

    def possible(self, body: str) -> bool:
        """Whether this can be the beginning of a call."""
        ...

    def inside_string(self, body: str) -> bool:
        """Whether a closing marker that follows would be part of a string."""
        ...

    def parse(self, body: str, tools: Tools) -> list[Found]:
        """The calls; none where no function is named."""
        ...


class JsonCalls:
    """`{"name": ..., "arguments": {...}}`, a list of them, or several with `;` between.

    Hermes and Qwen; Llama says `parameters`.
    """

    shows_its_end = True

    _START = re.compile(r"\s*(?:\[\s*)?(?:\{\s*(?:[\"}].*)?)?", re.DOTALL)

    def possible(self, body: str) -> bool:
        return self._START.fullmatch(body) is not None

    def inside_string(self, body: str) -> bool:
        return '"' in _JSON_STRING.sub("", body)

    def parse(self, body: str, tools: Tools) -> list[Found]:
        found: list[Found] = []
        rest = body
        while rest := rest.lstrip(" \t\r\n;"):
            try:
                value, rest = read_json_prefix(rest)
            except Unreadable as error:
                named = _JSON_NAME.search(rest)
                name = named[1] if named else found[-1].name if found else ""
                return [*found, Found(name, error=str(error))] if name else []
            calls = json_calls(value)
            if not calls:
                return []
            found += calls
        return found


def json_calls(value: Any) -> list[Found]:
    """The calls that a JSON value is; none where a part of it is no call."""
    found = [_json_call(item) for item in (value if isinstance(value, list) else [value])]
    return [call for call in found if call is not None] if None not in found else []


def _json_call(value: Any) -> Found | None:
    if not isinstance(value, dict):
        return None
    function = value.get("function")
    inner = function if isinstance(function, dict) else value
    name = inner.get("name", function)
    if not isinstance(name, str) or not name:
        return None
    given = inner.get("arguments", inner.get("parameters"))
    identifier = value.get("id") if isinstance(value.get("id"), str) else None
    if isinstance(given, str):
        try:
            given = read_object(given)
        except Unreadable as error:
            return Found(name, error=str(error), id=identifier)
    if given is not None and not isinstance(given, dict):
        return Found(name, error=f"not a JSON object but {type(given).__name__}", id=identifier)
    return Found(name, given or {}, id=identifier)


class GlmCalls:
    """GLM-4.5 to 4.7: a name, then `<arg_key>k</arg_key><arg_value>v</arg_value>` pairs.

    What a value is, its text and its schema say together: see `Tools.read`.
    """

    shows_its_end = False

    _NAME = re.compile(r"\s*([\w.:/-]+)\s*")
    _PAIR = re.compile(
        r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|\Z))",
        re.DOTALL,
    )

    def possible(self, body: str) -> bool:
        if body.lstrip()[:1] in ("{", "["):
            return True
        named = self._NAME.match(body)
        rest = body[named.end() :] if named else body.lstrip()
        if not rest or not named:
            return not rest
        opening, closing = "<arg_key>", "</arg_key>"
        key, tag, after = rest[len(opening) :].partition("<")
        if not rest.startswith(opening):
            return opening.startswith(rest)
        return "\n" not in key and closing.startswith((tag + after)[: len(closing)])

    def inside_string(self, body: str) -> bool:
        if body.lstrip()[:1] in ("{", "["):
            return JsonCalls().inside_string(body)
        _, _, rest = self._pairs(body)
        return "<arg_value>" in rest

    def parse(self, body: str, tools: Tools) -> list[Found]:
        if body.lstrip()[:1] in ("{", "["):
            return JsonCalls().parse(body, tools)
        name, pairs, rest = self._pairs(body)
        if not name:
            return []
        if rest.strip():
            return [Found(name, error=f"<arg_key> expected; found {rest.strip()[:20]!r}")]
        return [Found(name, {k: tools.read(name, k, v) for k, v in pairs})]

    def _pairs(self, body: str) -> tuple[str, list[tuple[str, str]], str]:
        """The function's name, keys and texts of values, and what is left."""
        named = self._NAME.match(body)
        if named is None:
            return "", [], body
        at, pairs = named.end(), []
        while pair := self._PAIR.match(body, at):
            pairs.append((pair[1].strip(), pair[2]))
            at = pair.end()
        return named[1], pairs, body[at:]


class GemmaCalls:
    """Gemma 4: `call:name{key:<|"|>text<|"|>}`; FunctionGemma has `<escape>` for quotes."""

    shows_its_end = True

    _NAME = re.compile(r"\s*call:\s*([\w.:/-]+)\s*(?=\{|\Z)")

    def __init__(self, quote: str = '<|"|>'):
        self.quote = quote

    def possible(self, body: str) -> bool:
        start = body.lstrip()
        return "call:".startswith(start[:5])

    def inside_string(self, body: str) -> bool:
        bare = _JSON_STRING.sub("", "".join(body.split(self.quote)[::2]))
        return body.count(self.quote) % 2 == 1 or '"' in bare

    def parse(self, body: str, tools: Tools) -> list[Found]:
        named = self._NAME.match(body)
        if named is None:
            return []
        try:
            return [Found(named[1], GemmaReader(body[named.end() :], self.quote).object())]
        except Unreadable as error:
            return [Found(named[1], error=str(error))]


class MistralCalls:
    """`[{"name": ...}, ...]`, or `name[CALL_ID]id[ARGS]{...}` in later versions; no end marker."""

    shows_its_end = True

    _START = re.compile(r"\s*(?:[\[{].*|[\w.:/-]*(?:\s*[\[{].*)?)", re.DOTALL)
    _NAME = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*([\w-]+)\s*)?(?:\[ARGS\])?(?=\s*\{|\Z)")

    def possible(self, body: str) -> bool:
        return self._START.fullmatch(body) is not None

    def inside_string(self, body: str) -> bool:
        return JsonCalls().inside_string(body)

    def parse(self, body: str, tools: Tools) -> list[Found]:
        if body.lstrip()[:1] in ("{", "["):
            return JsonCalls().parse(body, tools)
        found, rest = [], body
        while rest.strip():
            named = self._NAME.match(rest)
            if named is None:
                error = f"a call expected; found {rest.strip()[:20]!r}"
                return [*found, Found(found[-1].name, error=error)] if found else []
            try:
                value, rest = read_json_prefix(rest[named.end() :])
            except Unreadable as error:
                return [*found, Found(named[1], error=str(error), id=named[2])]
            found.append(Found(named[1], value, id=named[2]))
        return found


class PythonCalls:
    """`name(key="text")`, or a list of them."""

    shows_its_end = True

    _START = re.compile(r"\s*\[?\s*(?:[A-Za-z_][\w.]*(?:\s*\(.*)?)?", re.DOTALL)

    def possible(self, body: str) -> bool:
        return (
            re.fullmatch(r"\s*\[?\s*(?:[A-Za-z_][\w.]*(?:\s*\(.*)?)?", body, re.DOTALL) is not None
        )

    def inside_string(self, body: str) -> bool:
        try:
            read_python_calls(body)
        except Unreadable:
            return True
        return False

    def parse(self, body: str, tools: Tools) -> list[Found]:
        try:
            calls = read_python_calls(body)
        except Unreadable as error:
            named = re.match(r"\s*\[?\s*([A-Za-z_][\w.]*)\s*\(", body)
            return [Found(named[1], error=str(error))] if named else []
        return [
            _python_call(name.removesuffix(".call"), values, keywords, tools)
            for name, values, keywords in calls
        ]


def _python_call(name: str, values: list[Any], keywords: dict[str, Any], tools: Tools) -> Found:
    names = tools.parameters(name)
    if len(values) > len(names):
        return Found(name, error="a value without the name of its parameter")
    return Found(name, {**dict(zip(names, values, strict=False)), **keywords})


class GlmTextCalls:
    """GLM-4 of 2024: the answer is a function's name, a line break, and a JSON object."""

    shows_its_end = True

    def possible(self, body: str) -> bool:
        return re.fullmatch(r"\s*[\w.:/-]*(?:[ \t]*\n\s*(?:\{.*)?)?", body, re.DOTALL) is not None

    def inside_string(self, body: str) -> bool:
        return JsonCalls().inside_string(body)

    def parse(self, body: str, tools: Tools) -> list[Found]:
        name, _, rest = body.strip().partition("\n")
        if not rest.strip():
            return []
        try:
            return [Found(name.strip(), read_object(rest))]
        except Unreadable as error:
            return [Found(name.strip(), error=str(error))]


class FirstOf:
    """Several notations at once: the first that finds a call has it."""

    shows_its_end = True

    def __init__(self, *notations: Notation):
        self._notations = notations

    def possible(self, body: str) -> bool:
        return any(notation.possible(body) for notation in self._notations)

    def inside_string(self, body: str) -> bool:
        able = [notation for notation in self._notations if notation.possible(body)]
        return all(notation.inside_string(body) for notation in able)

    def parse(self, body: str, tools: Tools) -> list[Found]:
        able = (notation for notation in self._notations if notation.possible(body))
        return next((found for notation in able if (found := notation.parse(body, tools))), [])
