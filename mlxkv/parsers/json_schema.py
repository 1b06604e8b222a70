"""JSON schemas taken apart: which kinds of values one allows, and what is asked of each.

    for choice in Schemas(root).choices(schema): choice.kind, choice.rules, choice.values

`$ref`, `allOf`, `anyOf` and `oneOf` are resolved: what comes out has none of them. A keyword that
cannot be kept is an error; as JSON Schema has it, one that means nothing there is a comment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from mlxkv.errors import UsageError

_RULES = {
    "null": (),
    "boolean": (),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
    "object": (
        "properties", "required", "additionalProperties", "minProperties", "maxProperties",
    ),
}  # fmt: skip
KINDS = frozenset(_RULES)
"""What `type` may be."""
_KEPT = {"type", "enum", *(key for keys in _RULES.values() for key in keys)}
_LARGER = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
_SMALLER = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}
_REFUSED = (
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies",
    "patternProperties", "propertyNames", "uniqueItems", "contains", "minContains", "maxContains",
    "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
SAYS_NOTHING: Mapping[str, Any] = {
    "dependentRequired": {},
    "dependentSchemas": {},
    "dependencies": {},
    "patternProperties": {},
    "propertyNames": True,
    "uniqueItems": False,
    "unevaluatedProperties": True,
    "unevaluatedItems": True,
}
"""Keywords that the grammars do not have, and the values at which they ask for nothing."""
_MAX_CHOICES = 256
_MAX_COST = 200_000
"""Of the schemas that are taken apart for one document: 0.2 s."""
_KINDS_COST = 50_000
"""The same where an answer's arguments are read, between two tokens."""
_PART = 10
"""What a part of a schema costs; each property that is merged costs 1."""


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_WELL_FORMED = {
    **dict.fromkeys(_RULES["number"], _is_number),
    **dict.fromkeys(_COUNTS, _is_count),
    **dict.fromkeys(("pattern", "format"), _is_text),
    **dict.fromkeys(("enum", "prefixItems", "allOf", "anyOf", "oneOf"), _is_list),
    "required": _is_names,
    "properties": _is_object,
}

_Flat = Mapping[str, Any]
"""A schema that refers to nothing and combines nothing."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the kinds of values that a schema allows.

    Args:
        kind: null, boolean, integer, number, string, array or object.
        rules: the keywords that say more of this kind.
        values: the only ones; None for all.
    """

    kind: str
    rules: Mapping[str, Any]
    values: tuple[Any, ...] | None = None


