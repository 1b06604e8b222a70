"""Schemas taken apart: what is asked of each kind of value, and what cannot be kept."""

from __future__ import annotations

from typing import Any

import pytest

from mlxkv.errors import UsageError
from mlxkv.parsers.json_schema import KINDS, Schemas, argument_kinds

STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def taken_apart(schema: Any) -> list[tuple[Any, ...]]:
    return [
        (choice.kind, dict(choice.rules), *([choice.values] if choice.values is not None else []))
        for choice in Schemas(schema).choices(schema)
    ]


@pytest.mark.parametrize(
    "schema, expected",
    [
        (False, []),
        ({"type": "null", "minLength": 3}, [("null", {})]),
        (
            {"type": ["string", "integer"], "minLength": 3, "minimum": 1},
            [("integer", {"minimum": 1}), ("string", {"minLength": 3})],
        ),
        ({"type": ["number", "integer"]}, [("number", {})]),
        ({"const": "a"}, [("string", {}, ("a",))]),
        (
            {"enum": [1, True, "a", None, 2]},
            [
                ("number", {}, (1, 2)),
                ("boolean", {}, (True,)),
                ("string", {}, ("a",)),
                ("null", {}, (None,)),
            ],
        ),
        ({"type": "integer", "enum": [1, 2.0, 2.5, True]}, [("integer", {}, (1, 2.0))]),
        ({"anyOf": [STRING, False, {"type": "null"}]}, [("string", {}), ("null", {})]),
        (
            {"type": "string", "maxLength": 9, "anyOf": [{"maxLength": 3}, {"pattern": "a"}]},
            [("string", {"maxLength": 3}), ("string", {"maxLength": 9, "pattern": "a"})],
        ),
        (
            {"$ref": "#/$defs/a~1b", "minLength": 2, "$defs": {"a/b": {**STRING, "minLength": 1}}},
            [("string", {"minLength": 2})],
        ),
        ({"allOf": [STRING, INTEGER]}, []),
        ({"allOf": [{"type": "number"}, INTEGER]}, [("integer", {})]),
        ({"allOf": [{"enum": [1, "1"]}, STRING]}, [("string", {}, ("1",))]),
        ({"oneOf": [STRING, INTEGER]}, [("string", {}), ("integer", {})]),
        ({"type": "string", "title": "t", "default": 1, "x-of-ours": 2}, [("string", {})]),
        ({"type": "array", "uniqueItems": False}, [("array", {})]),
    ],
)
def test_a_schema_is_taken_apart_by_kinds(schema, expected):
    assert taken_apart(schema) == expected


def test_a_schema_that_asks_for_nothing_allows_all_kinds():
    assert {row[0] for row in taken_apart({})} == KINDS - {"integer"}


def test_objects_that_have_to_be_both_keep_what_each_asks():
    closed = {"properties": {"a": STRING, "b": INTEGER}, "additionalProperties": False}
    other = {"properties": {"b": {"minimum": 3}, "c": STRING}, "required": ["b"]}
    schema = {"type": "object", "allOf": [closed, other], "required": ["a"]}
    [(kind, rules)] = taken_apart(schema)
    assert kind == "object" and rules["required"] == ["a", "b"]
    assert rules["additionalProperties"] is False
    assert rules["properties"] == {
        "a": STRING,
        "b": {"allOf": [INTEGER, {"minimum": 3}]},
        "c": False,
    }


@pytest.mark.parametrize(
    "one, other, exclusive",
    [
        (STRING, INTEGER, True),
        (INTEGER, {"type": "number"}, False),
        ({"const": 1}, {"const": 2}, True),
        ({"const": 1}, {"enum": [2, 1]}, False),
        ({}, STRING, False),
    ],
)
def test_the_parts_of_one_of_must_exclude_each_other(one, other, exclusive):
    for first, second in ((one, other), (other, one)):
        for schema in (
            {"oneOf": [first, second]},
            {
                "type": "object",
                "oneOf": [
                    {"properties": {"k": first}, "required": ["k"]},
                    {"properties": {"k": second}, "required": ["k"]},
                ],
            },
        ):
            if exclusive:
                assert len(taken_apart(schema)) == 2
            else:
                with pytest.raises(UsageError, match="oneOf"):
                    taken_apart(schema)


@pytest.mark.parametrize(
    "schema, said",
    [
        (3, "must be an object"),
        ({"$ref": "http://127.0.0.1:9/x.json"}, "not present"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "itself"),
        ({"$ref": 3}, "not present"),
        ({"$ref": []}, "not present"),
        ({"type": "any"}, "'any'"),
        ({"type": [["string"]]}, "'string'"),
        ({"type": "string", "minLength": -1}, "minLength"),
        ({"type": "integer", "maximum": float("inf")}, "maximum"),
        ({"required": "a"}, "required"),
        ({"properties": ["a"]}, "properties"),
        ({"anyOf": {}}, "anyOf"),
        ({"allOf": [{"anyOf": [{"const": i} for i in range(20)]}] * 3}, "too many"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ],
)
def test_what_is_no_schema_or_cannot_be_kept_is_the_users_error(schema, said):
    with pytest.raises(UsageError, match=said):
        taken_apart(schema)


@pytest.mark.parametrize(
    "parameters, expected",
    [
        ({"properties": {"k": STRING}}, {"string"}),
        ({"properties": {"k": {"$ref": "#/$defs/k"}}, "$defs": {"k": STRING}}, {"string"}),
        ({"properties": {"k": {"anyOf": [STRING, {"type": "null"}]}}}, {"string", "null"}),
        ({"properties": {"k": {"enum": ["a", 1]}}}, {"string", "number"}),
        ({"additionalProperties": STRING}, {"string"}),
        ({"additionalProperties": False}, set()),
        ({"anyOf": [{"properties": {"k": STRING}}, {"properties": {"k": INTEGER}}]},
         {"string", "integer"}),
        ({}, KINDS - {"integer"}),
        ({"properties": {"k": {"type": "array", "uniqueItems": True}}}, {"array"}),
        ({"properties": {"k": {"type": ["string", "null"], "not": {}}}}, {"string", "null"}),
        ({"not": {}}, KINDS),
        ({"properties": {"k": 3}}, KINDS),
        (3, KINDS),
    ],
)  # fmt: skip
def test_kinds_of_an_argument_are_told_as_far_as_its_schema_does(parameters, expected):
    assert argument_kinds(parameters, "k") == expected
