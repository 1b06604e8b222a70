"""Reading a model's output: content, reasoning and tool calls, wherever the stream is cut."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxkv.chat.chat_template import ChatTemplate
from mlxkv.parsers.events import Content, Event, Markup, Reasoning, ToolCall
from mlxkv.parsers.formats import format_of, make_parser, parser_for
from mlxkv.parsers.syntaxes import SYNTAXES
from tests.support.chat_templates.cases import HELLO, NESTED_CALL, NESTED_TOOLS, TEMPLATES

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "text": {"type": "string"},
                    "mode": {"type": "integer"},
                    "options": {"type": "object"},
                },
            },
        },
    },
    {"name": "now", "parameters": {}},
]
# What breaks careless parsers: quotes, brackets, line breaks, markers inside a string.
HARD = "say \"hi\" \\ {[<b>]} \n\tä \u2013 日本 🙂 'x', </tool_call> <tool_call|> <|call|> ```"
# The same for notations that escape nothing and whose markers are tokens of their own.
RAW = "say \"hi\" \\ {[<b>]} \n\tä \u2013 日本 🙂 'x', call:f{a:1}"
NESTED = {"path": "a b.txt", "options": {"deep": [1, [2.5, None, {"x": [True, ""]}], -3]}}


def run(name: str, pieces: Iterable[str], **options: Any) -> list[Event]:
    parser = make_parser(name, **{"tools": TOOLS, **options})
    events = [event for piece in pieces for event in parser.add(piece)]
    return merged([*events, *parser.finish()])


def merged(events: Sequence[Event]) -> list[Event]:
    """Events with neighbours of one kind joined: what does not depend on where a text is cut."""
    joined: list[Event] = []
    for event in events:
        if isinstance(event, ToolCall) or not joined or type(event) is not type(joined[-1]):
            joined.append(event)
        else:
            joined[-1] = type(event)(joined[-1].text + event.text)
    return joined


def shown(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    """The events without what differs from run to run (ids), and without markup."""
    rows: list[tuple[Any, ...]] = []
    for event in events:
        match event:
            case Content(text):
                rows.append(("content", text))
            case Reasoning(text):
                rows.append(("reasoning", text))
            case ToolCall(name=name, arguments=arguments, error=None):
                rows.append(("call", name, dict(arguments)))
            case ToolCall(name=name, error=error):
                rows.append(("broken", name, error))
    # Markup between two stretches of one kind does not separate them for a reader.
    return rows


def spans(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    """All of it, but for ids."""
    return [
        (type(e), e.text, *([e.name, e.arguments, e.error] if isinstance(e, ToolCall) else []))
        for e in events
    ]


def call(name: str, arguments: Any) -> str:
    """JSON of a call."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def gemma(value: Any) -> str:
    """A value in Gemma 4's notation."""
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            return "{" + ",".join(f"{key}:{gemma(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ",".join(map(gemma, value)) + "]"
    return json.dumps(value)


def glm(name: str, arguments: dict[str, Any], gap: str = "\n") -> str:
    """A call in GLM-4.5's notation."""
    pairs = "".join(
        f"<arg_key>{key}</arg_key>{gap}<arg_value>"
        f"{value if isinstance(value, str) else json.dumps(value)}</arg_value>{gap}"
        for key, value in arguments.items()
    )
    return f"<tool_call>{name}{gap}{pairs}</tool_call>"


def gemma4_call(name: str, arguments: dict[str, Any]) -> str:
    return f"<|tool_call>call:{name}{gemma(arguments)}<tool_call|>"


H = "<|start|>assistant"
TEXT = ("content", "The answer.")
THOUGHT = ("reasoning", "let me\n\nsee")
HARD_CALL = ("call", "write", {"path": HARD})
RAW_CALL = ("call", "write", {"path": RAW})
NESTED_ROW = ("call", "write", NESTED)
NOW = ("call", "now", {})

