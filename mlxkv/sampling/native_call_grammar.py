"""Grammars of calls whose arguments are not JSON.

| format | a call, without the markers around it |
| --- | --- |
| glm (GLM-4.5 and later) | `N`, then `<arg_key>K</arg_key><arg_value>V</arg_value>` each |
| gemma4, functiongemma | `call:N{K:V,...}`, strings between two tokens of their own |

A V of GLM is bare text where it is a string, else JSON: a string must not be what the parser would
read as a value of another kind. The line breaks that GLM-4.5 writes and GLM-4.7 does not may come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlxkv.errors import UsageError
from mlxkv.parsers.calls import GemmaCalls
from mlxkv.parsers.json_schema import Choice, Schemas, argument_kinds
from mlxkv.parsers.pairs import GlmCalls
from mlxkv.parsers.tools import Tools
from mlxkv.sampling import grammar_strings
from mlxkv.sampling.grammar_strings import holding, literal, one_of
from mlxkv.sampling.grammar_values import MAX_OTHERS, Gemma, Json, Members, Rules, Values

NamedTools = Sequence[tuple[str, Any]]
"""Names and JSON schemas of their arguments."""

_KEY = r"/[^<\s]([^<\n]{0,126}[^<\s])?/"
_DIGITS = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
_SPACE = r"[ \t\n\r]*"
_READ_AS: Mapping[str, str] = {
    "null": f"/{_SPACE}null{_SPACE}/",
    "boolean": f"/{_SPACE}(true|false){_SPACE}/",
    "integer": f"/{_SPACE}{_DIGITS}{_SPACE}/",
    "number": f"/{_SPACE}{_DIGITS}{_SPACE}/",
    "array": rf"/{_SPACE}\[(?s:.*)/",
    "object": rf"/{_SPACE}\{{(?s:.*)/",
}
"""Texts that may be values of other kinds. A list or an object tells from its first character on:
a lexer has to know which of the two it reads."""
_QUOTED = f'/{_SPACE}"(?s:.*)/'


def each_tool(tools: NamedTools, write: Callable[[str, Any], str]) -> Iterator[str]:
    """What is written of each tool; its name is in the errors."""
    for name, schema in tools:
        try:
            yield write(name, schema)
        except UsageError as error:
            raise UsageError(
                f"calls of {name!r} cannot be required of this model: {error}"
            ) from None


def call_rules(name: str, bodies: Iterator[str]) -> list[str]:
    """A rule for each of several calls, and one of that name for any of them."""
    rules = [f"call_{i}: {body}" for i, body in enumerate(bodies)]
    return [f"{name}: {' | '.join(f'call_{i}' for i in range(len(rules)))}", *rules]


def gemma(tools: NamedTools, quote: str, token: str) -> list[str]:
    """Rules of `call`.

    Args:
        tools: those that may be called.
        quote: the text around strings.
        token: the same as a grammar names it.
    """
    rules = Rules()
    notation = Gemma(rules, quote, token)

    def write(name: str, schema: Any) -> str:
        head = f"call:{name}"
        if [each.name for each in GemmaCalls(quote).parse(head + "{}", Tools())] != [name]:
            raise UsageError("such a name cannot be written")
        schemas = Schemas(schema)
        values = Values(rules, notation, schemas)
        return f"{literal(head)} ({values.choices(_objects(schemas, schema))})"

    return [*call_rules("call", each_tool(tools, write)), *rules.lines]


def glm(tools: NamedTools, markers: Callable[[str], str]) -> list[str]:
    """Rules of `call`.

    Args:
        tools: those that may be called.
        markers: tokens as a grammar names them, by their text.
    """
    rules = Rules()

    def write(name: str, schema: Any) -> str:
        return _GlmCall(rules, markers, name, schema).body()

    return [*call_rules("call", each_tool(tools, write)), *rules.lines]


class _GlmCall:
    """Writes the rules of one function's calls.

    Args:
        rules: where they go.
        markers: see `glm`.
        name: the function.
        schema: of its arguments.
    """

    def __init__(self, rules: Rules, markers: Callable[[str], str], name: str, schema: Any):
        self._rules, self._markers, self._name, self._schema = rules, markers, name, schema
        self._schemas = Schemas(schema)
        self._values = Values(rules, Json(rules), self._schemas)
        self._tools = Tools([{"name": name, "parameters": schema}])

    def body(self) -> str:
        """Its name and its arguments."""
        if [each.name for each in GlmCalls().parse(self._name, self._tools)] != [self._name]:
            raise UsageError("such a name cannot be written")
        objects = _objects(self._schemas, self._schema)
        if any(choice.values is not None for choice in objects):
            raise UsageError("enum (or const) of all arguments cannot be kept in this format")
        members = [self._values.members(choice.rules) for choice in objects]
        known = list(dict.fromkeys(name for each in members for name in each.known))
        bodies = [self._rules.add(self._arguments(each, known)) for each in members]
        return f'{literal(self._name)} "\\n"? ({" | ".join(bodies)})'

    def _arguments(self, members: Members, known: Sequence[str]) -> str:
        pairs = []
        for member in members.named:
            if self._read(member.name, "x", Tools()) is None:
                raise UsageError(f"a property of the name {member.name!r} cannot be written")
            pair = self._pair(literal(member.name), member.name, member.schema)
            pairs.append(pair if member.required else f"{pair}?")
        if members.others is not False:
            key = self._rules.terminal(" & ~".join([_KEY, *([one_of(known)] if known else [])]))
            unknown = "".join(known) + "*"
            pairs.append(f"{self._pair(key, unknown, members.others)}{{0,{MAX_OTHERS}}}")
        return " ".join(pairs) or '""'

    def _pair(self, key: str, name: str, schema: Any) -> str:
        tag, value = self._markers, self._value(name, self._schemas.choices(schema))
        return self._rules.add(
            f'{tag("<arg_key>")} {key} {tag("</arg_key>")} "\\n"? '
            f'{tag("<arg_value>")} ({value}) {tag("</arg_value>")} "\\n"?'
        )

    def _value(self, key: str, choices: Sequence[Choice]) -> str:
        texts = [choice for choice in choices if choice.kind == "string"]
        rest = [choice for choice in choices if choice.kind != "string"]
        parts = [self._values.choices(rest)] if rest or not texts else []
        for choice in texts:
            if choice.values is not None:
                parts += [self._constant(key, value) for value in choice.values]
                continue
            kinds = argument_kinds(self._schema, key) - {"string"}
            without = [holding("</arg_value>"), *(_READ_AS[kind] for kind in sorted(kinds))]
            if kinds >= _READ_AS.keys() - {"integer"}:
                without.append(_QUOTED)
            parts.append(self._rules.terminal(grammar_strings.text(choice.rules, without)))
        return " | ".join(parts)

    def _constant(self, key: str, value: str) -> str:
        if self._read(key, value, self._tools) != {key: value}:
            raise UsageError(f"{value!r} of enum (or const) cannot be written in this format")
        return literal(value) if value else '""'

    def _read(self, key: str, text: str, tools: Tools) -> Mapping[str, Any] | None:
        """What the parser reads; None where that is no call with this one argument."""
        body = f"{self._name}<arg_key>{key}</arg_key><arg_value>{text}</arg_value>"
        notation = GlmCalls()
        found = notation.parse(body, tools) if notation.possible(body) else []
        return next((each.arguments for each in found if [*each.arguments] == [key]), None)


def _objects(schemas: Schemas, schema: Any) -> list[Choice]:
    """The ways in which arguments can be."""
    found = [choice for choice in schemas.choices(schema) if choice.kind == "object"]
    if not found:
        raise UsageError("its parameters can be no object")
    return found