class Schemas:
    """The schemas within one document.

    Args:
        root: the whole document, to which its `$ref` refer.
        max_cost: bounds how much is taken apart: parts multiply where they refer to others twice.
    """

    def __init__(self, root: Any, max_cost: int = _MAX_COST):
        self._root, self._left = root, max_cost

    def choices(self, schema: Any) -> list[Choice]:
        """What a schema allows; empty where nothing satisfies it.

        Raises:
            UsageError: it is no schema, or asks for what cannot be kept; says which keyword.
        """
        return [choice for flat in self._flat(schema) for choice in _choices(flat)]

    def _flat(self, schema: Any, seen: frozenset[str] = frozenset()) -> list[_Flat]:
        """The alternatives of a schema.

        Args:
            seen: references that led here.
        """
        self._pay(_PART)
        if isinstance(schema, bool):
            return [{}] if schema else []
        if not isinstance(schema, Mapping):
            raise UsageError("a JSON schema must be an object, true or false")
        _check(schema)
        kept = {key: schema[key] for key in schema if key in _KEPT}
        if "type" in kept:
            # OpenAPI's way to allow null.
            null = ["null"] if schema.get("nullable") is True else []
            kept["type"] = list(dict.fromkeys([*_types(schema), *null]))
        flat: list[_Flat] = [kept]
        if "const" in schema:
            flat = _both(flat, [{"enum": [schema["const"]]}])
        reference = schema.get("$ref")
        if reference is not None:
            target = self.resolve(reference)
            if reference in seen:
                raise UsageError(f"$ref {reference!r} refers to itself")
            flat = self._both(flat, self._flat(target, seen | {reference}))
        for part in schema.get("allOf", ()):
            flat = self._both(flat, self._flat(part, seen))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                parts = [self._both(flat, self._flat(part, seen)) for part in schema[key]]
                if key == "oneOf":
                    self._check_exclusive(parts)
                flat = [each for part in parts for each in part]
        return flat

    def resolve(self, reference: Any) -> Any:
        """What a `$ref` names.

        Raises:
            UsageError: it names nothing in this document.
        """
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise UsageError(f"$ref {reference!r} is not present in the schema")
        found = self._root
        for part in unquote(reference[1:]).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise UsageError(f"$ref {reference!r} is not present in the schema")
        return found

    def _both(self, some: Sequence[_Flat], others: Sequence[_Flat]) -> list[_Flat]:
        """What satisfies one of some and one of others."""
        merged = _both(some, others)
        self._pay(sum(len(flat.get("properties", ())) for flat in merged))
        return merged

    def _pay(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0:
            raise UsageError("the JSON schema is too complex: its parts multiply")

    def _check_exclusive(self, parts: Sequence[Sequence[_Flat]]) -> None:
        """Of `oneOf`: a value of one part must be of no other."""
        for i, part in enumerate(parts):
            for other in parts[i + 1 :]:
                self._pay(_PART)
                if any(self._possible(both) for both in self._both(part, other)):
                    raise UsageError("oneOf of schemas that one value can satisfy together")

    def _possible(self, flat: _Flat, depth: int = 3) -> bool:
        """Whether some value may satisfy a schema; looks at properties that must be there."""
        if not depth or flat.get("type") != ["object"]:
            return bool(_choices(flat))
        inner = [_property(flat, name) for name in flat.get("required", ())]
        return all(any(self._possible(e, depth - 1) for e in self._flat(each)) for each in inner)


def argument_kinds(parameters: Any, key: str) -> frozenset[str]:
    """Kinds of values that a function's parameter may have, as far as its schema tells.

    Args:
        parameters: the schema of its arguments.
        key: the parameter's name.
    """
    return kinds_at(parameters, [key])


def kinds_at(root: Any, path: Sequence[str | None]) -> frozenset[str]:
    """Kinds of values that may be somewhere in a value, as far as its schema tells.

    Args:
        root: the schema.
        path: the way there: names of properties, None for the items of a list.
    """
    schemas = Schemas(root, _KINDS_COST)
    try:
        flats: list[_Flat] = schemas._flat(root)
        for key in path:
            kind = "array" if key is None else "object"
            inner = [_inner(flat, key) for flat in flats if kind in _types(flat)]
            flats = [flat for each in inner for flat in schemas._flat(each)]
        found = [choice.kind for flat in flats for choice in _choices(flat)]
    except (UsageError, RecursionError):
        found = _said_kinds(root, path)
    return frozenset(kind for kind in found if kind in KINDS)


def _inner(flat: _Flat, key: str | None) -> Any:
    if key is not None:
        return _property(flat, key)
    items = flat.get("items", True)
    return True if isinstance(items, list) or "prefixItems" in flat else items


def _said_kinds(schema: Any, path: Sequence[str | None]) -> Sequence[Any]:
    """What `type` says, of a schema with parts that are not understood."""
    for key in path:
        inner = schema.get("items" if key is None else "properties") if _is_object(schema) else None
        schema = inner.get(key) if key is not None and isinstance(inner, Mapping) else inner
    said = schema.get("type") if isinstance(schema, Mapping) else None
    return [said] if isinstance(said, str) else said if isinstance(said, list) else tuple(KINDS)


def kind_of(value: Any) -> str:
    """What `type` a value has."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
    return "array" if isinstance(value, list) else "object"


def _check(schema: Mapping[str, Any]) -> None:
    for key in _REFUSED:
        if key in schema and not (key in SAYS_NOTHING and schema[key] == SAYS_NOTHING[key]):
            raise UsageError(f"{key} cannot be kept in this format")
    for key, good in _WELL_FORMED.items():
        if key in schema and not good(schema[key]):
            raise UsageError(f"{key} of a JSON schema cannot be {json.dumps(schema[key])[:60]}")
    for kind in _types(schema):
        if not isinstance(kind, str) or kind not in KINDS:
            raise UsageError(f"type {kind!r} is none of JSON's")


def _types(schema: _Flat) -> list[Any]:
    said = schema.get("type", sorted(KINDS - {"integer"}))
    return said if isinstance(said, list) else [said]


def _property(flat: _Flat, name: str) -> Any:
    """The schema of an object's property."""
    return flat.get("properties", {}).get(name, flat.get("additionalProperties", True))


def _choices(flat: _Flat) -> list[Choice]:
    types = set(_types(flat))
    if "number" in types:
        types.discard("integer")
    rules = {kind: {k: flat[k] for k in _RULES[kind] if k in flat} for kind in types}
    if "enum" not in flat:
        return [Choice(kind, rules[kind]) for kind in sorted(types)]
    values: dict[str, list[Any]] = {}
    for value in flat["enum"]:
        kind = _admitted(value, types)
        if kind is not None:
            values.setdefault(kind, []).append(value)
    for kind in values:
        if rules[kind]:
            raise UsageError(f"enum beside {next(iter(rules[kind]))} cannot be kept in this format")
    return [Choice(kind, {}, tuple(each)) for kind, each in values.items()]


def _admitted(value: Any, types: set[Any]) -> str | None:
    """The one of the types that a value is of."""
    kind = kind_of(value)
    if kind == "integer" and "number" in types:
        return "number"
    if kind == "number" and "number" not in types and value.is_integer():
        kind = "integer"
    return kind if kind in types else None


def _both(some: Sequence[_Flat], others: Sequence[_Flat]) -> list[_Flat]:
    """What satisfies one of some and one of others."""
    if len(some) * len(others) > _MAX_CHOICES:
        raise UsageError("anyOf and oneOf give too many alternatives")
    merged = (_merged(one, other) for one in some for other in others)
    return [flat for flat in merged if flat is not None]


def _merged(one: _Flat, other: _Flat) -> _Flat | None:
    """What satisfies both; None where nothing does."""
    if not one or not other:
        return one or other
    merged: dict[str, Any] = {**one, **other}
    for key in one.keys() & other.keys() - {"properties", "additionalProperties"}:
        merged[key] = _merged_rule(key, one, other)
    if {"properties", "additionalProperties"} & merged.keys():
        names = {**one.get("properties", {}), **other.get("properties", {})}
        merged["properties"] = {n: _all(_property(one, n), _property(other, n)) for n in names}
        rest = [flat.get("additionalProperties", True) for flat in (one, other)]
        merged["additionalProperties"] = _all(*rest)
    if "enum" in merged and "type" in merged:
        types = set(merged["type"])
        merged["enum"] = [v for v in merged["enum"] if _admitted(v, types) is not None]
    return None if [] in (merged.get("type"), merged.get("enum")) else merged


def _merged_rule(key: str, one: _Flat, other: _Flat) -> Any:
    left, right = one[key], other[key]
    if key == "type":
        return _common_types(_types(one), _types(other))
    if key == "enum":
        known = {json.dumps(value, sort_keys=True) for value in right}
        return [value for value in left if json.dumps(value, sort_keys=True) in known]
    if key == "required":
        return list(dict.fromkeys([*left, *right]))
    if key in _LARGER:
        return max(left, right)
    if key in _SMALLER:
        return min(left, right)
    if left != right and key == "items" and "prefixItems" not in {**one, **other}:
        return _all(left, right)
    if left != right:
        raise UsageError(f"allOf (or $ref) beside another {key} cannot be kept in this format")
    return left


def _common_types(some: list[Any], others: list[Any]) -> list[Any]:
    found = [kind for kind in some if kind in others]
    for left, right in ((some, others), (others, some)):
        if "integer" in left and "number" in right and "integer" not in found:
            found.append("integer")
    return found


def _all(one: Any, other: Any) -> Any:
    """A schema of what satisfies two."""
    if one is True or other is True:
        return other if one is True else one
    if one is False or other is False:
        return False
    return one if one == other else {"allOf": [one, other]}