# format, output, what it is
CASES: dict[str, tuple[str, str, list[tuple[Any, ...]]]] = {
    "plain": ("plain", " <think>\n", [("content", " <think>\n")]),
    "think": ("think", "<think>\nlet me\n\nsee\n</think>\n\nThe answer.", [THOUGHT, TEXT]),
    "think, empty": ("think", "<think>\n\n</think>\n\nThe answer.", [TEXT]),
    "think, not needed": ("think", "The answer.", [TEXT]),
    "think, twice": (
        "think",
        "<think>a</think>b<think>c</think>d",
        [("reasoning", "a"), ("content", "b"), ("reasoning", "c"), ("content", "d")],
    ),
    "think, a call in it": (
        "hermes",
        "<think>I could <tool_call>{} it</think>The answer.",
        [("reasoning", "I could <tool_call>{} it"), TEXT],
    ),
    "hermes": (
        "hermes",
        f"The answer.\n<tool_call>\n{call('write', {'path': HARD})}\n</tool_call>",
        [TEXT, HARD_CALL],
    ),
    "hermes, two": (
        "hermes",
        f"<think>let me\n\nsee</think><tool_call>{call('write', NESTED)}</tool_call>\n"
        f"<tool_call>{call('now', {})}</tool_call>\nThe answer.",
        [THOUGHT, NESTED_ROW, NOW, TEXT],
    ),
    "hermes, a list": (
        "hermes",
        f"<tool_call>[{call('now', {})}, {call('write', NESTED)}]</tool_call>",
        [NOW, NESTED_ROW],
    ),
    "hermes, arguments as text": (
        "hermes",
        f"<tool_call>{call('write', json.dumps(NESTED))}</tool_call>",
        [NESTED_ROW],
    ),
    "hermes, no arguments": ("hermes", '<tool_call>{"name": "now"}</tool_call>', [NOW]),
    "glm": (
        "glm",
        "\n<think>let me\n\nsee</think>\nThe answer.\n" + glm("write", NESTED),
        [THOUGHT, TEXT, NESTED_ROW],
    ),
    "glm, lines and quotes": ("glm", glm("write", {"path": HARD}), [HARD_CALL]),
    "glm, no line breaks": (
        "glm",
        glm("write", NESTED, "") + glm("now", {}, ""),
        [NESTED_ROW, NOW],
    ),
    "glm, the schema says text": (
        "glm",
        glm("write", {"text": "42", "mode": 42, "other": 4.5, "free": "4 5"}),
        [("call", "write", {"text": "42", "mode": 42, "other": 4.5, "free": "4 5"})],
    ),
    "glm, end of a value in a value": (
        "glm",
        glm("write", {"text": "a</arg_value>b<arg_key>c</tool_call>", "mode": 1}),
        [("call", "write", {"text": "a</arg_value>b<arg_key>c</tool_call>", "mode": 1})],
    ),
    "glm, json": ("glm", f"<tool_call>{call('write', NESTED)}</tool_call>", [NESTED_ROW]),
    "glm4": ("glm4", f"write\n{json.dumps({'path': HARD})}", [HARD_CALL]),
    "glm4, thinking": (
        "glm4",
        f"<think>let me\n\nsee</think>\nwrite\n{json.dumps(NESTED)}",
        [THOUGHT, NESTED_ROW],
    ),
    "glm4, text": ("glm4", "write\nto me soon", [("content", "write\nto me soon")]),
    "glm4, an unknown name": ("glm4", "f\n{}", [("content", "f\n{}")]),
    "gemma4": (
        "gemma4",
        "<|channel>thought\nlet me\n\nsee\n<channel|>The answer."
        + gemma4_call("write", {"path": RAW}),
        [THOUGHT, TEXT, RAW_CALL],
    ),
    "gemma4, nested": (
        "gemma4",
        gemma4_call("write", NESTED) + gemma4_call("now", {}),
        [NESTED_ROW, NOW],
    ),
    "gemma4, markers in a string": (
        "gemma4",
        gemma4_call("write", {"path": "a<tool_call|>b}<channel|>"}),
        [("call", "write", {"path": "a<tool_call|>b}<channel|>"})],
    ),
    "gemma4, spaces and JSON strings": (
        "gemma4",
        '<|tool_call>call:write{ "path" : "a\\"}b" , mode: 7, text: free words }<tool_call|>',
        [("call", "write", {"path": 'a"}b', "mode": 7, "text": "free words"})],
    ),
    "gemma4, no label": (
        "gemma4",
        "<|channel>So, x<channel|>y",
        [
            ("reasoning", "So, x"),
            ("content", "y"),
        ],
    ),
    "gemma4, nothing thought": ("gemma4", "<|channel>thought\n<channel|>The answer.", [TEXT]),
    "functiongemma": (
        "functiongemma",
        "<start_function_call>call:write{path:<escape>a, {b}\n<escape>,mode:1}<end_function_call>",
        [("call", "write", {"path": "a, {b}\n", "mode": 1})],
    ),
    "gemma3, tool_code": (
        "gemma3",
        f"The answer.\n```tool_code\n[write(path={HARD!r}), now()]\n```\n",
        [TEXT, HARD_CALL, NOW],
    ),
    "gemma3, json": (
        "gemma3",
        "```json\n" + call("write", NESTED).replace("arguments", "parameters") + "\n```",
        [NESTED_ROW],
    ),
    "gemma3, bare": ("gemma3", f'[write("a b.txt", options={NESTED["options"]})]', [NESTED_ROW]),
    "gemma3, code that is none": (
        "gemma3",
        "Look:\n```python\nprint(1)\n```\nand\n```json\n{}\n```\nand ```\nx``` .",
        [("content", "Look:\n```python\nprint(1)\n```\nand\n```json\n{}\n```\nand ```\nx``` .")],
    ),
    "gemma3, another function": ("gemma3", "[f()] is", [("content", "[f()] is")]),
    "mistral": (
        "mistral",
        f"[THINK]let me\n\nsee[/THINK]The answer.[TOOL_CALLS] [{call('write', {'path': HARD})}]",
        [THOUGHT, TEXT, HARD_CALL],
    ),
    "mistral, named": (
        "mistral",
        f"[TOOL_CALLS]write[ARGS]{json.dumps(NESTED)}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{{}}",
        [NESTED_ROW, NOW],
    ),
    "mistral, in a row": (
        "mistral",
        f"[TOOL_CALLS]write{json.dumps({'path': '[TOOL_CALLS]'})}now{{}}",
        [("call", "write", {"path": "[TOOL_CALLS]"}), NOW],
    ),
    "llama3": (
        "llama3",
        call("write", {"path": HARD}).replace("arguments", "parameters"),
        [HARD_CALL],
    ),
    "llama3, two": (
        "llama3",
        f'{call("write", NESTED)}; {{"name": "now", "parameters": {{}}}}<|eom_id|>',
        [NESTED_ROW, NOW],
    ),
    "llama3, python tag": (
        "llama3",
        '<|python_tag|>brave_search.call(query="a \\"b\\"")<|eom_id|>',
        [("call", "brave_search", {"query": 'a "b"'})],
    ),
    "llama3, json that is no call": ("llama3", '{"a": 1}', [("content", '{"a": 1}')]),
    "llama3, a name that is no tool": (
        "llama3",
        '{"name": "Eve"}',
        [("content", '{"name": "Eve"}')],
    ),
    "harmony": (
        "harmony",
        f"<|channel|>analysis<|message|>let me\n\nsee<|end|>{H}<|channel|>final<|message|>"
        "The answer.<|return|>",
        [THOUGHT, TEXT],
    ),
    "harmony, a call": (
        "harmony",
        f"<|channel|>analysis<|message|>let me\n\nsee<|end|>{H}<|channel|>commentary"
        f" to=functions.write <|constrain|>json<|message|>{json.dumps({'path': HARD})}<|call|>",
        [THOUGHT, HARD_CALL],
    ),
    "harmony, recipient of the role": (
        "harmony",
        f" to=functions.write<|channel|>commentary json<|message|>{json.dumps(NESTED)}<|call|>",
        [NESTED_ROW],
    ),
    "harmony, a call in the analysis": (
        "harmony",
        f"<|channel|>analysis to=functions.write code<|message|>{json.dumps(NESTED)}<|call|>",
        [NESTED_ROW],
    ),
    "harmony, a call in the final": (
        "harmony",
        "<|channel|>final to=functions.now <|constrain|>json<|message|>{}<|call|>",
        [NOW],
    ),
    "harmony, no channel but a recipient": (
        "harmony",
        "<|channel|> to=functions.now<|message|>{}<|call|>",
        [NOW],
    ),
    "harmony, words before a call": (
        "harmony",
        f"<|channel|>commentary<|message|>The answer.<|end|>{H}<|channel|>commentary "
        "to=functions.now<|message|>{}<|call|>",
        [TEXT, NOW],
    ),
    "harmony, lost text": (
        "harmony",
        f"<|channel|>analysis<|message|>let me\n\nsee<|end|>\nThe answer.{H}<|channel|>final"
        "<|message|>More.",
        [THOUGHT, TEXT, ("content", "More.")],
    ),
    "harmony, no header": ("harmony", "The answer.", [TEXT]),
}


