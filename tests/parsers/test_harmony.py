"""GPT-OSS's format as models write it when they make mistakes."""

from __future__ import annotations

import re

import pytest

from mlxkv.parsers.events import Content, Event, Markup, Reasoning, ToolCall
from mlxkv.parsers.harmony import MARKERS, HarmonyParser

S, C, M, E, X = "<|start|>assistant", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"
JSON = " <|constrain|>json"
IDS = dict(enumerate(sorted(MARKERS), start=100))
PROMPT = f"<|start|>user{M}Hello{E}{S}"
THOUGHT, TEXT = ("reasoning", "hm"), ("content", "The answer.")
CALL = ("call", "f", {"a": "b"})
ARGUMENTS = '{"a": "b"}'

CASES: dict[str, tuple[str, list[tuple[object, ...]]]] = {
    "as it should be": (
        f"{C}analysis{M}hm{E}{S}{C}final{M}The answer.<|return|>",
        [THOUGHT, TEXT],
    ),
    "no start": (f"{C}analysis{M}hm{E}assistant{C}final{M}The answer.", [THOUGHT, TEXT]),
    "no start, no role": (f"{C}analysis{M}hm{E}{C}final{M}The answer.", [THOUGHT, TEXT]),
    "no role": (f"{C}analysis{M}hm{E}<|start|>{C}final{M}The answer.", [THOUGHT, TEXT]),
    "the role again": (f"assistant{C}final{M}The answer.", [TEXT]),
    "start and role again": (f"{S}{C}final{M}The answer.", [TEXT]),
    "no end": (f"{C}analysis{M}hm{S}{C}final{M}The answer.", [THOUGHT, TEXT]),
    "no end, no start": (f"{C}analysis{M}hm{C}final{M}The answer.", [THOUGHT, TEXT]),
    "no message": (f"{C}analysis\nhm, I see.{E}{S}{C}final{M}The answer.",
                   [("reasoning", "hm, I see."), TEXT]),
    "no message in the last": (f"{C}final The answer.<|return|>", [TEXT]),
    "no message, an empty line": (f"{C}final\n\nThe answer.", [TEXT]),
    "a small word, no message": (f"{C}final so it is.{E}", [("content", "so it is.")]),
    "one word, no message": (f"{C}final so{E}{S}{C}analysis{M}hm", [("content", "so"), THOUGHT]),
    "one word alone": (f"so{E}{S}{C}analysis{M}hm", [("content", "so"), THOUGHT]),
    "nothing": (f"{C}analysis{E}{S}{C}final{M}The answer.", [TEXT]),
    "no channel's marker": (f"{C}analysis{M}hm{E}{S} final{M}The answer.", [THOUGHT, TEXT]),
    "role and channel in one": (f"{C}final{M}The answer.{E}{S}analysis{M}hm", [TEXT, THOUGHT]),
    "no channel": (f"{M}The answer.", [TEXT]),
    "no header": (f"{C}analysis{M}hm{E}{S}The answer.", [THOUGHT, TEXT]),
    "no header behind words": (f"{C}analysis{M}hm{E}The answer.", [THOUGHT, TEXT]),
    "a small word first": (f"{C}analysis{M}hm{E}so it is.", [THOUGHT, ("content", "so it is.")]),
    "another channel": (f"{C}summary{M}The answer.", [TEXT]),
    "a content type": (f"{C}final{JSON}{M}The answer.", [TEXT]),
    "a content type of two": (f"{C}final <|constrain|> json{M}The answer.", [TEXT]),
    "to a person": (f"{C}final to=user{M}The answer.", [TEXT]),
    "to all": (f" to=all{C}final{M}The answer.", [TEXT]),
    "a second message token": (f"{C}final{M}The {M}answer.", [TEXT]),
    "a call": (f"{C}commentary to=functions.f{JSON}{M}{ARGUMENTS}{X}", [CALL]),
    "of the role": (f" to=functions.f{C}commentary{JSON}{M}{ARGUMENTS}{X}", [CALL]),
    "of the role, glued": (f"{C}analysis{M}hm{E}{S} to=functions.f{C}analysis{M}{ARGUMENTS}{X}",
                           [THOUGHT, CALL]),
    "in the analysis": (f"{C}analysis to=functions.f code{M}{ARGUMENTS}{X}", [CALL]),
    "in the final": (f"{C}final to=functions.f{M}{ARGUMENTS}{X}", [CALL]),
    "in another channel": (f"{C}tool to=functions.f json{M}{ARGUMENTS}{X}", [CALL]),
    "no blank before its type": (f"{C}commentary to=functions.f<|constrain|>json{M}{ARGUMENTS}{X}",
                                 [CALL]),
    "its type first": (f"{C}commentary json to=functions.f{M}{ARGUMENTS}{X}", [CALL]),
    "a long type": (f"{C}commentary to=functions.f <|constrain|>application/json{M}{ARGUMENTS}{X}",
                    [CALL]),
    "no type": (f"{C}commentary to=functions.f{M}{ARGUMENTS}{X}", [CALL]),
    "no message of a call": (f"{C}commentary to=functions.f json{ARGUMENTS}{X}", [CALL]),
    "no message behind the name": (f"{C}commentary to=functions.f {ARGUMENTS}{X}", [CALL]),
    "no message behind the type": (f"{C}commentary to=functions.f{JSON}{ARGUMENTS}{X}", [CALL]),
    "no message behind a role": (f" to=functions.f{C}commentary {ARGUMENTS}{X}", [CALL]),
    "two channels": (f"{C}analysis to=functions.f{C}commentary json{M}{ARGUMENTS}{X}", [CALL]),
    "a channel without its marker": (f" to=functions.f commentary json{M}{ARGUMENTS}{X}", [CALL]),
    "the same behind a start": (f"{C}analysis{M}hm{E}{S} to=functions.f commentary json{M}"
                                f"{ARGUMENTS}{X}", [THOUGHT, CALL]),
    "a type and no channel": (f" to=functions.f{JSON}{M}{ARGUMENTS}{X}", [CALL]),
    "no name space": (f"{C}commentary to=f{JSON}{M}{ARGUMENTS}{X}", [CALL]),
    "ended like text": (f"{C}commentary to=functions.f{M}{ARGUMENTS}{E}{S}{C}final{M}The answer.",
                        [CALL, TEXT]),
    "no end of a call": (f"{C}commentary to=functions.f{M}{ARGUMENTS}{S}{C}final{M}The answer.",
                         [CALL, TEXT]),
    "no end at all": (f"{C}commentary to=functions.f{M}{ARGUMENTS}", [CALL]),
    "two calls": (f"{C}commentary to=functions.f{M}{ARGUMENTS}{X}{S}{C}commentary to=functions.f"
                  f"{M}{ARGUMENTS}{X}", [CALL, CALL]),
    "words, then a call": (f"{C}commentary{M}The answer.{E}assistant{C}commentary to=functions.f"
                           f"{JSON}{M}{ARGUMENTS}{X}", [TEXT, CALL]),
    "python that is told of": (f"{C}analysis to=python code{M}print(1)\n{X}",
                               [("call", "python", {"code": "print(1)\n"})]),
    "a tool of the format's": (f'{C}analysis to=browser.search code{M}{{"query": "x"}}{X}',
                               [("broken", "browser.search", "none of the tools")]),
    "an unknown tool": (f"{C}commentary to=container.exec{M}{{}}{X}",
                           [("broken", "container.exec", "none of the tools")]),
    "neither message nor arguments": (f"{C}commentary to=functions.f{JSON}{X}",
                                      [("call", "f", {})]),
    "no arguments": (f"{C}commentary to=functions.f{M}", [("broken", "f", "no arguments")]),
}  # fmt: skip


