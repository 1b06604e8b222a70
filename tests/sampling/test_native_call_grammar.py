"""Required calls in formats whose arguments are not JSON, and in Harmony's.

What is drawn at random through a mask is read by the family's own parser, and what it reads is
checked against the tool's schema.
"""

from __future__ import annotations

import json
import re

import pytest

from mlxkv.chat.chat_template import ChatTemplate
from mlxkv.chat.gpt_oss.harmony_writer import HarmonyTemplate
from mlxkv.errors import UsageError
from mlxkv.sampling.calls.tool_call_grammar import MAX_CALLS
from mlxkv.sampling.grammar import Maskers
from mlxkv.text.tokenizer import Tokenizer
from tests.sampling.test_grammar import TOKENIZERS, advance_all, allowed_by
from tests.support.chat_templates.cases import TEMPLATES as CHAT_TEMPLATES
from tests.support.paths import XML_TEMPLATE
from tests.support.tool_calls import (
    NASTY,
    SCHEMAS,
    STRING,
    TEMPLATES,
    an_object,
    drawn,
    flaw,
    grammar_of,
    masker_of,
    read,
    takes,
    tokenizer_of,
    tool,
    wander,
)

NATIVE = ["glm", "qwen_xml", "gemma4", "functiongemma"]


HOW = ("added", "special", "in the vocabulary")
DRAWN = [
    (about, name, family, HOW[(i + j + k) % 3])
    for i, about in enumerate(SCHEMAS)
    for j, name in enumerate(TEMPLATES)
    for k, family in enumerate(("byte_level", "metaspace", "gemma"))
]
"""Each schema in each format on each kind of tokenizer. How the markers are tokens goes round: each
way meets each schema, each format and each tokenizer."""


@pytest.mark.parametrize(("about", "name", "family", "how"), DRAWN)
def test_what_is_drawn_is_calls_of_the_schema_to_the_familys_parser(about, name, family, how):
    tokenizer = tokenizer_of(name, family, how)
    tools = [tool(SCHEMAS[about]), tool(an_object("s", s=STRING), "get.it-2")]
    schemas = {each["name"]: each["parameters"] for each in tools}
    for seed in range(2):
        masker = masker_of(tokenizer, grammar_of(tools, parallel=seed > 0))
        text, calls = read(tokenizer, wander(tokenizer, masker, seed), tools)
        assert not text and 1 <= len(calls) <= (MAX_CALLS if seed else 1)
        for call in calls:
            assert call.error is None, call
            schema = schemas[call.name]
            assert not flaw(dict(call.arguments), schema, schema), call


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("value", NASTY)
def test_an_enum_of_nasty_texts_is_read_back(name, value):
    schema = an_object("e", e={"enum": [value]})
    assert drawn(name, schema, 0, parallel=False) == [{"e": value}]


@pytest.mark.parametrize("name", NATIVE)
def test_optional_properties_come_or_not(name):
    schema = an_object("b", a={"type": "null"}, b={"type": "boolean"}, c={"type": "null"})
    found = {tuple(sorted(each)) for each in drawn(name, schema, *range(40))}
    assert found == {("b",), ("a", "b"), ("b", "c"), ("a", "b", "c")}


@pytest.mark.parametrize("value", ["5", "null", "true", "[null, 1]", "{}", "a text", ""])
def test_glm_takes_all_kinds_of_values_where_all_are_allowed(value):
    call = f"<tool_call>f_1<arg_key>x</arg_key><arg_value>{value}</arg_value></tool_call>"
    kinds = ["integer", "null", "boolean", "array", "string", "object"]
    assert takes("glm", an_object("x", x={"type": kinds}), call)
    assert takes("glm", an_object("x", x={"anyOf": [{"type": kind} for kind in kinds]}), call)
    assert takes("glm", {"type": "object"}, call)


@pytest.mark.parametrize(
    "value", ["5", "null", "true", "[null,1]", '{k:<|"|>v<|"|>}', '<|"|>a text<|"|>', '<|"|><|"|>']
)
def test_gemma_takes_all_kinds_of_values_where_all_are_allowed(value):
    kinds = ["integer", "null", "boolean", "array", "string", "object"]
    call = f"<|tool_call>call:f_1{{x:{value}}}<tool_call|>"
    assert takes("gemma4", an_object("x", x={"type": kinds}), call)
    assert takes("gemma4", an_object("x", x={"anyOf": [{"type": kind} for kind in kinds]}), call)
    assert takes("gemma4", {"type": "object"}, call)


