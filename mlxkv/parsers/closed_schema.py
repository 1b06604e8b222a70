"""JSON schemas as grammars take them: closed, and without keywords that say nothing.

    schema = closed(schema)

- An object that names properties (`properties`, an empty one too) has no others, unless its schema
  says so: `additionalProperties`, `patternProperties`, or `unevaluatedProperties`. A weak model
  would add properties of its own without end. llama.cpp and xgrammar close objects as well.
- Across `allOf`, `$ref` and `anyOf` the names of all parts count, as for
  `unevaluatedProperties: false`: closing each part by itself would allow nothing.
- An object without `properties` stays open.
- Keywords that ask for nothing are dropped: `propertyNames: {"type": "string"}`, an unknown
  `format`, `if` without `then` and `else`. Names from an enum or of a pattern become properties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxkv.errors import UsageError
from mlxkv.parsers.json_schema import SAYS_NOTHING, Schemas

FORMATS = frozenset({
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "unknown", "uri",
    "uuid",
})  # fmt: skip
"""Formats of strings that are kept; others are annotations."""
_MAX_PARTS = 100_000
"""Parts of objects that are looked at for their properties."""
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_OF_ONE = ("items", "additionalItems", "additionalProperties", "contains")
_IN_PLACE = ("allOf", "anyOf", "oneOf")
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})
_DIALECTS = ("http://json-schema.org/", "https://json-schema.org/")


def closed(schema: Any) -> Any:
    """A schema of the same objects without properties that it does not name; see the module.

    What is no JSON schema is left for the grammar to refuse.

    Raises:
        UsageError: it nests too deeply, or is too complex.
    """
    try:
        return _Closing(schema).document()
    except RecursionError:
        raise UsageError("the JSON schema nests too deeply") from None


@dataclass(frozen=True, slots=True)
class _Names:
    """What the parts of a schema that describe one object say of its properties.

    Args:
        names: of properties, those that are required too.
        is_named: some part has `properties`.
        is_settled: some part says what else there may be.
    """

    names: tuple[str, ...] = ()
    is_named: bool = False
    is_settled: bool = False

    def __or__(self, other: _Names) -> _Names:
        return _joined([self, other])


def _joined(parts: Sequence[_Names]) -> _Names:
    """What several parts say together."""
    return _Names(
        tuple(dict.fromkeys(name for part in parts for name in part.names)),
        any(part.is_named for part in parts),
        any(part.is_settled for part in parts),
    )


class _Closing:
    """Closes the objects of one document."""

    def __init__(self, root: Any):
        self._root = root
        self._schemas = Schemas(root)
        self._copies: dict[str, Any] = {}
        self._n_parts = 0
        self._names_of: dict[tuple[str, bool], str] = {}

    def document(self) -> Any:
        """The whole document."""
        found = self._close(self._root)
        if not self._copies or not isinstance(found, Mapping):
            return found
        return {**found, "$defs": {**found.get("$defs", {}), **self._copies}}

    def _close(self, schema: Any, outer: _Names = _Names()) -> Any:
        """A schema with its objects closed.

        Args:
            outer: what other parts say of the same object.
        """
        if schema is True and outer.is_named:
            schema = {}
        if not isinstance(schema, Mapping):
            return schema
        schema = _meaningful(schema)
        branches = [key for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)]
        is_split = len(branches) == 1
        names = outer | self._names(schema, but=branches[0] if is_split else None)
        if names.is_settled:
            return self._open(schema)
        # From here on it says the same as closing.
        schema = {key: schema[key] for key in schema if key != "unevaluatedProperties"}
        if is_split:
            key = branches[0]
            rest = self._open({k: v for k, v in schema.items() if k != key})
            return {**rest, key: [self._close(each, names) for each in schema[key]]}
        if not outer.is_named and _is_reference(schema):
            return self._own({**schema, "$ref": self._copied(schema["$ref"], is_open=False)})
        if not outer.is_named and _is_wrapped(schema):
            return {**self._own(schema), "allOf": [self._close(schema["allOf"][0])]}
        found = self._open(schema)
        return _shut(found, names.names) if names.is_named else found

    def _open(self, schema: Any) -> Any:
        """A schema whose own object is not closed, though those within it are."""
        if not isinstance(schema, Mapping):
            return schema
        found = self._own(schema)
        if "$ref" in schema:
            found["$ref"] = self._copied(schema["$ref"], is_open=True)
        for key in _IN_PLACE:
            if isinstance(schema.get(key), list):
                found[key] = [self._open(part) for part in schema[key]]
        return found

    def _own(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """A schema without what says nothing, the values within it closed."""
        found = _meaningful(schema)
        for key in _OF_NAMES:
            if isinstance(found.get(key), Mapping):
                found[key] = {name: self._close(each) for name, each in found[key].items()}
        for key in (*_OF_ONE, "prefixItems"):
            if isinstance(found.get(key), list):
                found[key] = [self._close(each) for each in found[key]]
            elif key in found:
                found[key] = self._close(found[key])
        return found

    def _copied(self, reference: Any, is_open: bool) -> Any:
        """The reference to a copy of what one refers to, closed or not."""
        target = self._target(reference)
        if target is None or (not is_open and _is_walked(reference)):
            return reference
        copy = reference, is_open
        if copy not in self._names_of:
            self._names_of[copy] = name = f"mlxkv-{len(self._names_of)}"
            self._copies[name] = self._open(target) if is_open else self._close(target)
        name = self._names_of[copy]
        return f"#/$defs/{name}"

    def _target(self, reference: Any) -> Any:
        try:
            return self._schemas.resolve(reference)
        except UsageError:
            return None

    def _names(self, schema: Any, but: str | None = None, seen: set[str] | None = None) -> _Names:
        """What a schema's parts say of one object's properties.

        Args:
            but: a keyword that is left out.
            seen: references that are looked at already.
        """
        seen = set() if seen is None else seen
        self._n_parts += 1
        if self._n_parts > _MAX_PARTS:
            raise UsageError("the JSON schema is too complex")
        if not isinstance(schema, Mapping):
            return _Names()
        properties, required = schema.get("properties"), schema.get("required")
        is_named = isinstance(properties, Mapping) or schema.get("unevaluatedProperties") is False
        own = [*(properties if isinstance(properties, Mapping) else ()), *_listed(required)]
        own = dict.fromkeys(name for name in own if isinstance(name, str))
        found = [_Names(tuple(own), is_named, _is_settled(schema))]
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            found.append(self._names(self._target(reference), seen=seen))
        for key in _IN_PLACE:
            for part in () if key == but else _listed(schema.get(key)):
                found.append(self._names(part, seen=seen))
        return _joined(found)


def _shut(schema: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """A schema whose object has these properties and no others."""
    if "$ref" not in schema and not any(key in schema for key in _IN_PLACE):
        others = {name: True for name in names if name not in schema.get("properties", {})}
        properties = {**schema.get("properties", {}), **others}
        return {**schema, "properties": properties, "additionalProperties": False}
    shut = {"properties": dict.fromkeys(names, True), "additionalProperties": False}
    return {**schema, "allOf": [*schema.get("allOf", ()), shut]}


def _is_settled(schema: Mapping[str, Any]) -> bool:
    """Whether a schema says itself which properties there are besides those that it names."""
    least = schema.get("minProperties")
    properties = schema.get("properties")
    return (
        "additionalProperties" in schema
        or bool(schema.get("patternProperties"))
        or schema.get("unevaluatedProperties", False) is not False
        or (isinstance(least, int) and isinstance(properties, Mapping) and least > len(properties))
    )


def _is_reference(schema: Mapping[str, Any]) -> bool:
    """Whether a schema is only a `$ref`."""
    return "$ref" in schema and not schema.keys() - _ANNOTATIONS - {"$ref", "$defs", "definitions"}


def _is_wrapped(schema: Mapping[str, Any]) -> bool:
    """Whether a schema is only an `allOf` of one part, as pydantic 1 writes references.

    That part is closed itself: where it refers to what is around it, llguidance takes no siblings.
    """
    parts = schema.get("allOf")
    rest = schema.keys() - _ANNOTATIONS - {"allOf", "$defs", "definitions"}
    return isinstance(parts, list) and len(parts) == 1 and not rest


def _is_walked(reference: str) -> bool:
    """Whether what a reference names is closed where it stands."""
    parts = reference.split("/")
    return parts == ["#"] or (len(parts) == 3 and parts[1] in ("$defs", "definitions"))


def _meaningful(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema without the keywords that say nothing."""
    found = {
        key: value
        for key, value in schema.items()
        if not (key in SAYS_NOTHING and value == SAYS_NOTHING[key])
    }
    has_parts = {"$ref", *_IN_PLACE, "additionalProperties"} & found.keys()
    if "unevaluatedProperties" in found and not has_parts:
        found["additionalProperties"] = found.pop("unevaluatedProperties")
    if "propertyNames" in found:
        _name_properties(found)
    if found.get("format") not in FORMATS:
        found.pop("format", None)
    if not {"then", "else"} & found.keys():
        found.pop("if", None)
    if "if" not in found:
        found.pop("then", None)
        found.pop("else", None)
    if "contains" not in found:
        found.pop("minContains", None)
        found.pop("maxContains", None)
    if not str(found.get("$schema", "")).startswith(_DIALECTS):
        found.pop("$schema", None)
    return found


