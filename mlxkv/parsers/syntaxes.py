"""The formats with markers, by name. `formats` has the others, which need none of this."""

from __future__ import annotations

from mlxkv.parsers.notations.fences import FencedCalls
from mlxkv.parsers.notations.in_text import (
    FirstOf,
    GemmaCalls,
    GlmTextCalls,
    MistralCalls,
    PythonCalls,
)
from mlxkv.parsers.notations.notation import JsonCalls
from mlxkv.parsers.notations.pairs import GlmCalls, XmlCalls
from mlxkv.parsers.syntax import Syntax

_THINK = ("<think>", "</think>")

SYNTAXES: dict[str, Syntax] = {
    "think": Syntax(think=_THINK),
    "hermes": Syntax(think=_THINK, call=("<tool_call>", "</tool_call>"), notation=JsonCalls()),
    "qwen_xml": Syntax(
        think=_THINK,
        call=("<tool_call>", "</tool_call>"),
        notation=XmlCalls(),
        begins="<function=",
    ),
    "glm": Syntax(
        think=_THINK,
        call=("<tool_call>", "</tool_call>"),
        notation=GlmCalls(),
        inner=frozenset({"<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"}),
    ),
    "glm4": Syntax(think=_THINK, bare=GlmTextCalls()),
    "gemma4": Syntax(
        think=("<|channel>", "<channel|>"),
        labelled=True,
        call=("<|tool_call>", "<tool_call|>"),
        notation=FirstOf(GemmaCalls(), JsonCalls()),
        silent=frozenset({"<|tool_response>"}),
        inner=frozenset({'<|"|>'}),
    ),
    "functiongemma": Syntax(
        call=("<start_function_call>", "<end_function_call>"),
        notation=GemmaCalls("<escape>"),
        silent=frozenset({"<start_function_response>"}),
        inner=frozenset({"<escape>"}),
    ),
    "gemma3": Syntax(
        call=("```", "```"),
        notation=FencedCalls(FirstOf(JsonCalls(), PythonCalls())),
        bare=FirstOf(JsonCalls(), PythonCalls()),
        known_only=True,
    ),
    "mistral": Syntax(
        think=("[THINK]", "[/THINK]"), call=("[TOOL_CALLS]", None), notation=MistralCalls()
    ),
    "llama3": Syntax(
        call=("<|python_tag|>", None),
        notation=FirstOf(JsonCalls(), PythonCalls()),
        bare=JsonCalls(),
        silent=frozenset({"<|eom_id|>", "<|eot_id|>"}),
    ),
}