@pytest.mark.parametrize("case", CASES)
def test_an_output_is_read(case: str):
    name, text, wanted = CASES[case]
    assert shown(run(name, [text])) == wanted


@pytest.mark.parametrize("case", CASES)
def test_every_character_is_accounted_for(case: str):
    name, text, _ = CASES[case]
    for stop in range(len(text) + 1):  # cut off anywhere as well
        assert "".join(event.text for event in run(name, [text[:stop]])) == text[:stop]


@pytest.mark.parametrize("case", CASES)
def test_it_makes_no_difference_where_an_output_is_cut(case: str):
    name, text, _ = CASES[case]
    whole = spans(run(name, [text]))
    assert spans(run(name, text)) == whole, "one character at a time"
    for at in range(1, len(text)):
        assert spans(run(name, [text[:at], text[at:]])) == whole, text[:at]


PARTS = st.sampled_from(
    sorted(
        {
            *(marker for syntax in SYNTAXES.values() for marker in syntax.markers),
            *(marker for marker in make_parser("harmony").markers),
            *'{}[]"\\,: \n<|>`', '<|"|>', "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
            "<function=write>", "<parameter=path>", "<parameter=z>", "</parameter>", "</function>",
            "'", "=", "True", "(", "write", "now", "call:", "name", "thought", "analysis", "final",
            "to=functions.now", '{"name": "now"}', "tool_code", "json", "assistant", "x", "日",
            "()",
        }
    )
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["harmony", *SYNTAXES]),
    parts=st.lists(PARTS, max_size=24),
    size=st.integers(1, 7),
)
def test_nothing_a_model_writes_is_lost_or_depends_on_the_cuts(name, parts, size):
    text = "".join(parts)
    whole = run(name, [text])
    assert "".join(event.text for event in whole) == text
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert spans(run(name, pieces)) == spans(whole)
    json.dumps([event.arguments for event in whole if isinstance(event, ToolCall)], allow_nan=False)


