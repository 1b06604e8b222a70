"""Closed schemas: which objects they allow, by a check of our own and by grammars drawn through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlxkv.errors import UsageError
from mlxkv.parsers.closed_schema import closed
from mlxkv.parsers.json_schema import Schemas
from mlxkv.sampling.grammar import Grammar
from tests.sampling.test_grammar import MASKERS, TOKENIZERS, text_of
from tests.support.tool_calls import wander

INTEGER = {"type": "integer"}
A = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
B = {"type": "object", "properties": {"b": INTEGER}, "required": ["b"]}
DEFS = {"A": A, "B": B, "N": {"properties": {"n": {"$ref": "#/$defs/N"}}, "type": "object"}}
TREE = {"anyOf": [{"allOf": [{"$ref": "#/$defs/T"}], "title": "T"}, {"type": "null"}]}


def of_a_and_b(**more: Any) -> dict[str, Any]:
    return {"$defs": DEFS, "type": "object", **more}


NAMES: dict[str, tuple[dict[str, Any], list[set[str]]]] = {
    "one": (A, [{"a"}]),
    "allOf": ({"allOf": [A, B]}, [{"a", "b"}]),
    "allOf of references": (
        of_a_and_b(allOf=[{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]),
        [{"a", "b"}],
    ),
    "a reference beside properties": (
        of_a_and_b(properties={"b": INTEGER}, required=["b"], **{"$ref": "#/$defs/A"}),
        [{"a", "b"}],
    ),
    "anyOf beside properties": (
        {"type": "object", "properties": {"k": INTEGER}, "required": ["k"], "anyOf": [A, B]},
        [{"a", "k"}, {"b", "k"}],
    ),
    "anyOf": ({"anyOf": [A, B]}, [{"a"}, {"b"}]),
    "a reference alone": (of_a_and_b(**{"$ref": "#/$defs/A"}), [{"a"}]),
    "a reference to a property": (
        {
            "type": "object",
            "properties": {"x": {"$ref": "#/properties/y"}, "y": A},
            "required": ["y"],
        },
        [{"y"}, {"x", "y"}],
    ),
    "a name that is only required": ({**A, "required": ["a", "z"]}, [{"a", "z"}]),
    "no names": ({"type": "object", "properties": {}}, [set()]),
    "unevaluated": ({"allOf": [A, B], "unevaluatedProperties": False}, [{"a", "b"}]),
    "recursion": ({"$defs": DEFS, "$ref": "#/$defs/N"}, [set(), {"n"}]),
    "recursion through allOf": (
        {
            "type": "object",
            "allOf": [{"$ref": "#/$defs/T"}, {"properties": {"a": INTEGER}}],
            "$defs": {"T": {"type": "object", "properties": {"t": TREE}}},
            "required": ["a"],
        },
        [{"a"}, {"a", "t"}],
    ),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_an_object_that_names_properties_has_no_others(name, seed):
    schema, allowed = NAMES[name]
    tokenizer = TOKENIZERS["byte_level"]
    masker = MASKERS["byte_level"].masker(Grammar("json_schema", json.dumps(schema)))
    text = text_of(tokenizer, wander(tokenizer, masker, seed))
    assert set(json.loads(text)) in allowed


@pytest.mark.parametrize("name", NAMES)
def test_the_native_grammars_see_the_same_objects(name):
    schema, allowed = NAMES[name]
    shut = closed(schema)
    objects = [c for c in Schemas(shut).choices(shut) if c.kind == "object"]
    assert objects
    for choice in objects:
        able = {n for n, each in choice.rules["properties"].items() if Schemas(shut).choices(each)}
        assert choice.rules["additionalProperties"] is False
        assert able in allowed


OPEN = [
    {"type": "object"},
    {},
    {**A, "additionalProperties": True},
    {**A, "additionalProperties": INTEGER},
    {**A, "patternProperties": {"^x": INTEGER}},
    {"allOf": [A, {**B, "additionalProperties": True}]},
    {"type": "object", "required": ["a"]},
    {**A, "minProperties": 2},
    True,
]


@pytest.mark.parametrize("schema", OPEN, ids=json.dumps)
def test_a_schema_that_says_what_else_there_is_stays_as_it_is(schema):
    assert closed(schema) == schema


def test_names_from_an_enum_or_of_a_pattern_are_properties():
    record = {"type": "object", "additionalProperties": A}
    names = {"type": "string", "enum": ["x", "y"]}
    shut = {**A, "additionalProperties": False}
    assert closed({**record, "propertyNames": names, "required": ["x"]}) == {
        "type": "object",
        "properties": {"x": shut, "y": shut},
        "required": ["x"],
        "additionalProperties": False,
    }
    assert closed({"type": "object", "propertyNames": {"const": "x"}})["properties"] == {"x": True}
    assert closed({**record, "propertyNames": {"pattern": "^a"}}) == {
        "type": "object",
        "patternProperties": {"^a": shut},
        "additionalProperties": False,
    }


def test_a_record_of_named_keys_is_written_so():
    names = {"type": "string", "enum": ["left", "right"]}
    schema = {"type": "object", "propertyNames": names, "required": ["left", "right"],
              "additionalProperties": {"enum": [1, 2]}}  # fmt: skip
    masker = MASKERS["byte_level"].masker(Grammar("json_schema", json.dumps(schema)))
    value = json.loads(
        text_of(TOKENIZERS["byte_level"], wander(TOKENIZERS["byte_level"], masker, 0))
    )
    assert value.keys() == {"left", "right"} and set(value.values()) <= {1, 2}


def test_values_within_open_objects_are_closed():
    shut = closed({"type": "object", "additionalProperties": {"type": "array", "items": A}})
    assert shut["additionalProperties"]["items"]["additionalProperties"] is False


def test_names_that_unevaluated_properties_allow_are_those_of_the_object():
    assert closed({**A, "unevaluatedProperties": INTEGER}) == {**A, "additionalProperties": INTEGER}


@pytest.mark.parametrize(
    "more",
    [
        {"propertyNames": {"type": "string"}},
        {"propertyNames": {}},
        {"propertyNames": True},
        {"propertyNames": {"type": "string", "title": "Key"}},
        {"uniqueItems": False},
        {"dependentRequired": {}},
        {"if": {"required": ["a"]}},
        {"then": A},
        {"minContains": 1},
        {"format": "no such"},
        {"$schema": "https://example.com/mine"},
    ],
    ids=json.dumps,
)
def test_keywords_that_say_nothing_are_dropped(more):
    assert closed({"type": "object", **more}) == {"type": "object"}


@pytest.mark.parametrize(
    "more",
    [
        {"propertyNames": {"minLength": 2}},
        {"propertyNames": {"enum": ["a", 1]}},
        {"propertyNames": {"enum": ["a"]}, "properties": {"b": {}}},
        {"propertyNames": False},
        {"propertyNames": {"type": "integer"}},
        {"uniqueItems": True},
        {"not": A},
        {"if": A, "then": B},
    ],
    ids=json.dumps,
)
def test_keywords_that_cannot_be_kept_are_still_refused(more):
    grammar = Grammar("json_schema", json.dumps({"type": "object", **more}))
    with pytest.raises(UsageError):
        MASKERS["byte_level"].masker(grammar)


@pytest.mark.parametrize(
    "schema", [None, 3, [A], {"properties": 3}, {"allOf": 3}, {"$ref": 3}, {"required": [3]}]
)
def test_what_is_no_schema_is_left_for_the_grammar_to_refuse(schema):
    closed(schema)


def test_references_that_fork_at_each_step_are_looked_at_once():
    n = 60
    steps = {f"s{i}": {"allOf": [{"$ref": f"#/$defs/s{i + 1}"}] * 2} for i in range(n)}
    shut = closed({"$ref": "#/$defs/s0", "$defs": {**steps, f"s{n}": A}})
    assert shut["$defs"][f"s{n}"]["additionalProperties"] is False


def test_a_schema_that_is_too_complex_is_the_users_error():
    parts = [{"$ref": f"#/$defs/p{i}"} for i in range(400)]
    defs = {f"p{i}": {"allOf": parts} for i in range(400)}
    with pytest.raises(UsageError, match=r"complex|deeply"):
        closed({"allOf": parts, "$defs": defs})


def test_a_schema_that_nests_too_deeply_is_the_users_error():
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(UsageError, match="deeply"):
        closed(schema)
