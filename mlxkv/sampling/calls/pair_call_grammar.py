"""Grammars of calls whose arguments are pairs of tags around raw text.

| format | a call, without the markers around it |
| --- | --- |
| glm (GLM-4.5 and later) | `N`, then `<arg_key>K</arg_key><arg_value>V</arg_value>` each |
| qwen_xml (Qwen3-Coder, Qwen3.5) | `<function=N>`, `<parameter=K>`, V, `</parameter>` each, all on lines of their own, `</function>` |

A V is bare text where it is a string, else JSON: a string must not be what the parser would read as
a value of another kind, nor hold the tags themselves. The line breaks that GLM-4.5 writes and
GLM-4.7 does not may come. GLM's tags are tokens; Qwen's are text, so that a value's end is part of
its terminal: a lexer could not tell where it begins.
"""  # noqa: E501

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from mlxkv.errors import UsageError
from mlxkv.parsers.json_schema import Choice, Schemas, argument_kinds
from mlxkv.parsers.notations.notation import Notation
from mlxkv.parsers.notations.pairs import GlmCalls, XmlCalls
from mlxkv.parsers.notations.tools import Tools
from mlxkv.sampling.calls import grammar_strings
from mlxkv.sampling.calls.grammar_strings import holding, literal, one_of
from mlxkv.sampling.calls.grammar_values import MAX_OTHERS, Json, Members, Rules, Values
from mlxkv.sampling.calls.native_call_grammar import NamedTools, call_rules, each_tool, objects_of

_DIGITS = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
_SPACE = r"[ \t\n\r]*"
_READ_AS: Mapping[str, str] = {
    "null": f"/{_SPACE}(null|None){_SPACE}/",
    "boolean": f"/{_SPACE}(true|false|True|False){_SPACE}/",
    "integer": f"/{_SPACE}{_DIGITS}{_SPACE}/",
    "number": f"/{_SPACE}{_DIGITS}{_SPACE}/",
    "array": rf"/{_SPACE}\[(?s:.*)/",
    "object": rf"/{_SPACE}\{{(?s:.*)/",
}
"""Texts that may be values of other kinds. A list or an object tells from its first character on:
a lexer has to know which of the two it reads."""
_NUMBER_LIKE = rf"/{_SPACE}-?[0-9](?s:.*)/"
_QUOTED = f'/{_SPACE}"(?s:.*)/'


def glm(tools: NamedTools, markers: Callable[[str], str]) -> list[str]:
    """Rules of `call`.

    Args:
        tools: those that may be called.
        markers: tokens as a grammar names them, by their text.
    """
    rules = Rules()
    bodies = each_tool(tools, lambda name, schema: _GlmCall(rules, name, schema, markers).body())
    return [*call_rules("call", bodies), *rules.lines]


def xml(tools: NamedTools) -> list[str]:
    """Rules of `call`, of tools that may be called."""
    rules = Rules()
    bodies = each_tool(tools, lambda name, schema: _XmlCall(rules, name, schema).body())
    return [*call_rules("call", bodies), *rules.lines]


class _PairCall(ABC):
    """Writes the rules of one function's calls.

    Args:
        rules: where they go.
        name: the function.
        schema: of its arguments.
    """

    notation: ClassVar[Notation]
    tags: ClassVar[Sequence[str]]
    """Texts that no string may hold."""
    key: ClassVar[str]
    """A terminal's body: keys that can be written."""

    def __init__(self, rules: Rules, name: str, schema: Any):
        self._rules, self._name, self._schema = rules, name, schema
        self._schemas = Schemas(schema)
        self._values = Values(rules, Json(rules), self._schemas)
        self._tools = Tools([{"name": name, "parameters": schema}])

    @abstractmethod
    def _written(self, pairs: Sequence[tuple[str, str]]) -> str:
        """A call."""

    @abstractmethod
    def _framed(self, arguments: str) -> str:
        """A rule's body: a call with these arguments."""

    @abstractmethod
    def _pair(self, key: str, value: str) -> str:
        """A rule: a pair.

        Args:
            key: a terminal's body.
            value: a rule's body, see `_value`.
        """

    @abstractmethod
    def _value(self, key: str, choices: Sequence[Choice]) -> str:
        """A rule's body: a value of the property of this name."""

    def body(self) -> str:
        """Its name and its arguments."""
        found = self.notation.parse(self._written([]), self._tools)
        if [each.name for each in found] != [self._name]:
            raise UsageError("such a name cannot be written")
        objects = objects_of(self._schemas, self._schema)
        if any(choice.values is not None for choice in objects):
            raise UsageError("enum (or const) of all arguments cannot be kept in this format")
        members = [self._values.members(choice.rules) for choice in objects]
        known = list(dict.fromkeys(name for each in members for name in each.known))
        bodies = [self._rules.add(self._arguments(each, known)) for each in members]
        return self._framed(" | ".join(bodies))

    def _arguments(self, members: Members, known: Sequence[str]) -> str:
        pairs = []
        for member in members.named:
            if self._read(member.name, "x", Tools()) is None:
                raise UsageError(f"a property of the name {member.name!r} cannot be written")
            value = self._value(member.name, self._schemas.choices(member.schema))
            pair = self._pair(literal(member.name), value)
            pairs.append(pair if member.required else f"{pair}?")
        if members.others is not False:
            key = " & ~".join([self.key, *([one_of(known)] if known else [])])
            value = self._value("".join(known) + "*", self._schemas.choices(members.others))
            pairs.append(f"{self._pair(f'({key})', value)}{{0,{MAX_OTHERS}}}")
        return " ".join(pairs) or '""'

    def _text(self, key: str, choice: Choice, *without: str) -> str:
        """A terminal's body: a string that is read as one."""
        kinds = argument_kinds(self._schema, key) - {"string"}
        tags = [holding(tag) for tag in self.tags]
        others = [*tags, *(_READ_AS[kind] for kind in sorted(kinds)), *without]
        if kinds >= _READ_AS.keys() - {"integer"}:
            others.append(_QUOTED)
        return grammar_strings.text(choice.rules, others)

    def _constant(self, key: str, value: str) -> str:
        if self._read(key, value, self._tools) != {key: value}:
            raise UsageError(f"{value!r} of enum (or const) cannot be written in this format")
        return value

    def _read(self, key: str, text: str, tools: Tools) -> Mapping[str, Any] | None:
        """What the parser reads; None where that is no call with this one argument."""
        body = self._written([(key, text)])
        found = self.notation.parse(body, tools) if self.notation.possible(body) else []
        return next((each.arguments for each in found if [*each.arguments] == [key]), None)


