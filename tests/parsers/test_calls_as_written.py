"""Calls as models really write them: what has one reading is read, what has several is an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxkv.chat.chat_template import ChatTemplate
from mlxkv.parsers.events import Content, ToolCall
from mlxkv.parsers.formats import format_of, make_parser
from tests.parsers.test_formats import merged, run, shown, spans
from tests.support.chat_templates.cases import HELLO, NESTED_CALL, NESTED_TOOLS
from tests.support.paths import REAL_TEMPLATES, XML_TEMPLATE

PROPERTIES: dict[str, Any] = {
    "a": {"type": "string"},
    "b": {"type": "string"},
    "n": {"type": "integer"},
    "x": {"type": "number"},
    "ok": {"type": "boolean"},
    "l": {"type": "array", "items": {"type": "string"}},
    "o": {"type": "object", "properties": {"s": {"type": "string"}}},
    "m": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "p": {"type": "integer", "nullable": True},
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": PROPERTIES}}},
    {"type": "function", "function": {"name": "g", "parameters": {}}},
]
OF_A: dict[str, Any] = {"a": "x"}


def xml(pairs: str, end: str = "</function>\n</tool_call>") -> str:
    return f"<tool_call>\n<function=f>\n{pairs}{end}"


def par(key: str, value: str) -> str:
    return f"<parameter={key}>\n{value}\n</parameter>\n"


def glm(pairs: str, name: str = "f") -> str:
    return f"<tool_call>{name}{pairs}</tool_call>"


def arg(key: str, value: str) -> str:
    return f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"


def gem(body: str, head: str = "call:f") -> str:
    return f"<|tool_call>{head}{body}<tool_call|>"


def her(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def fun(arguments: str, rest: str = "}") -> str:
    return f'{{"name": "f", "arguments": {arguments}{rest}'


DOCUMENT = "Write:\n" + xml(par("a", "v")) + "\nthat is all"
# Arguments, or None for a call with an error.
XML: list[tuple[str, dict[str, Any] | None]] = [
    (xml(""), {}),
    (xml(par("a", "ls -l") + par("n", "3") + par("x", "2.5")), {"a": "ls -l", "n": 3, "x": 2.5}),
    (
        xml(par("a", "12") + par("b", "null") + par("m", "null")),
        {"a": "12", "b": "null", "m": None},
    ),
    (
        xml(par("ok", "True") + par("m", "None") + par("p", "None")),
        {"ok": True, "m": None, "p": None},
    ),
    (xml(par("ok", "FALSE")), {"ok": False}),
    (xml(par("a", "  x\n\n\ty\n")), {"a": "  x\n\n\ty\n"}),
    (xml(par("a", "")), {"a": ""}),
    (xml(par("l", "['it', \"b\"]") + par("o", '{"s": "é"}')), {"l": ["it", "b"], "o": {"s": "é"}}),
    (xml(par("l", '["a",]')), {"l": ["a"]}),
    (xml(par("l", '"[\\"a\\"]"')), {"l": ["a"]}),
    (xml(par("n", "3.0")), {"n": 3}),
    (xml("<parameter=a>/tmp/x</parameter><parameter=n>4</parameter>"), {"a": "/tmp/x", "n": 4}),
    (xml('<parameter="a">\nx\n</parameter>\n'), OF_A),
    (xml('{"a": "x"}\n'), OF_A),
    ('<tool_call>{"name": "f", "arguments": {"a": "x"}}</tool_call>', OF_A),
    (xml(par("a", "<b>x</b> </parameter> & y")), {"a": "<b>x</b> </parameter> & y"}),
    (xml(par("a", "q </tool_call> r </function> s")), {"a": "q </tool_call> r </function> s"}),
    (xml(par("a", DOCUMENT)), {"a": DOCUMENT}),
    (xml(par("a", "use <parameter=zz> tags")), {"a": "use <parameter=zz> tags"}),
    (xml("<parameter=a>\nDallas\n" + par("b", "TX")), {"a": "Dallas", "b": "TX"}),
    (xml("<parameter=a>\nDallas\n<parameter=b>\nTX\n"), {"a": "Dallas", "b": "TX"}),
    (xml(par("a", "x"), "</tool_call>"), OF_A),
    (xml("<parameter=a>\nx\n", "</tool_call>"), OF_A),
    (xml(par("a", "x"), "</function>"), OF_A),
    (xml(par("a", "x")) + "\n</tool_call>", OF_A),
    (xml(par("zz", "5")), {"zz": 5}),
    (xml("<parameter=a\nx\n</parameter>\n"), OF_A),
    (xml(par("a", "use <parameter=b> tags")), None),
    (xml(par("a", "x\n</parameter>\nb>\ny")), None),
    (xml("<parameter=a>\nx\n</parameter\n"), None),
    (xml("<parameter=a>>\nx\n</parameter>\n"), None),
    (xml(par("a", "x") + par("a", "y")), None),
    (xml(par("n", "three")), None),
    (xml(par("ok", "maybe")), None),
    (xml(par("l", "a, b")), None),
    (xml(par("a", "x"), ""), None),
    (xml("<parameter=a>\nx", ""), None),
]
GLM: list[tuple[str, dict[str, Any] | None]] = [
    (glm(arg("a", "x") + arg("n", "3") + arg("ok", "True")), {"a": "x", "n": 3, "ok": True}),
    (glm(arg("l", "['a', None]") + arg("m", "None")), {"l": ["a", None], "m": None}),
    (glm(arg("a", "None") + arg("o", "{'s': 'x'}")), {"a": "None", "o": {"s": "x"}}),
    (glm("<arg_key>a</arg_key><arg_value>x" + arg("b", "y")), {"a": "x", "b": "y"}),
    ("<tool_call>f<arg_key>a</arg_key><arg_value>x</tool_call>", OF_A),
    ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x\n</tool_call>", OF_A),
    (glm("<arg_key>a</arg_key>x</arg_value>"), OF_A),
    (glm("<arg_key>a</arg_key>x</arg_value>" + arg("n", "2")), {"a": "x", "n": 2}),
    (glm("<arg_key>a<arg_value>x</arg_value>"), OF_A),
    (glm("<arg_key>a</arg_key></arg_key><arg_value>x</arg_value>"), OF_A),
    (glm("<arg_key><arg_key>a</arg_key><arg_value>x</arg_value>"), OF_A),
    (glm("a</arg_key><arg_value>x</arg_value>"), OF_A),
    (glm(arg("a", "use </tool_call> now") + arg("n", "1")), {"a": "use </tool_call> now", "n": 1}),
    (glm(arg("a", f"q {arg('b', 'v')} r")), {"a": f"q {arg('b', 'v')} r"}),
    (glm(arg("a", "x")) + "</tool_call>", OF_A),
    (glm("<arg_key>a</arg_key>x"), None),
    (glm("<arg_key>a</arg_key><arg_value>1<arg_key>a</arg_key><arg_value>2</arg_value>"), None),
    (glm(arg("a", "x") + "</arg_value>"), None),
    (glm(arg("a", "x") + "b</arg_key><arg_value>y</arg_value>"), None),
    (glm(arg("a", "<arg_value>x")), None),
    (glm(arg("n", "x")), None),
    (glm(arg("o", "x")), None),
]
GEMMA: list[tuple[str, dict[str, Any] | None]] = [
    (gem("{l:['a','b,c']}"), {"l": ["a", "b,c"]}),
    (gem('{l:["a","b,c"]}'), {"l": ["a", "b,c"]}),
    (gem("{a:'x.pdf',o:{s:'q, }r'}}"), {"a": "x.pdf", "o": {"s": "q, }r"}}),
    (gem('{"a":"x","n":1}'), {"a": "x", "n": 1}),
    (gem("{'a':'it\\'s'}"), {"a": "it's"}),
    (gem("{l:['it's', 'b']}"), {"l": ["it's", "b"]}),
    (gem("{a:x.pdf,n:3}"), {"a": "x.pdf", "n": 3}),
    (gem("{a: Hello, world, n: 3}"), {"a": "Hello, world", "n": 3}),
    (gem("{a:https://x.y/z,n:3}"), {"a": "https://x.y/z", "n": 3}),
    (gem("{a:echo ${HOME} [1]}"), {"a": "echo ${HOME} [1]"}),
    (gem("{a:12345,o:{s:5}}"), {"a": "12345", "o": {"s": "5"}}),
    (gem("{a:true,ok:True,m:null}"), {"a": "true", "ok": True, "m": None}),
    (gem('{n:<|"|>5<|"|>,o:<|"|>{"s":"x"}<|"|>}'), {"n": 5, "o": {"s": "x"}}),
    (gem('{a:<|"|>say "hi", it\'s {x}<|"|>}'), {"a": 'say "hi", it\'s {x}'}),
    (gem('{a:<|"|>x}'), OF_A),
    (gem('{a:x<|"|>}'), OF_A),
    (gem("{a:'x<|\"|>}"), OF_A),
    (gem('{a:<|"|>x<|"|>n:2}'), {"a": "x", "n": 2}),
    (gem('{a:<|"|>x<|"|>'), OF_A),
    (gem('{l:[<|"|>x<|"|>}'), {"l": ["x"]}),
    (gem('{a:<|"|>x<|"|>}}'), OF_A),
    (gem("(a='x', n=2)"), {"a": "x", "n": 2}),
    (gem('{a=<|"|>x<|"|>}'), OF_A),
    (gem('{a:<|"|>x<|"|>}', "call:google:mcp:f"), OF_A),
    (gem('{a:<|"|>x<|"|>}', "f"), OF_A),
    (gem('{"name":"f","arguments":{"a":"x"}}', ""), OF_A),
    (gem('{a:<|"|>x<|"|>}') + "<tool_call|>", OF_A),
    ('<|tool_call>call:f{a:<|"|>x<|"|>}', OF_A),
    ('<|tool_call>call:f{a:<|"|>x<|"|>}<|tool_response>', OF_A),
    (gem(""), {}),
    (gem('{a:<|"|>x,n:1}'), None),
    (gem('{l:[<|"|>a, b]}'), None),
    (gem("{a:Note, zz: x}"), None),
    (gem("{a:'a','b'}"), None),
    (gem('{a:"x}'), None),
    (gem("{n:five}"), None),
    (gem('{l:[<|"|>x<|"|>,n:1}'), None),
    (gem('{l:[<|"|>x,<|"|>y<|"|>]}'), None),
    (gem('{a:<|"|>x,b:<|"|>y: z<|"|>}'), None),
    (gem('{b:<|"|><|"|>a:b<|"|>}'), None),
    (gem('{o:{s:<|"|>x<|"|>,n:1}'), None),
    (gem("{m:null,,n:1}"), None),
    (gem("{a:1,a:2}"), None),
]
HERMES: list[tuple[str, dict[str, Any] | None]] = [
    (her(fun('{"a": "x"}', "")), OF_A),
    (her(fun('{"a": "x"}', "}}")), OF_A),
    (her(fun('{"a": "x",}')), OF_A),
    (her(fun('{"a": "x\ny\tz"}')), {"a": "x\ny\tz"}),
    (her(fun('{"a": "\\d+\\."}')), {"a": "\\d+\\."}),
    (her(fun('{"a": "it\\\'s"}')), {"a": "it's"}),
    (her("{'name': 'f', 'arguments': {'a': 'x', 'ok': True, 'm': None}}"),
     {"a": "x", "ok": True, "m": None}),
    (her('{name: "f", arguments: {a: "x"}}'), OF_A),
    (her(fun("\"{'a': 'x'}\"")), OF_A),
    (her('{"name": "f", "a": "x"}'), OF_A),
    (her('{"name": "functions.f", "arguments": {"a": "x"}}'), OF_A),
    (her(fun('{"a": "has </tool_call> in it"}')), {"a": "has </tool_call> in it"}),
    (her(fun('{"n": "5"}')), {"n": "5"}),
    (her(fun('{"a": "x"}')) + "</tool_call>", OF_A),
    (her(fun('{"a": "x"}') + "\nplease"), OF_A),
    (her(fun('{"a": "C:\\new\\dir"}')), None),
    (her(fun('{"a": "say "hi" now"}')), None),
    (her(fun('{"a": "1", "a": "2"}')), None),
    (her('{"name": "f", "q": "x"}'), None),
    (her(fun('{"o": {"s": "x"}}, "a": "y"}')), None),
    (her(fun('{"o": {"s": "x", "a": "y"}')), None),
    (her(fun('{"l": [["x"]}')), None),
]  # fmt: skip
OTHERS: dict[str, list[tuple[str, dict[str, Any] | None]]] = {
    "mistral": [
        ('[TOOL_CALLS]f{"a": "x"}', OF_A),
        ("[TOOL_CALLS]f[ARGS]{'a': 'x'}", OF_A),
        ('[TOOL_CALLS][{"name": "f", "arguments": {"a": "x",}}]', OF_A),
        ('[TOOL_CALLS]f[ARGS]{"a": "x"', None),
    ],
    "llama3": [
        ("{'name': 'f', 'parameters': {'a': 'x'}}", OF_A),
        ('\n\n{"type": "function", "name": "f", "parameters": {"a": "x"}}', OF_A),
        ('{"name": "f", "parameters": {"a": "x"}', None),
    ],
    "functiongemma": [
        ("<start_function_call>call:f{a:'x'}<end_function_call>", OF_A),
        ("<start_function_call>call:f{a:<escape>x<escape>}<start_function_response>", OF_A),
    ],
    "glm4": [("f\n{'a': 'x'}", OF_A)],
}
CASES = [
    *[("qwen_xml", *case) for case in XML],
    *[("glm", *case) for case in GLM],
    *[("gemma4", *case) for case in GEMMA],
    *[("hermes", *case) for case in HERMES],
    *[(name, *case) for name, cases in OTHERS.items() for case in cases],
]


@pytest.mark.parametrize("name, text, arguments", CASES)
def test_one_reading_is_taken_and_several_are_an_error(name, text, arguments):
    events = run(name, [text], tools=TOOLS)
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert [call.name for call in calls] == ["f"]
    assert not any(isinstance(event, Content) for event in events)
    assert (None if calls[0].error else dict(calls[0].arguments)) == arguments
    assert not calls[0].error or not calls[0].arguments


@pytest.mark.parametrize("name, text", [case[:2] for case in CASES])
def test_where_it_is_cut_makes_no_difference_and_nothing_is_lost(name, text):
    whole = spans(run(name, [text], tools=TOOLS))
    assert "".join(event.text for event in run(name, [text], tools=TOOLS)) == text
    for at in range(1, len(text)):
        assert spans(run(name, [text[:at], text[at:]], tools=TOOLS)) == whole, text[:at]
    assert spans(run(name, text, tools=TOOLS)) == whole


A_CALL = fun('{"a": "x"}')
CALL = ("call", "f", OF_A)
G = ("call", "g", {})
ROWS: list[tuple[str, str, list[tuple[Any, ...]]]] = [
    # What stands before, between and behind calls.
    ("qwen_xml", f"Sure.\n\n{xml(par('a', 'x'))}\n\nDone.",
     [("content", "Sure."), CALL, ("content", "Done.")]),
    ("qwen_xml", xml(par("a", "x")) + "\n" + xml(par("a", "x")), [CALL, CALL]),
    ("qwen_xml", xml(par("a", "x"), "</function>\n") + xml(par("a", "x")), [CALL, CALL]),
    ("qwen_xml", xml(par("a", "x"), "</function>\n<function=g></function></tool_call>"), [CALL, G]),
    ("qwen_xml", xml(par("a", "x"), "</function>") + "\nDone", [CALL, ("content", "Done")]),
    # A forgotten opening marker.
    ("qwen_xml", f"Sure.\n\n<function=f>\n{par('a', 'x')}</function>\n</tool_call>",
     [("content", "Sure."), CALL]),
    ("qwen_xml", f"<function=zz>\n{par('a', 'x')}</function>",
     [("content", f"<function=zz>\n{par('a', 'x')}</function>")]),
    ("qwen_xml", "see <function=f> there", [("content", "see <function=f> there")]),
    ("glm", glm(arg("a", "x")) + "\n</tool_call>\nok", [CALL, ("content", "ok")]),
    ("glm", "<tool_call>f" + arg("a", "x") + glm("", "g"), [CALL, G]),
    ("glm", "<tool_call>f<arg_key>a</arg_key><arg_value>x</tool_call>\n" + glm("", "g"), [CALL, G]),
    ("glm", "<tool_call>f<arg_key>a</arg_key><arg_value>x</tool_call> and so on",
     [("broken", "f", "its end is missing"), ("content", "and so on")]),
    ("gemma4", '<|tool_call>call:f{a:<|"|>x<|"|>}<|tool_call>call:g{}<tool_call|>', [CALL, G]),
    ("gemma4", '<|tool_call>call:f{a:<|"|>x<|"|>}call:g{}<tool_call|>', [CALL, G]),
    ("gemma4", '<|tool_call>call:f{a:<|"|>x<|"|>} Now.', [CALL, ("content", "Now.")]),
    ("gemma4", '<|tool_call>call:f{a:<|"|>x<tool_call|> and so on',
     [("broken", "f", "a string does not end"), ("content", "and so on")]),
    ("hermes", "<tool_call>" + A_CALL + '\n<tool_call>{"name": "g"}</tool_call>', [CALL, G]),
    ("hermes", "<tool_call>" + A_CALL + "\nThen.", [CALL, ("content", "Then.")]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": "x"}\n\nLet me see.', [CALL, ("content", "Let me see.")]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": "x"}}]o', [CALL, ("content", "o")]),
    ("llama3", '{"name": "f", "parameters": {"a": "x"}}\nDone.', [CALL, ("content", "Done.")]),
    # Calls in reasoning: only where it does not end, or nothing comes behind it.
    ("qwen_xml", "<think>hm\n" + xml(par("a", "x")), [("reasoning", "hm"), CALL]),
    ("qwen_xml", f"<think>hm\n{xml(par('a', 'x'))}</think>\n", [("reasoning", "hm"), CALL]),
    ("gemma4", "<|channel>thought\nhm" + gem("{a:x}"), [("reasoning", "hm"), CALL]),
    ("mistral", '[THINK]hm[TOOL_CALLS]f[ARGS]{"a": "x"}', [("reasoning", "hm"), CALL]),
    ("hermes", "<think>" + her(A_CALL) + " is it</think>ok",
     [("reasoning", her(A_CALL) + " is it"), ("content", "ok")]),
    ("hermes", "<think>" + her(A_CALL) + "</think>" + her('{"name": "g"}'),
     [("reasoning", her(A_CALL)), G]),
    ("hermes", "<think>" + her(A_CALL) + " or", [("reasoning", her(A_CALL) + " or")]),
    ("hermes", "<think>" + her('{"name": "zz"}'), [("reasoning", her('{"name": "zz"}'))]),
    ("hermes", "<think>use <tool_call> here", [("reasoning", "use <tool_call> here")]),
    # White space.
    ("hermes", "    indented\n  code\n", [("content", "    indented\n  code\n")]),
    ("think", "\n\n  x", [("content", "\n\n  x")]),
    ("think", "<think>a</think>\n\n    code", [("reasoning", "a"), ("content", "    code")]),
    ("glm", "\n<think>a</think>\nb", [("reasoning", "a"), ("content", "b")]),
    ("gemma3", "  hi", [("content", "  hi")]),
    ("harmony", "<|channel|>final<|message|>    code", [("content", "    code")]),
]  # fmt: skip


@pytest.mark.parametrize("name, text, rows", ROWS)
def test_what_is_around_calls_is_kept_apart(name, text, rows):
    assert shown(run(name, [text], tools=TOOLS)) == rows
    whole = spans(run(name, [text], tools=TOOLS))
    assert "".join(event.text for event in run(name, [text], tools=TOOLS)) == text
    for size in (1, 2, 3, 7):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert spans(run(name, pieces, tools=TOOLS)) == whole


def token_events(name: str, text: str, *markers: str, prompt: str | None = None) -> list[Any]:
    """Of an output in which these markers are tokens, and all else is written letter by letter."""
    ids = dict(enumerate(markers, 1))
    parser = make_parser(name, ids=ids, prompt=prompt, tools=TOOLS)

    def pieces() -> Iterator[tuple[str, int]]:
        at = 0
        while at < len(text):
            token = next((i for i, m in ids.items() if text.startswith(m, at)), 0)
            piece = ids.get(token, text[at])
            yield piece, token
            at += len(piece)

    events = [event for piece, token in pieces() for event in parser.add(piece, token)]
    return shown(merged([*events, *parser.finish()]))


def test_a_call_by_its_own_token_ends_reasoning_that_does_not_end():
    tokens = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    call = xml(par("a", "x"))
    rows = [("reasoning", "hm"), CALL]
    assert token_events("qwen_xml", f"hm\n{call}", *tokens, prompt="<think>\n") == rows
    more = [*rows, ("content", "and")]
    assert token_events("qwen_xml", f"hm\n{call}\nand", *tokens, prompt="<think>\n") == more
    unknown = call.replace("=f>", "=zz>")
    assert token_events("qwen_xml", f"hm\n{unknown}", *tokens, prompt="<think>\n")[1][:2] == (
        "call",
        "zz",
    )
    cut = xml(par("a", "x"), "")
    assert token_events("qwen_xml", f"hm\n{cut}", *tokens, prompt="<think>\n")[1][:2] == (
        "broken",
        "f",
    )


def test_a_token_in_a_string_does_not_end_the_call():
    tokens = ("<tool_call>", "</tool_call>")
    text = her(fun('{"a": "</tool_call>"}'))
    assert token_events("hermes", text, *tokens) == [("call", "f", {"a": "</tool_call>"})]


def test_a_spare_closing_token_is_markup_wherever_it_stands():
    assert token_events("hermes", "ok</tool_call>", "<tool_call>", "</tool_call>") == [
        ("content", "ok")
    ]
    assert token_events(
        "gemma4", gem("{a:x}") + "\nok<tool_call|>", "<|tool_call>", "<tool_call|>"
    ) == [
        CALL,
        ("content", "ok"),
    ]


def test_reasoning_that_the_prompt_has_closed_takes_its_line_breaks_along():
    events = run("glm", ["\n\n  x"], prompt="<|assistant|>\n<think></think>")
    assert shown(events) == [("content", "  x")]


TEXT = st.text(st.sampled_from("ab <>/='\"{}[]\n,:\\é5"), max_size=12)
VALUES = {
    "string": TEXT,
    "integer": st.integers(-99, 99),
    "boolean": st.booleans(),
    "null": st.none(),
    "array": st.lists(st.one_of(TEXT, st.integers(), st.none()), max_size=3),
    "object": st.dictionaries(st.sampled_from(["k", "l"]), TEXT, max_size=2),
}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4).flatmap(
        lambda kinds: st.tuples(*(st.tuples(st.just(kind), VALUES[kind]) for kind in kinds))
    )
)
def test_what_the_template_writes_of_any_value_is_read_back(values):
    properties = {f"p{i}": {"type": kind} for i, (kind, _) in enumerate(values)}
    arguments = {f"p{i}": value for i, (_, value) in enumerate(values)}
    tools = [{"name": "f", "parameters": {"type": "object", "properties": properties}}]
    call = {"function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    whole = ChatTemplate(XML_TEMPLATE.read_text()).render([message], add_generation_prompt=False)
    text = whole.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
    assert shown(run("qwen_xml", [text], tools=tools)) == [("call", "f", arguments)]


@pytest.mark.parametrize(
    "path, name",
    [
        (XML_TEMPLATE, "qwen_xml"),
        *[
            (REAL_TEMPLATES / f"{file}.jinja", name)
            for file, name in {
                "Qwen3-Coder": "qwen_xml",
                "Qwen3.5-4B": "qwen_xml",
                "Qwen-Qwen3-0.6B": "hermes",
                "GLM-4.6": "glm",
                "GLM-4.7-Flash": "glm",
                "GLM-5.2": "glm",
                "google-gemma-4-31B-it": "gemma4",
                "ollama-gemma4_e2b": "gemma4",
                "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
                "meta-llama-Llama-3.1-8B-Instruct": "llama3",
                "Mistral-Small-3.2-24B-Instruct-2506": "mistral",
            }.items()
        ],
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_what_a_published_template_writes_is_read_back(path: Path, name: str):
    if not path.exists():
        pytest.skip("the published templates are not here")
    template = ChatTemplate(path.read_text())
    source = ChatTemplate(path.read_text())
    assert format_of(SimpleNamespace(chat_template=source)) == name  # type: ignore[arg-type]
    call = {**NESTED_CALL["tool_calls"][0], "id": "abcdefghi"}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    prompt = template.render([HELLO], tools=NESTED_TOOLS, enable_thinking=False)
    whole = template.render(
        [HELLO, said], tools=NESTED_TOOLS, enable_thinking=False, add_generation_prompt=False
    )
    start = min(i for m in OPENERS[name] if (i := whole.rfind(m)) >= 0)
    text = whole[start:]
    events = run(name, [text], prompt=prompt, tools=NESTED_TOOLS)
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert [(each.name, dict(each.arguments), each.error) for each in calls] == [
        ("route", call["function"]["arguments"], None)
    ]


OPENERS = {
    "qwen_xml": ["<tool_call>"],
    "hermes": ["<tool_call>"],
    "glm": ["<tool_call>"],
    "gemma4": ["<|tool_call>"],
    "mistral": ["[TOOL_CALLS]"],
    "llama3": ['{"name"'],
}