@pytest.mark.parametrize(
    "schema, text, value",
    [
        ({"type": "string"}, "null", "null"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, '"5"', '"5"'),
        ({"$ref": "#/$defs/text"}, "5", "5"),
        ({"enum": ["5", "6"]}, "5", "5"),
        ({"enum": ["5", "6", None]}, "null", None),
        ({"type": "array"}, "[1]", [1]),
        ({}, '"5"', "5"),
    ],
)
def test_glms_values_are_read_as_the_schema_of_the_tool_says(schema, text, value):
    parameters = {"properties": {"k": schema}, "$defs": {"text": {"type": "string"}}}
    tools = [{"name": "f", "parameters": parameters}]
    written = f"<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    assert shown(run("glm", [written], tools=tools)) == [("call", "f", {"k": value})]


CALLS = ["hermes", "glm", "glm, lines and quotes", "gemma4", "harmony, a call", "mistral",
         "gemma3, tool_code", "llama3", "glm4", "functiongemma"]  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_is_cut_off_is_flagged_and_never_sound(case: str):
    name, text, wanted = CASES[case]
    sound = [row for row in wanted if row[0] == "call"]
    flagged = 0
    for stop in range(len(text)):
        if text[:stop].rstrip().endswith("</tool_call>"):
            continue  # as a call that lacks a closing tag
        rows = shown(run(name, [text[:stop]]))
        calls = [row for row in rows if row[0] == "call"]
        assert calls == sound[: len(calls)], text[:stop]
        broken = [row for row in rows if row[0] == "broken"]
        assert len(broken) <= 1
        # Or a marker in a string of it seemed to be its end.
        assert all("cut off" in row[2] for row in broken) or "日本" in text
        flagged += len(broken)
    assert flagged, "the name is known before the end"