def parser(functions: tuple[str, ...] = ("f", "python"), ids: bool = True) -> HarmonyParser:
    return HarmonyParser(IDS if ids else None, prompt=PROMPT, functions=functions)


def pieces(text: str, size: int) -> list[tuple[str, int | None]]:
    """Text as tokens: markers are one each, the rest is cut to a size."""
    found: list[tuple[str, int | None]] = []
    for part in re.split(f"({'|'.join(map(re.escape, sorted(MARKERS)))})", text):
        if part in MARKERS:
            found.append((part, next(i for i, marker in IDS.items() if marker == part)))
        else:
            found += [(part[i : i + size], 1) for i in range(0, len(part), size)]
    return found


def read(reader: HarmonyParser, given: list[tuple[str, int | None]]) -> list[Event]:
    events = [event for piece in given for event in reader.add(*piece)]
    return [*events, *reader.finish()]


def shown(events: list[Event]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for event in events:
        match event:
            case Content(text) | Reasoning(text):
                kind = "content" if isinstance(event, Content) else "reasoning"
                if rows and rows[-1][0] == kind:
                    rows[-1] = (kind, f"{rows[-1][1]}{text}")
                else:
                    rows.append((kind, text))
            case ToolCall(name=name, arguments=arguments, error=None):
                rows.append(("call", name, dict(arguments)))
            case ToolCall(name=name, error=error):
                rows.append(("broken", name, error))
            case Markup():
                pass
    return rows


def assert_shown(events: list[Event], wanted: list[tuple[object, ...]]) -> None:
    rows = shown(events)
    assert len(rows) == len(wanted), rows
    for row, want in zip(rows, wanted, strict=True):
        if want[0] == "broken":
            assert row[:2] == want[:2] and str(want[2]) in str(row[2])
        else:
            assert row == want


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_models_write_is_read(case, size):
    text, wanted = CASES[case]
    assert_shown(read(parser(), pieces(text, size)), wanted)


# By its text alone a marker inside of a message may be meant as text.
SURE = {"no end, no start", "a second message token"}


@pytest.mark.parametrize("case", [case for case in CASES if case not in SURE | {"no end",
                                  "no end of a call"}])  # fmt: skip
def test_markers_that_are_no_tokens_are_found_by_their_text(case):
    text, wanted = CASES[case]
    assert_shown(read(parser(ids=False), [(char, None) for char in text]), wanted)


# The start of a role could be the start of an answer without a header there.
@pytest.mark.parametrize("case", [case for case in CASES if case != "the role again"])
def test_nothing_of_a_header_is_shown_wherever_the_output_ends(case):
    text, wanted = CASES[case]
    allowed = {str(row[1]) for row in wanted if row[0] in ("content", "reasoning")}
    given = pieces(text, 1)
    for n in range(len(given) + 1):
        events = read(parser(), given[:n])
        assert "".join(event.text for event in events) == "".join(text for text, _ in given[:n])
        for kind, *row in shown(events):
            if kind in ("content", "reasoning"):
                assert any(words.startswith(str(row[0])) for words in allowed), (n, row)


@pytest.mark.parametrize(
    "text",
    [
        f"{C}", f"{C}comm", f"{C}commentary to=functions.wri",
        f"{C}commentary to=functions.f{JSON}", " to=functions.f",
        " to=functions.f<|channel|>", f"{C}final", "<|start|>", f"{S}{C}",
    ],
)  # fmt: skip
def test_a_header_that_the_limit_cuts_shows_nothing(text):
    for before, wanted in ((f"{C}analysis{M}hm{E}{S}", [THOUGHT]), ("", [])):
        for size in (1, 1000):
            assert shown(read(parser(), pieces(before + text, size))) == wanted


@pytest.mark.parametrize("text", ["assi", "assistant", "assistant to=functions.f"])
def test_a_role_without_a_start_that_the_limit_cuts_shows_nothing(text):
    assert shown(read(parser(), pieces(f"{C}analysis{M}hm{E}{text}", 1))) == [THOUGHT]


@pytest.mark.parametrize("text", ["hello", "a", "assist", "to be", "so, <|x|>"])
def test_an_answer_without_any_header_is_content(text):
    assert shown(read(parser(), pieces(text, 1))) == [("content", text)]


def test_a_marker_that_is_written_as_text_is_text():
    for text in ("<|end|>", f"{S}{C}final{M}"):
        given = [*pieces(f"{C}final{M}", 9), *((char, 1) for char in text), (E, None)]
        assert shown(read(parser(), given[:-1])) == [("content", text)]


def test_a_tool_of_a_request_without_tools_is_not_called():
    events = read(parser(()), pieces(f"{C}analysis to=python code{M}print(1){X}", 4))
    assert_shown(events, [("broken", "python", "none of the tools")])
    # What is not known is left as it is.
    reader = HarmonyParser(IDS, prompt=PROMPT)
    events = read(reader, pieces(f"{C}analysis to=python code{M}print(1){X}", 4))
    assert shown(events) == [("call", "python", {"code": "print(1)"})]


def test_a_header_that_the_prompt_has_begun_goes_on():
    for opened, rest in (
        (f"{C}", "final"),
        (f"{C}fi", "nal"),
        (f"{C}final", ""),
        ("", f"{C}final"),
    ):
        reader = HarmonyParser(IDS, prompt=PROMPT + opened)
        assert shown(read(reader, pieces(f"{rest}{M}The answer.", 2))) == [TEXT]
