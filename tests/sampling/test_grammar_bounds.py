"""What grammars weigh before they are compiled: references are followed, bounds named."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mlxkv.errors import UsageError
from mlxkv.sampling import grammar_bounds
from mlxkv.sampling.grammar_bounds import lark_weight, regex_weight, schema_weight


def chain(n: int, link: Any = lambda name: {"$ref": name}) -> dict[str, Any]:
    """A schema of n definitions, each of which refers to the next."""
    defs = {f"d{i}": link(f"#/$defs/d{i + 1}") for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{n}": {"type": "string"}}}


def test_a_schemas_depth_follows_its_references():
    assert schema_weight(chain(7)).depth == 1 + 7 + 1
    # allOf, the list in it, and the part that refers.
    assert schema_weight(chain(7, lambda name: {"allOf": [{"$ref": name}]})).depth == 1 + 7 * 3 + 1


def test_definitions_that_nothing_refers_to_do_not_count():
    schema = {**chain(30), "$ref": "#/$defs/d28"}
    assert schema_weight(schema).depth == 1 + 2 + 1


def test_of_a_circle_all_members_count_and_what_lies_behind_it():
    schema = {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]},
            "b": {"properties": {"again": {"$ref": "#/$defs/a"}, "next": {"$ref": "#/$defs/c"}}},
            "c": {"type": "string"},
        },
    }
    assert schema_weight(schema).depth == 1 + (3 + 3) + 1


@pytest.mark.parametrize("reference", ["elsewhere", "#/$defs/none", "#anchor", "http://x/$defs/a"])
def test_a_reference_that_is_not_found_counts_as_all_there_is(reference):
    schema = {"$ref": reference, "$defs": {"a": {"items": {"items": {}}}}}
    assert schema_weight(schema).depth >= 5


def test_a_grammars_depth_follows_its_rules_and_terminals():
    lark = "start: r0\n" + "".join(f'r{i}: "(" r{i + 1}\n' for i in range(6)) + "r6: A\n"
    assert lark_weight(lark + "A: B\nB: /x/\n").depth == 1 + 7 + 2
    assert lark_weight('start: "a" ("b" ("c" | start))').depth == 3


def test_names_in_strings_comments_and_patterns_of_a_grammar_are_no_rules():
    lark = 'start: a\na: "b" /b/ # "\nb: c\nc: d\nd: "x"\n'
    assert lark_weight(lark).depth == 3  # b, c, d, which start does not lead to
    assert lark_weight(lark.replace("/b/", "b")).depth == 5


def test_attributes_do_not_hide_a_rule():
    lark = "".join(f'r{i}[stop="r:"]: r{i + 1}\n' for i in range(6)) + 'r6: "x"\n'
    assert lark_weight(f"start: r0\n{lark}").depth >= 8


def test_a_schema_within_a_grammar_counts():
    lark = f"start: a\na: %json {json.dumps(chain(9))}\n"
    assert lark_weight(lark).depth >= 2 + schema_weight(chain(9)).depth


def test_repeats_multiply_through_groups():
    assert regex_weight("(a{3}b){5}c{7}").repeats == 15
    assert regex_weight("((a{2,4}){3}|[(]{99}){2}").repeats == 198
    assert regex_weight(r"\({9}(x(y)){2}").repeats == 9
    assert schema_weight({"items": {"pattern": "(a{4}){5}"}}).repeats == 20


@pytest.mark.parametrize(
    ("schema", "multiples"),
    [
        ({"multipleOf": 0.25}, 25),
        ({"multipleOf": 1000}, 1000),
        ({"anyOf": [{"multipleOf": 6}, {"multipleOf": 4}]}, 10),
        ({"allOf": [{"multipleOf": 15}, {"multipleOf": 4}]}, 60),
    ],
)
def test_multiples_are_the_states_of_their_automata(schema, multiples):
    assert schema_weight(schema).multiples == multiples


def bounds(monkeypatch, **values: int) -> None:
    for name, value in values.items():
        monkeypatch.setattr(grammar_bounds, name, value)


def test_what_is_past_a_bound_is_refused_with_it(monkeypatch):
    bounds(monkeypatch, MAX_DEPTH=20, MAX_REPEATS=50, MAX_MULTIPLES=70, _MAX_PARTS=40)
    schema_weight(chain(15)).check()
    for weigh, said in (
        (lambda: schema_weight(chain(25)), "27 levels deep, its references followed; at most 20"),
        (lambda: regex_weight("(a{6}){9}"), "repeats a part 54 times; at most 50"),
        (lambda: schema_weight({"multipleOf": 71}), "come to 71 together; at most 70"),
        (lambda: schema_weight(chain(45)), "more than 40 parts"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            weigh().check()


@pytest.mark.parametrize("text", ["[", "(", '"\\', "/\\", "a.", "%json ", "\n", "{1}"])
def test_weighing_takes_linear_time(text):
    """Quadratic time would take minutes."""
    for weigh in (lark_weight, regex_weight):
        try:
            weigh(text * 100_000)
        except UsageError as error:
            assert "cannot be read" in str(error)