@pytest.mark.parametrize(
    ("name", "text", "function"),
    [
        ("hermes", '<tool_call>{"name": "write", "arguments": {"path": }}</tool_call>', "write"),
        ("hermes", '<tool_call>{"name": "write", "arguments": [1]}</tool_call>', "write"),
        ("hermes", '<tool_call>{"name": "write", "arguments": {"n": NaN}}</tool_call>', "write"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b}}</tool_call> more', "f"),
        ("glm", "<tool_call>write\n<arg_key>path</arg_key>a.txt</tool_call>", "write"),
        ("gemma4", "<|tool_call>call:write{path:}<tool_call|>", "write"),
        ("gemma4", "<|tool_call>call:write{path<tool_call|>", "write"),
        ("gemma4", "<|tool_call>call:write" + "{a:" * 3000 + "<tool_call|>", "write"),
        ("mistral", '[TOOL_CALLS]write[ARGS]{"path": }', "write"),
        ("harmony", "<|channel|>commentary to=functions.write<|message|>path=a<|call|>", "write"),
        ("harmony", '<|channel|>commentary to=f<|message|>["a"]<|call|>', "f"),
        ("hermes", '<tool_call>{"name": "f", "x": ' + "[" * 100_000 + "</tool_call>", "f"),
    ],
)
def test_malformed_arguments_are_kept_as_text_and_flagged(name: str, text: str, function: str):
    calls = [event for event in run(name, [text]) if isinstance(event, ToolCall)]
    assert len(calls) == 1
    assert (calls[0].name, dict(calls[0].arguments)) == (function, {})
    assert calls[0].error
    assert "\n" not in calls[0].error
    assert text.startswith(calls[0].text)


def test_what_follows_a_call_whose_string_never_ends_is_content():
    text = '<tool_call>{"name": "f", "arguments": {"a": "b}}</tool_call> more <think>x</think>y'
    rows = shown(run("hermes", text))
    assert rows[0][:2] == ("broken", "f")
    assert rows[1:] == [("content", "more"), ("reasoning", "x"), ("content", "y")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("think", "a </think> b < think> <thin"),
        ("hermes", "wrap it in <tool_call> tags, or <tool_call></tool_call>"),
        ("hermes", "<tool_call>{}</tool_call>"),
        ("hermes", '<tool_call>{"nam'),
        ("glm", "use <tool_call> with <arg_key>, <tool_call><arg_key>"),
        ("gemma4", "use <|tool_call> and <tool_call|>, then <|tool_cal"),
        ("gemma3", "``` is a fence"),
        ("mistral", "[TOOL_CALLS] are what Mistral writes; [INST] too"),
        ("llama3", "{ is a brace"),
        ("glm4", "write to me"),
        ("harmony", "I start with no header <|message|>"),
    ],
)
def test_what_merely_looks_like_a_marker_is_content(name: str, text: str):
    assert shown(run(name, [text])) == [("content", text)]
    assert shown(run(name, text)) == [("content", text)]