@pytest.mark.parametrize("name", TEMPLATES)
def test_several_calls_come_only_where_they_may(name):
    schema = an_object()
    most = dict.fromkeys((False, True), 0)
    for parallel in most:
        tokenizer, tools = tokenizer_of(name), [tool(schema)]
        for seed in range(12):
            masker = masker_of(tokenizer, grammar_of(tools, parallel=parallel))
            n_calls = len(read(tokenizer, wander(tokenizer, masker, seed), tools)[1])
            most[parallel] = max(most[parallel], n_calls)
    assert most[False] == 1 and (most[True] > 1) == (name != "harmony")


def xml_call(pairs: str) -> str:
    return f"<tool_call>\n<function=f_1>\n{pairs}</function>\n</tool_call>"


def xml_pair(key: str, text: str) -> str:
    return f"<parameter={key}>\n{text}\n</parameter>\n"


CALLS = {
    "qwen_xml": [xml_call(xml_pair("a", "x y") + xml_pair("n", "[1, 2]"))],
    "glm": [
        "<tool_call>f_1\n<arg_key>a</arg_key>\n<arg_value>x y</arg_value>\n<arg_key>n</arg_key>\n"
        "<arg_value>[1, 2]</arg_value>\n</tool_call>",
        "<tool_call>f_1<arg_key>a</arg_key><arg_value>x y</arg_value><arg_key>n</arg_key>"
        "<arg_value>[1, 2]</arg_value></tool_call>",
    ],
    "gemma4": ['<|tool_call>call:f_1{a:<|"|>x y<|"|>,n:[1,2]}<tool_call|>'],
    "functiongemma": [
        "<start_function_call>call:f_1{a:<escape>x y<escape>,n:[1,2]}<end_function_call>"
    ],
    "harmony": [
        "<|channel|>commentary to=functions.f_1 <|constrain|>json<|message|>"
        '{"a": "x y", "n": [1, 2]}',
        ' to=functions.f_1<|channel|>commentary json<|message|>{"a": "x y", "n": [1, 2]}',
        "<|channel|>analysis<|message|>What {?\n\n<|end|><|start|>assistant<|channel|>"
        'commentary to=functions.f_1<|message|>{"a":"x y","n":[1,2]}',
    ],
}


@pytest.mark.parametrize("name, text", [(name, text) for name in CALLS for text in CALLS[name]])
def test_a_call_as_the_family_writes_it_is_taken(name, text):
    schema = an_object("a", a=STRING, n={"type": "array", "items": {"type": "integer"}})
    assert takes(name, schema, text)
    assert not takes(name, an_object("b", b=STRING), text)
    assert not takes(name, an_object("a", a=STRING), text)
    assert not takes(name, an_object("a", a=STRING, n={"type": "array", "items": STRING}), text)