class _GlmCall(_PairCall):
    notation = GlmCalls()
    tags = ("</arg_value>", "<arg_key>")
    key = r"""/[^<>"'{}\[\]\s]([^<>"'{}\[\]\n]{0,126}[^<>"'{}\[\]\s])?/"""

    def __init__(self, rules: Rules, name: str, schema: Any, markers: Callable[[str], str]):
        super().__init__(rules, name, schema)
        self._markers = markers

    def _written(self, pairs: Sequence[tuple[str, str]]) -> str:
        return self._name + "".join(
            f"<arg_key>{key}</arg_key><arg_value>{text}</arg_value>" for key, text in pairs
        )

    def _framed(self, arguments: str) -> str:
        return f'{literal(self._name)} "\\n"? ({arguments})'

    def _pair(self, key: str, value: str) -> str:
        tag = self._markers
        key = key if key.startswith('"') else self._rules.terminal(key)
        return self._rules.add(
            f'{tag("<arg_key>")} {key} {tag("</arg_key>")} "\\n"? '
            f'{tag("<arg_value>")} ({value}) {tag("</arg_value>")} "\\n"?'
        )

    def _value(self, key: str, choices: Sequence[Choice]) -> str:
        texts = [choice for choice in choices if choice.kind == "string"]
        rest = [choice for choice in choices if choice.kind != "string"]
        parts = [self._values.choices(rest)] if rest or not texts else []
        for choice in texts:
            if choice.values is None:
                parts.append(self._rules.terminal(self._text(key, choice)))
                continue
            constants = [self._constant(key, value) for value in choice.values]
            parts += [literal(value) if value else '""' for value in constants]
        return " | ".join(parts)


class _XmlCall(_PairCall):
    notation = XmlCalls()
    tags = ("</parameter>", "<parameter=")
    key = r"""/[^<>"'\s]([^<>\n]{0,126}[^<>"'\s])?/"""

    _END = "\n</parameter>\n"

    def _written(self, pairs: Sequence[tuple[str, str]]) -> str:
        inner = "".join(f"<parameter={key}>\n{text}{self._END}" for key, text in pairs)
        return f"<function={self._name}>\n{inner}{XmlCalls.END}"

    def _framed(self, arguments: str) -> str:
        head, end = literal(f"<function={self._name}>\n"), literal(XmlCalls.END)
        return f"{head} ({arguments}) {end}"

    def _pair(self, key: str, value: str) -> str:
        opening = self._rules.terminal(f'"<parameter=" {key} ">\\n"')
        return self._rules.add(f"{opening} ({value})")

    def _value(self, key: str, choices: Sequence[Choice]) -> str:
        bounded = [c for c in choices if c.kind in ("integer", "number") and c.rules]
        without = [_NUMBER_LIKE] if bounded else []
        parts = []
        for choice in choices:
            if choice.values is not None:
                parts += [self._fixed(key, value) for value in choice.values]
            elif choice.kind == "string":
                parts.append(self._ended(f"({self._text(key, choice, *without)})"))
            elif choice.kind in ("null", "boolean", "integer", "number") and not choice.rules:
                parts.append(self._ended(f"({self._values.choices([choice])})"))
            else:
                parts.append(f"({self._values.choices([choice])}) {literal(self._END)}")
        return " | ".join(parts) or self._values.choices([])

    def _fixed(self, key: str, value: Any) -> str:
        """A rule's body: this value."""
        if isinstance(value, str):
            return literal(self._constant(key, value) + self._END)
        return literal(json.dumps(value, ensure_ascii=False) + self._END)

    def _ended(self, body: str) -> str:
        """A terminal: a value with what ends it."""
        return self._rules.terminal(f"{body} {literal(self._END)}")