@pytest.mark.parametrize("name", ["llama3", "gemma3", "glm4"])
def test_without_tools_nothing_bare_is_a_call(name: str):
    for text in ('{"name": "now", "parameters": {}}', "[now()]", "now\n{}", "```json\n{}\n```"):
        assert shown(run(name, [text], tools=None)) == [("content", text)]
        parser = make_parser(name)
        assert shown(merged(parser.add(text[:-1]))) != [], "and it is not held back"


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("think", "<|im_start|>assistant\n<think>\n"),
        ("hermes", "<think>"),
        ("gemma4", "<|turn>model\n<|channel>thought\n"),
        ("harmony", f"<|start|>user<|message|>x<|end|>{H}<|channel|>analysis<|message|>"),
    ],
)  # fmt: skip
def test_reasoning_that_the_prompt_has_opened_goes_on_in_the_answer(name: str, prompt: str):
    closing = {"gemma4": "<channel|>", "harmony": f"<|end|>{H}<|channel|>final<|message|>"}
    text = f"let me\n\nsee\n{closing.get(name, '</think>')}\nThe answer."
    assert shown(run(name, [text], prompt=prompt)) == [THOUGHT, TEXT]


def test_a_question_that_holds_a_marker_opens_nothing():
    prompt = "<|im_start|>user\nwhat is <think><|im_end|>\n<|im_start|>assistant\n"
    assert shown(run("think", ["The answer."], prompt=prompt)) == [TEXT]
    prompt = "<|turn>model\n<|channel>thought\n<channel|>"
    assert shown(run("gemma4", ["The answer."], prompt=prompt)) == [TEXT]


def test_text_is_given_as_it_comes():
    parser = make_parser("hermes", prompt="<think>")
    texts = ("So", " it", " is.", "</thi", "nk>", "Ye", "s <", "b")
    assert [parser.add(text) for text in texts] == [
        [Reasoning("So")], [Reasoning(" it")], [Reasoning(" is.")], [], [Markup("</think>")],
        [Content("Ye")], [Content("s")], [Content(" <b")],
    ]  # fmt: skip


def test_a_marker_that_is_a_token_counts_only_as_that_token():
    ids = {7: "<tool_call>", 8: "</tool_call>"}
    parser = make_parser("hermes", ids=ids)
    events = parser.add("a <tool_call>", 1)
    events += parser.add('{"name": "now"}</tool_call> ', 2)
    events += parser.add("<tool_call>", 7)
    events += parser.add('{"name": "f", "arguments": {"a": "</tool_call>"}}', 1)
    events += parser.add("</tool_call>", 8)
    assert shown(merged(events)) == [
        ("content", 'a <tool_call>{"name": "now"}</tool_call>'),
        ("call", "f", {"a": "</tool_call>"}),
    ]


def test_a_marker_token_may_come_with_text_that_was_held_before_it():
    parser = make_parser("harmony", ids={1: "<|message|>", 2: "<|channel|>", 3: "<|end|>"})
    pieces = [("<|channel|>", 2), ("analysis", 9), ("<|message|>", 1), ("hm", 9), ("�<|end|>", 3)]
    events = [event for piece in pieces for event in parser.add(*piece)]
    assert shown(merged(events)) == [("reasoning", "hm�")]


def test_a_message_without_an_end_ends_where_the_next_begins():
    ids = {1: "<|message|>", 2: "<|channel|>", 3: "<|start|>"}
    parser = make_parser("harmony", ids=ids)
    pieces = [("<|channel|>", 2), ("analysis", 9), ("<|message|>", 1), ("hm", 9),
              ("<|channel|>", 2), ("final", 9), ("<|message|>", 1), ("x", 9)]  # fmt: skip
    events = [event for piece in pieces for event in parser.add(*piece)]
    assert shown(merged([*events, *parser.finish()])) == [("reasoning", "hm"), ("content", "x")]


def test_ids_are_the_models_or_nine_letters_and_digits():
    text = (
        '<tool_call>{"name": "now", "id": "abc"}</tool_call><tool_call>{"name": "now"}</tool_call>'
    )
    first, second = (event for event in run("hermes", [text]) if isinstance(event, ToolCall))
    assert first.id == "abc"
    assert len(second.id) == 9
    assert second.id.isalnum()