@pytest.mark.parametrize(
    "name, template, starts, ends",
    [
        ("glm", "glm_moe", "<tool_call>", ""),
        ("qwen_xml", "xml", "<tool_call>", "<|im_end|>\n"),
        ("gemma4", "gemma4", "<|tool_call>", "<turn|>\n"),
        ("harmony", "harmony", " to=functions", "<|call|>"),
        ("harmony", None, " to=functions", "<|call|>"),
    ],
)
def test_a_call_as_the_chat_template_writes_it_is_taken(name, template, starts, ends):
    inner = an_object("x", x={"type": "array", "items": {"type": ["boolean", "null", "string"]}})
    schema = an_object("a", "o", a=STRING, n={"type": "number"}, o=inner)
    arguments = {"a": 'x "y"\n{', "n": -2.5, "o": {"x": [True, "é"]}}
    function = {"name": "f_1", "arguments": arguments, "description": "", "parameters": schema}
    question = {"role": "user", "content": "Hi"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    source = XML_TEMPLATE if template == "xml" else CHAT_TEMPLATES.get(template)
    of = HarmonyTemplate() if source is None else ChatTemplate(source.read_text())
    rendered = of.render(
        [question, called], tools=[{"function": function}], add_generation_prompt=False
    )
    call = starts + rendered.rpartition(starts)[2].removesuffix(ends)
    assert "f_1" in call and takes(name, schema, call)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_json_answer_may_come_in_place_of_calls(name):
    content = {"kind": "json_schema", "text": json.dumps({"enum": ["sunny"]})}
    head = "<|channel|>final<|message|>" if name == "harmony" else ""
    assert takes(name, an_object(), f'{head}"sunny"', content=content)
    assert not takes(name, an_object(), f'{head}"rainy"', content=content)
    assert not takes(name, an_object(), f'{head}"sunny"')
    assert takes(name, an_object("a", a=STRING, n=True), CALLS[name][0], content=content)


def test_harmonys_reasoning_ends_in_no_end_token_and_comes_before_the_call():
    tokenizer = tokenizer_of("harmony")
    masker = masker_of(tokenizer, grammar_of([tool({})]))
    advance_all(masker, tokenizer, "<|channel|>analysis<|message|>well")
    allowed = allowed_by(masker, tokenizer)
    assert not allowed & tokenizer.eos_token_ids and tokenizer.id_of("{") in allowed
    advance_all(masker, tokenizer, "<|end|><|start|>assistant<|channel|>")
    assert tokenizer.id_of("f") not in allowed_by(masker, tokenizer)  # as in `final`
    advance_all(masker, tokenizer, "commentary to=functions.f_1<|message|>{}")
    assert masker.finished


def test_reasoning_stays_free_before_calls_of_their_own_notation():
    tokenizer = tokenizer_of("gemma4")
    masker = Maskers(tokenizer).masker(grammar_of([tool(an_object())]), "<|turn>model\n")
    advance_all(masker, tokenizer, "<|channel>thought\nhm {<channel|><|tool_call>call:f_1{}")
    assert tokenizer.id_of("<tool_call|>") in allowed_by(masker, tokenizer)


def test_gemmas_properties_come_in_the_order_of_its_template():
    schema = an_object("b", "A", "c", b={"type": "null"}, A={"type": "null"}, c={"type": "null"})
    assert takes("gemma4", schema, "<|tool_call>call:f_1{A:null,b:null,c:null}<tool_call|>")


TEXTS = [
    (["string", "null"], "null", True),
    (["string", "integer"], "5", True),
    (["string", "integer"], "5 days", True),
    (["string", "integer"], "5.5", False),
    (["string", "array"], "[x", False),
    (["string", "array"], "{x", True),
]
"""Values that may be text or another kind: what is taken in every notation."""


@pytest.mark.parametrize(
    "kinds, text, is_taken",
    [
        (["string"], "5", True),
        (["string", "null"], "5", True),
        *TEXTS,
    ],
)
def test_glms_text_is_no_other_kind_of_value(kinds, text, is_taken):
    call = f"<tool_call>f_1<arg_key>a</arg_key><arg_value>{text}</arg_value></tool_call>"
    schema = an_object("a", a={"type": kinds, "minimum": 5})
    assert takes("glm", schema, call) == is_taken
    bounded = an_object("a", a={"type": kinds, "minimum": 6})
    assert takes("glm", bounded, call) == (is_taken and not (text == "5" and "integer" in kinds))


@pytest.mark.parametrize(
    "kinds, text, is_taken",
    [
        (["string"], "None", True),
        (["string", "null"], "None", False),
        *TEXTS,
        (["string", "null"], "None, so far", True),
        (["string", "boolean"], "True", False),
        (["string", "boolean"], "true", True),
        (["string", "array"], "[1]", True),
        (["string"], "a\n</function>\nb", True),
        (["string"], "a</parameter>b", False),
        (["string"], "a<parameter=b>b", False),
    ],
)
def test_text_in_xml_is_no_other_kind_of_value_and_no_tag(kinds, text, is_taken):
    call = xml_call(xml_pair("a", text))
    assert takes("qwen_xml", an_object("a", a={"type": kinds}), call) == is_taken


def test_text_in_xml_beside_bounded_numbers_begins_with_no_digit():
    schema = an_object("a", a={"type": ["string", "integer"], "minimum": 6})
    texts = {"6": True, "5": False, "x5": True, "6 days": False, "-": True}
    for text, is_taken in texts.items():
        assert takes("qwen_xml", schema, xml_call(xml_pair("a", text))) == is_taken, text


@pytest.mark.parametrize(
    "name, head, end, tail",
    [
        ("glm", "<arg_key>a</arg_key><arg_value>", "</arg_value>", "</arg_value></tool_call>"),
        ("glm", "<arg_key>a</arg_key><arg_value>", "<arg_key>", "</arg_value></tool_call>"),
        ("gemma4", '{a:<|"|>', '<|"|>', '<|"|>}<tool_call|>'),
        ("gemma4", '{<|"|>', '<|"|>', '<|"|>:null}<tool_call|>'),
        ("functiongemma", "{a:<escape>", "<escape>", "<escape>}<end_function_call>"),
    ],
)
def test_a_bare_text_does_not_spell_its_own_end(name, head, end, tail):
    opening = CALLS[name][0].partition("f_1")[0] + "f_1"
    schema = {"type": "object"}
    assert takes(name, schema, opening + head, f"x{end[:-1]}y", tail)
    assert not takes(name, schema, opening + head, f"x{end}y", tail)


def test_another_property_has_the_name_of_no_property_in_any_alternative():
    first = an_object("a", a={"type": "null"}, x={"type": "integer"})
    second = {**an_object("b", b={"type": "null"}), "additionalProperties": STRING}
    either = {"anyOf": [first, second]}
    for name, is_taken in (("y", True), ("x", False), ("b", False)):
        pair = f"<arg_key>{name}</arg_key><arg_value>5</arg_value>"
        call = f"<tool_call>f_1<arg_key>b</arg_key><arg_value>null</arg_value>{pair}</tool_call>"
        assert takes("glm", either, call) == is_taken
    schema = {**an_object(a={"type": "boolean"}), "additionalProperties": {"type": "integer"}}
    for key, is_taken in (("b", True), ("a", False), ('<|"|>b<|"|>', True), ('<|"|>a<|"|>', False)):
        call = f"<|tool_call>call:f_1{{{key}:5}}<tool_call|>"
        assert takes("gemma4", schema, call) == is_taken


@pytest.mark.parametrize("text, is_taken", [("abcd", True), ('"ab"', False), (' "ab', False)])
def test_where_all_kinds_are_allowed_glms_text_is_not_quoted(text, is_taken):
    kinds = [{"type": kind} for kind in ("number", "null", "boolean", "array", "object")]
    schema = an_object("a", a={"anyOf": [{"type": "string", "minLength": 4}, *kinds]})
    call = f"<tool_call>f_1<arg_key>a</arg_key><arg_value>{text}</arg_value></tool_call>"
    assert takes("glm", schema, call) == is_taken


@pytest.mark.parametrize(
    "rules", [{}, {"minimum": 0.5}, {"exclusiveMaximum": 10**14}, {"multipleOf": 0.5}]
)
def test_numbers_are_such_as_can_be_read(rules):
    schema = an_object("a", a={"type": "number", **rules})
    head, tail = "<|tool_call>call:f_1{a:", "}<tool_call|>"
    assert takes("gemma4", schema, f"{head}12.5{tail}")
    assert not takes("gemma4", schema, f"{head}{'9' * 400}.5{tail}")
    assert not takes("gemma4", schema, f"{head}9e999{tail}")


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("date", "2024-02-29", "2024-02-30"),
        ("time", "23:59:07.5+02:00", "24:00:00Z"),
        ("date-time", "2024-12-31T00:00:00Z", "2024-12-31 00:00:00Z"),
        ("uuid", "123e4567-e89b-12d3-A456-426614174000", "123e4567e89b12d3a456426614174000"),
        ("ipv4", "192.168.0.255", "192.168.0.256"),
        ("hostname", "a-b.example", "-a.example"),
        ("email", "a.b+c@example.org", "a.@example.org"),
        ("uri", "https://a.example/b?c=%20#d", "/b c"),
    ],
)
def test_formats_are_kept(name, good, bad):
    schema = an_object("a", a={"type": "string", "format": name})
    for family in ("glm", "gemma4"):
        around = CALLS[family][-1].replace("x y", "{}", 1).replace(",n:[1,2]", "")
        around = around.replace("<arg_key>n</arg_key><arg_value>[1, 2]</arg_value>", "")
        head, _, tail = around.partition("{}")
        assert takes(family, schema, head + good + tail), family
        assert not takes(family, schema, head + bad + tail)


