"""Rules of a grammar for the values of a JSON schema, in the notations that models write.

    values = Values(rules, Gemma(rules, quote, token), Schemas(schema))
    name = values.value(schema)

Objects have their properties in one order, and what else they may have behind them. Numbers have at
most 18 digits before the point and 17 behind it, so that all of them can be read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlxkv.errors import UsageError
from mlxkv.parsers.json_schema import Choice, Schemas
from mlxkv.sampling.calls import grammar_strings
from mlxkv.sampling.calls.grammar_strings import holding, literal, one_of

MAX_OTHERS = 64
"""Properties of one object that its schema does not name."""
_MAX_KEY = 128
"""Characters of a name of such a property."""
_BARE_KEY = re.compile(r"\w+([ .-]+\w+)*")
_INTEGER = "/-?(0|[1-9][0-9]{0,17})/"
_NUMBER = r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/"
_MAX_NUMBER = 10**15
"""Where a schema bounds a number on one side only."""


class Rules:
    """The rules of a grammar while they are written."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[str, str] = {}

    def add(self, body: str) -> str:
        """The name of a rule."""
        if body not in self._names:
            self._names[body] = self.reserve()
            self.define(self._names[body], body)
        return self._names[body]

    def terminal(self, body: str) -> str:
        """The name of a terminal."""
        key = f"terminal {body}"
        if key not in self._names:
            self._names[key] = f"T_{len(self._names)}"
            self.define(self._names[key], body)
        return self._names[key]

    def reserve(self) -> str:
        """A name of a rule that is defined later."""
        name = f"r_{len(self._names)}"
        self._names[f"reserved {name}"] = name
        return name

    def define(self, name: str, body: str) -> None:
        """What a name stands for."""
        self.lines.append(f"{name}: {body}")


class Notation(Protocol):
    """How values are written.

    Attributes:
        comma: between two values of a list or an object.
        colon: behind a key.
        in_order: an object's keys are sorted.
    """

    comma: str
    colon: str
    in_order: bool

    def string(self, rules: Mapping[str, Any]) -> str:
        """A string that its rules allow."""
        ...

    def quoted(self, text: str) -> str:
        """This string."""
        ...

    def key(self, name: str) -> str:
        """This key."""
        ...

    def other_key(self, known: Sequence[str]) -> str:
        """Some other key."""
        ...


class Json:
    """JSON as Python and the chat templates write it.

    Args:
        rules: of the grammar.
    """

    comma, colon, in_order = ", ", ": ", False

    def __init__(self, rules: Rules):
        self._rules = rules

    def string(self, rules: Mapping[str, Any]) -> str:
        return self._rules.add(f"%json {json.dumps({'type': 'string', **rules})}")

    def quoted(self, text: str) -> str:
        return literal(json.dumps(text, ensure_ascii=False))

    def key(self, name: str) -> str:
        return self.quoted(name)

    def other_key(self, known: Sequence[str]) -> str:
        plain = rf'/[^"\\\x00-\x1f]{{1,{_MAX_KEY}}}/'
        return self._rules.terminal(rf'"\"" ({" & ~".join([plain, *_names(known)])}) "\""')


class Gemma:
    """Gemma's: strings between two tokens, keys bare.

    Args:
        rules: of the grammar.
        quote: the text that is around a string.
        token: the same as a grammar names it.
    """

    comma, colon, in_order = ",", ":", True

    def __init__(self, rules: Rules, quote: str, token: str):
        self._rules, self._quote, self._token = rules, quote, token

    def string(self, rules: Mapping[str, Any]) -> str:
        body = grammar_strings.text(rules, [holding(self._quote)])
        return f"{self._token} {self._rules.terminal(body)} {self._token}"

    def quoted(self, text: str) -> str:
        if self._quote in text:
            # Nothing is escaped in such a string; the models write JSON's as well.
            return literal(json.dumps(text, ensure_ascii=False).replace("<", r"\u003c"))
        inner = literal(text) if text else ""
        return f"{self._token} {inner} {self._token}"

    def key(self, name: str) -> str:
        if not name:
            raise UsageError("a property without a name cannot be written")
        return literal(name) if _BARE_KEY.fullmatch(name) else self.quoted(name)

    def other_key(self, known: Sequence[str]) -> str:
        bare = " & ~".join([r"/\w+([ .-]\w+){0,8}/", *_names(known)])
        limits = {"minLength": 1, "maxLength": _MAX_KEY}
        body = grammar_strings.text(limits, [holding(self._quote), *_names(known)])
        quoted = f"{self._token} {self._rules.terminal(body)} {self._token}"
        return f"({self._rules.terminal(bare)} | {quoted})"


@dataclass(frozen=True, slots=True)
class Member:
    """A property of an object."""

    name: str
    schema: Any
    required: bool


@dataclass(frozen=True, slots=True)
class Members:
    """What an object can have.

    Args:
        named: properties, in order.
        others: the schema of all others, False where there are none.
        known: the names that no other has.
    """

    named: Sequence[Member]
    others: Any
    known: Sequence[str]