@pytest.mark.parametrize(
    ("name", "opening", "part", "closing"),
    [
        ("hermes", '<tool_call>{"name": "f", "x": "', "x</tool_call> ", '"}</tool_call>'),
        ("gemma4", '<|tool_call>call:f{a:<|"|>', "x ", '<|"|>}<tool_call|>'),
        ("glm", "<tool_call>f<arg_key>a</arg_key><arg_value>", "x ", "</arg_value></tool_call>"),
        ("think", "<think>", "< x ", "</think>"),
        ("hermes", "", "<tool_call>{", ""),
    ],
)  # fmt: skip
def test_a_long_output_takes_a_time_in_proportion(name, opening, part, closing):
    start = time.process_time()
    run(name, [opening, *[part] * 2000, closing])
    # 0.3 s where it was measured; a parser that looks at everything again with every piece and
    # in Python takes minutes.
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("template", "name"),
    [("harmony", "harmony"), ("gemma4", "gemma4"), ("glm_moe", "glm"), ("glm", "glm4"),
     ("tools", "hermes"), ("headers", "llama3")],
)  # fmt: skip
def test_what_a_models_template_writes_is_read_back(template: str, name: str):
    render = ChatTemplate(TEMPLATES[template].read_text()).render
    options: dict[str, Any] = {"tools": NESTED_TOOLS, "enable_thinking": True}
    prompt = render([HELLO], **options)
    whole = render([HELLO, NESTED_CALL], add_generation_prompt=False, **options)
    assert whole.startswith(prompt)
    source = ChatTemplate(TEMPLATES[template].read_text())
    assert format_of(SimpleNamespace(chat_template=source)) == name  # type: ignore[arg-type]
    events = run(name, whole[len(prompt) :], prompt=prompt, tools=NESTED_TOOLS)
    call = next(event for event in events if isinstance(event, ToolCall))
    made = NESTED_CALL["tool_calls"][0]["function"]
    assert (call.name, call.arguments, call.error) == (made["name"], made["arguments"], None)
    if template in ("harmony", "gemma4", "glm_moe"):
        assert ("reasoning", NESTED_CALL["reasoning_content"]) in shown(events)


def tokenizer(template: str | None, *tokens: str) -> Any:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return SimpleNamespace(
        chat_template=None if template is None else ChatTemplate(template),
        id_of=vocabulary.get,
        stream=lambda: SimpleNamespace(is_live=True),
    )


@pytest.mark.parametrize(
    ("template", "tokens", "name"),
    [
        (None, ("<think>", "</think>"), "plain"),
        ("{{ messages }}", (), "plain"),
        ("{{ messages }}", ("<think>", "</think>"), "think"),
        ("{{ messages }}", ("<|channel|>", "<|message|>", "<|call|>"), "harmony"),
        ("<|start|>assistant<|channel|>final<|message|>", (), "harmony"),
        ("<|tool_call>call:<tool_call|>", (), "gemma4"),
        ("<tool_call>{{ name }}<arg_key>", (), "glm"),
        ("[gMASK]<sop><|observation|>", (), "glm4"),
        ("<tool_call>", (), "hermes"),
        ('{{ \'<|start_header_id|>\' }}{\\"name\\": , \\"parameters\\": }', (), "llama3"),
        ("<start_of_turn>", (), "gemma3"),
        ("[INST] [TOOL_CALLS]", (), "mistral"),
    ],
)
def test_the_format_is_read_off_template_and_vocabulary(template, tokens, name):
    assert format_of(tokenizer(template, *tokens)) == name


def test_a_parser_for_a_model_knows_the_ids_of_its_markers():
    parser = parser_for(tokenizer("<think></think>", "<think>", "</think>"))
    events = parser.add("<think>", 5) + parser.add("<think>", 0) + parser.add("x", 5)
    assert shown(merged([*events, *parser.finish()])) == [
        ("content", "<think>"),
        ("reasoning", "x"),
    ]