@pytest.mark.parametrize(
    "pattern, good, bad",
    [
        ("b", "abc", "ac"),
        ("^a|b$", "ax", "xa"),
        ("^a|b$", "xb", "bx"),
        ("^(a|b)$", "b", "bb"),
        ("^$", "", "a"),
        (r"[|^$/]\$", "x/$y", "x/"),
        (r"^\d+$", "12", "\u0661"),
        ("^[^]|]$", "a", "|"),
    ],
)
def test_patterns_are_found_anywhere_but_for_their_edges(pattern, good, bad):
    schema = an_object("a", a={"type": "string", "pattern": pattern})
    for text in (good, bad):
        call = f"<tool_call>f_1<arg_key>a</arg_key><arg_value>{text}</arg_value></tool_call>"
        assert takes("glm", schema, call) == (text == good)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    "keyword, schema",
    [
        ("uniqueItems", {"type": "array", "uniqueItems": True}),
        ("contains", {"type": "array", "contains": STRING}),
        ("minItems", {"type": "array", "items": False, "minItems": 1}),
        ("patternProperties", {"type": "object", "patternProperties": {"a": STRING}}),
        ("minProperties", {"type": "object", "minProperties": 1}),
        ("maxProperties", {"type": "object", "maxProperties": 1}),
        ("not", {"not": STRING}),
        ("if", {"if": STRING, "then": STRING}),
        ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
        ("allOf", {"allOf": [{"pattern": "a"}, {"pattern": "b"}], "type": "string"}),
        ("enum", {"enum": ["a", "bb"], "maxLength": 1}),
        ("pattern", {"type": "string", "pattern": "(a$)"}),
        ("pattern", {"type": "string", "pattern": "(?=a)"}),
        ("maxLength", {"type": "string", "minLength": 3, "maxLength": 2}),
        ("format", {"type": "string", "format": "ipv6"}),
        ("type", {"type": "text"}),
        ("minimum", {"type": "integer", "minimum": "1"}),
        ("$ref", {"$ref": "#/nowhere"}),
        ("$ref", {"$ref": "#/properties/x"}),
        ("nothing satisfies", {"enum": []}),
        ("surrogate", {"const": "\ud800"}),
    ],
)
def test_what_cannot_be_kept_is_an_error_that_names_it(name, keyword, schema):
    with pytest.raises(UsageError, match=re.escape(keyword)) as caught:
        masker_of(tokenizer_of(name), grammar_of([tool(an_object("x", x=schema))]))
    assert "'f_1'" in str(caught.value)


