"""Tool calls between markers, in the notations of single families."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mlxkv.parsers.notations.loose import Reader
from mlxkv.parsers.notations.notation import JsonCalls, Notation, arguments_of, checked, prefix
from mlxkv.parsers.notations.tools import Found, Tools
from mlxkv.parsers.notations.values import Unreadable, read_python_calls

_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


class GemmaCalls:
    """Gemma 4: `call:name{key:<|"|>text<|"|>}`; FunctionGemma has `<escape>` for quotes.

    The models leave out `call:` and write `call:name(key=...)`, Python's quotes or none: see
    `loose`.
    """

    _NAME = re.compile(r"\s*(call\s*:\s*|[:-]\s*)?([\w.:/-]*\w)\s*(?=[{(]|\Z)")
    _START = re.compile(r"call\s*:.*|[:-]?\s*[\w.:/-]*(?:\s*[{(].*)?", re.DOTALL)
    _BETWEEN = re.compile(r"[\s,;]*(?=call\s*:)")

    def __init__(self, quote: str = '<|"|>'):
        self.quote = quote

    def possible(self, body: str) -> bool:
        start = body.lstrip()
        return "call:".startswith(start) or self._START.fullmatch(start) is not None

    def inside_string(self, body: str) -> bool:
        bare = _JSON_STRING.sub("", "".join(body.split(self.quote)[::2]))
        return body.count(self.quote) % 2 == 1 or '"' in bare

    def parse(self, body: str, tools: Tools, closed: bool = True) -> list[Found]:
        found: list[Found] = []
        at = 0
        while named := self._NAME.match(body, at):
            name, marked = named[2], (named[1] or "").startswith("call")
            if not marked and name.removeprefix("call") in tools.names:
                name = name.removeprefix("call")
            if not marked and tools.name_of(name) not in tools.names:
                return found
            try:
                arguments, at, mended = self._arguments(body, named.end(), name, tools, closed)
                call = Found(name, tools.conform(tools.name_of(name), arguments))
                found.append(checked(call, tools) if mended else call)
            except Unreadable as error:
                return [*found, Found(name, error=str(error))]
            between = self._BETWEEN.match(body, at)
            if between is None:
                if found and re.search(r"[^\s}\])]", body[at:]):
                    error = f"the end expected; found {body[at : at + 10]!r}"
                    found[-1] = Found(name, error=error)
                break
            at = between.end()
        return found

    def length(self, body: str) -> int:
        at, end = 0, len(body)
        while named := self._NAME.match(body, at):
            try:
                _, at, _ = self._arguments(body, named.end(), named[2], Tools(), closed=False)
            except Unreadable:
                return len(body)
            end = at
            between = self._BETWEEN.match(body, at)
            if between is None:
                break
            at = between.end()
        return end

    def _arguments(
        self, body: str, at: int, name: str, tools: Tools, closed: bool
    ) -> tuple[dict[str, Any], int, bool]:
        """What a call has between its brackets, where they end, and whether one was missing."""
        if closed and not body[at:].strip():
            return {}, len(body), False
        known = tools.parameters(tools.name_of(name))
        reader = Reader(body[at:], self.quote, closed=closed, keys=known)
        return reader.object(), at + reader.at, reader.mended


class MistralCalls:
    """`[{"name": ...}, ...]`, or `name[CALL_ID]id[ARGS]{...}` in later versions; no end marker."""

    _START = re.compile(r"\s*(?:[\[{].*|[\w.:/-]*(?:\s*[\[{].*)?)", re.DOTALL)
    _NAME = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*([\w-]+)\s*)?(?:\[ARGS\])?(?=\s*\{|\Z)")

    def possible(self, body: str) -> bool:
        return self._START.fullmatch(body) is not None

    def inside_string(self, body: str) -> bool:
        return JsonCalls().inside_string(body)

    def parse(self, body: str, tools: Tools, closed: bool = True) -> list[Found]:
        if body.lstrip()[:1] in ("{", "["):
            return JsonCalls().parse(body, tools, closed)
        return [
            checked(call, tools) if mended else call
            for call, _, mended in self._calls(body, closed)
        ]

    def length(self, body: str) -> int:
        if body.lstrip()[:1] in ("{", "["):
            return JsonCalls().length(body)
        calls = [*self._calls(body, closed=False)]
        return len(body) if not calls or calls[-1][0].error else calls[-1][1]

    def _calls(self, body: str, closed: bool) -> Iterator[tuple[Found, int, bool]]:
        """Calls, where each ends, and whether it lacked a bracket; words behind are left out."""
        at, name = 0, ""
        while named := self._NAME.match(body, at):
            if at and named.end() == len(body):
                return  # a word
            try:
                value, rest, mended = prefix(body[named.end() :], closed)
            except Unreadable as error:
                yield Found(named[1], error=str(error), id=named[2]), len(body), False
                return
            at = len(body) - len(rest)
            if not isinstance(value, dict):
                yield Found(named[1], error="not a JSON object", id=named[2]), len(body), False
                return
            name = named[1]
            yield Found(name, value, id=named[2]), at, mended
        if at and "{" in body[at:]:
            error = f"a call expected; found {body[at:].strip()[:20]!r}"
            yield Found(name, error=error), len(body), False


class PythonCalls:
    """`name(key="text")`, or a list of them."""

    _START = re.compile(r"\s*\[?\s*(?:[A-Za-z_][\w.]*(?:\s*\(.*)?)?", re.DOTALL)

    def possible(self, body: str) -> bool:
        return self._START.fullmatch(body) is not None

    def inside_string(self, body: str) -> bool:
        try:
            read_python_calls(body)
        except Unreadable:
            return True
        return False

    def parse(self, body: str, tools: Tools, closed: bool = True) -> list[Found]:
        try:
            calls = read_python_calls(body)
        except Unreadable as error:
            named = re.match(r"\s*\[?\s*([A-Za-z_][\w.]*)\s*\(", body)
            return [Found(named[1], error=str(error))] if named else []
        return [
            _python_call(name.removesuffix(".call"), values, keywords, tools)
            for name, values, keywords in calls
        ]

    def length(self, body: str) -> int:
        return len(body)


def _python_call(name: str, values: list[Any], keywords: dict[str, Any], tools: Tools) -> Found:
    names = tools.parameters(name)
    if len(values) > len(names):
        return Found(name, error="a value without the name of its parameter")
    return Found(name, {**dict(zip(names, values, strict=False)), **keywords})


class GlmTextCalls:
    """GLM-4 of 2024: the answer is a function's name, a line break, and a JSON object."""

    def possible(self, body: str) -> bool:
        return re.fullmatch(r"\s*[\w.:/-]*(?:[ \t]*\n\s*(?:\{.*)?)?", body, re.DOTALL) is not None

    def inside_string(self, body: str) -> bool:
        return JsonCalls().inside_string(body)

    def parse(self, body: str, tools: Tools, closed: bool = True) -> list[Found]:
        name, _, rest = body.strip().partition("\n")
        if not rest.strip():
            return []
        try:
            return [Found(name.strip(), arguments_of(rest, closed))]
        except Unreadable as error:
            return [Found(name.strip(), error=str(error))]

    def length(self, body: str) -> int:
        return len(body)


class FirstOf:
    """Several notations at once: the first that finds a call has it."""

    def __init__(self, *notations: Notation):
        self._notations = notations

    def possible(self, body: str) -> bool:
        return any(notation.possible(body) for notation in self._notations)

    def inside_string(self, body: str) -> bool:
        able = [notation for notation in self._notations if notation.possible(body)]
        return all(notation.inside_string(body) for notation in able)

    def parse(self, body: str, tools: Tools, closed: bool = True) -> list[Found]:
        able = (notation for notation in self._notations if notation.possible(body))
        found = (notation.parse(body, tools, closed) for notation in able)
        return next((calls for calls in found if calls), [])

    def length(self, body: str) -> int:
        able = [notation for notation in self._notations if notation.possible(body)]
        found = [n for n in able if n.parse(body, Tools(), closed=False)]
        return found[0].length(body) if found else len(body)