def _name_properties(schema: dict[str, Any]) -> None:
    """Say what `propertyNames` says with keywords that grammars have, where those can.

    zod writes a record with an enum's keys so.
    """
    names = schema["propertyNames"]
    if _is_any_name(names):
        del schema["propertyNames"]
        return
    others = {"properties", "patternProperties", "$ref", *_IN_PLACE} & schema.keys()
    if others or not isinstance(names, Mapping) or names.get("type", "string") != "string":
        return
    said, value = names.keys() - _ANNOTATIONS - {"type"}, schema.get("additionalProperties", True)
    allowed = names.get("enum", [names.get("const")])
    if said in ({"enum"}, {"const"}) and all(isinstance(name, str) for name in _listed(allowed)):
        schema["properties"] = dict.fromkeys(_listed(allowed), value)
    elif said == {"pattern"}:
        schema["patternProperties"] = {names["pattern"]: value}
    else:
        return
    schema["additionalProperties"] = False
    del schema["propertyNames"]


def _is_any_name(schema: Any) -> bool:
    """Whether all names of properties satisfy a schema: it asks for no more than a string."""
    if not isinstance(schema, Mapping):
        return schema is True
    said = {key: schema[key] for key in schema.keys() - _ANNOTATIONS}
    kinds = said.pop("type", "string")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    only_unknown = not said or (said.keys() == {"format"} and said["format"] not in FORMATS)
    return only_unknown and "string" in kinds


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