@pytest.mark.parametrize(
    "schema, said",
    [
        (an_object("x", x={"enum": ["5", 5]}), "'5'"),
        (an_object("x", x={"enum": ["a</arg_value>"]}), "cannot be written"),
        (an_object("x<y", **{"x<y": STRING}), "'x<y'"),
        (an_object(" x", **{" x": STRING}), "' x'"),
        ({"enum": [{}]}, "enum"),
    ],
)
def test_what_glm_would_misread_is_an_error(schema, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        masker_of(tokenizer_of("glm"), grammar_of([tool(schema)]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tool_without_an_object_of_arguments_or_a_plain_name_is_an_error(name):
    for bad in (tool({"type": "string"}), tool({}, "a b")):
        with pytest.raises(UsageError, match="cannot be required"):
            masker_of(tokenizer_of(name), grammar_of([bad]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_model_without_the_markers_cannot_be_made_to_call(name):
    template = ChatTemplate("{# " + TEMPLATES[name] + " #}")
    bare = TOKENIZERS["gemma"]
    tokenizer = Tokenizer(
        bare._backend,
        special_tokens={},
        eos_token_ids=bare.eos_token_ids,
        n_vocab=bare.n_vocab,
        chat_template=template,
    )
    with pytest.raises(UsageError, match="is no token of this model"):
        masker_of(tokenizer, grammar_of([tool({})]))