class Values:
    """Writes rules for the schemas of one document.

    Args:
        rules: where they go.
        notation: how values are written.
        schemas: of the document.
    """

    def __init__(self, rules: Rules, notation: Notation, schemas: Schemas):
        self._rules, self._notation, self._schemas = rules, notation, schemas
        self._names: dict[str, str] = {}

    def value(self, schema: Any) -> str:
        """The name of a rule for what satisfies a schema.

        Raises:
            UsageError: nothing does, or it asks for what cannot be kept.
        """
        key = json.dumps(schema)
        if key not in self._names:
            self._names[key] = self._rules.reserve()
            body = self.choices(self._schemas.choices(schema))
            self._rules.define(self._names[key], body)
        return self._names[key]

    def choices(self, choices: Sequence[Choice]) -> str:
        """A rule's body: any of these."""
        if not choices:
            raise UsageError("nothing satisfies the schema, or a part of it that has to come")
        return " | ".join(self._choice(choice) for choice in choices)

    def members(self, rules: Mapping[str, Any]) -> Members:
        """What an object of a `Choice` can have."""
        properties, required = rules.get("properties", {}), dict.fromkeys(rules.get("required", []))
        others = rules.get("additionalProperties", True)
        others = others if others is True or self._schemas.choices(others) else False
        names = [*properties, *(n for n in required if n not in properties)]
        if self._notation.in_order:
            names.sort(key=str.lower)
        members = [Member(n, properties.get(n, others), n in required) for n in names]
        members = [m for m in members if m.required or self._schemas.choices(m.schema)]
        n_required = sum(member.required for member in members)
        if rules.get("minProperties", 0) > n_required:
            raise UsageError("minProperties cannot be kept in this format")
        most = rules.get("maxProperties", math.inf)
        if most < (math.inf if others is not False else len(members)):
            raise UsageError("maxProperties cannot be kept in this format")
        return Members(members, others, names)

    def _choice(self, choice: Choice) -> str:
        if choice.values is not None:
            return " | ".join(self._constant(value) for value in choice.values)
        match choice.kind:
            case "null":
                return '"null"'
            case "boolean":
                return '"true" | "false"'
            case "string":
                return self._notation.string(choice.rules)
            case "array":
                return self._array(choice.rules)
            case "object":
                return self._object(choice.rules)
        return self._number(choice)

    def _number(self, choice: Choice) -> str:
        if not choice.rules:
            return self._rules.terminal(_INTEGER if choice.kind == "integer" else _NUMBER)
        rules = dict(choice.rules)
        if not {"maximum", "exclusiveMaximum"} & rules.keys():
            least = rules.get("minimum", rules.get("exclusiveMinimum", 0))
            rules["maximum"] = max(_MAX_NUMBER, 1000 * math.ceil(least))
        if not {"minimum", "exclusiveMinimum"} & rules.keys():
            most = rules.get("maximum", rules.get("exclusiveMaximum", 0))
            rules["minimum"] = min(-_MAX_NUMBER, 1000 * math.floor(most))
        return self._rules.add(f"%json {json.dumps({'type': choice.kind, **rules})}")

    def _constant(self, value: Any) -> str:
        comma = f" {literal(self._notation.comma)} "
        if isinstance(value, str):
            return self._notation.quoted(value)
        if isinstance(value, list):
            return f'"[" {comma.join(map(self._constant, value))} "]"'
        if isinstance(value, Mapping):
            pairs = (f"{self._key(key)} {self._constant(each)}" for key, each in value.items())
            return f'"{{" {comma.join(pairs)} "}}"'
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError("enum (or const) of a number that JSON does not have")
        return literal(json.dumps(value))

    def _key(self, name: str) -> str:
        return f"{self._notation.key(name)} {literal(self._notation.colon)}"

    def _array(self, rules: Mapping[str, Any]) -> str:
        first, rest = rules.get("prefixItems", []), rules.get("items", True)
        if isinstance(rest, list):  # as it was written before 2020
            first, rest = rest, rules.get("additionalItems", True)
        least, most = rules.get("minItems", 0), rules.get("maxItems", math.inf)
        able = rest is True or bool(self._schemas.choices(rest))
        if least > most or (least > len(first) and not able):
            raise UsageError("minItems asks for more items than there can be")
        first = first[: len(first) if most is math.inf else most]
        comma = literal(self._notation.comma)
        inner = ""
        if able and most > len(first):
            item = self.value(rest)
            n_least, n_most = max(least - len(first), 0), most - len(first)
            inner = _repeat(item, comma, n_least, n_most, begun=bool(first))
        for i in reversed(range(len(first))):
            inner = f"{comma if i else ''} {self.value(first[i])} {inner}"
            inner = inner if i < least else f"({inner})?"
        return f'"[" {inner} "]"'

    def _object(self, rules: Mapping[str, Any]) -> str:
        members = self.members(rules)
        comma = literal(self._notation.comma)
        # What may follow where nothing was written yet, and where something was.
        begun, fresh = '""', '""'
        if members.others is not False:
            key = self._notation.other_key(members.known)
            pair = f"{key} {literal(self._notation.colon)} {self.value(members.others)}"
            begun = self._rules.add(f"({comma} {pair}){{0,{MAX_OTHERS}}}")
            fresh = self._rules.add(f"({pair} ({comma} {pair}){{0,{MAX_OTHERS - 1}}})?")
        for member in reversed(members.named):
            pair = f"{self._key(member.name)} {self.value(member.schema)}"
            if member.required:
                fresh = self._rules.add(f"{pair} {begun}")
                begun = self._rules.add(f"{comma} {pair} {begun}")
            else:
                fresh = self._rules.add(f"{pair} {begun} | {fresh}")
                begun = self._rules.add(f"({comma} {pair})? {begun}")
        return f'"{{" {fresh} "}}"'


def _names(known: Sequence[str]) -> list[str]:
    return [one_of(known)] if known else []


def _repeat(item: str, comma: str, least: int, most: float, begun: bool) -> str:
    """From `least` to `most` items with commas between them.

    Args:
        begun: others stand before them.
    """
    if begun:
        return f"({comma} {item}){_count(least, most)}"
    more = f"({comma} {item}){_count(max(least - 1, 0), most - 1)}" if most > 1 else ""
    return f"{item} {more}" if least else f"({item} {more})?"


def _count(least: int, most: float) -> str:
    return f"{{{least},}}" if most == math.inf else f"{{{least},{most:.0f}}}"
