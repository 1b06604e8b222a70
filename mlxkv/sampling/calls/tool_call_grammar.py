"""Grammars of tool calls, in the format of each family.

| format | a call |
| --- | --- |
| hermes (Qwen, Hermes) | `<tool_call>` `{"name": N, "arguments": {...}}` `</tool_call>`, several |
| llama3, gemma3 | `{"name": N, "parameters": {...}}`, one |
| mistral | `[TOOL_CALLS]` `[{"name": N, "arguments": {...}}, ...]`, or `N[ARGS]{...}`, several |
| glm4 | `N`, a line break, `{...}`, one |
| harmony (GPT-OSS) | a message on the channel `commentary` to `functions.N`: `{...}`, one |
| glm (GLM-4.5 and later), qwen_xml | pairs of tags: see `pair_call_grammar`; several |
| gemma4, functiongemma | not JSON: see `native_call_grammar`; several |

Harmony's grammar begins where the answer does: it has the reasoning in it, see `HAS_REASONING`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxkv.errors import UsageError
from mlxkv.parsers import harmony
from mlxkv.parsers.closed_schema import closed
from mlxkv.sampling.calls import native_call_grammar, pair_call_grammar
from mlxkv.sampling.calls.grammar_strings import ANY, literal
from mlxkv.sampling.calls.native_call_grammar import call_rules, each_tool
from mlxkv.text.tokenizer import Tokenizer

MAX_SPACES = 32
"""Blanks and line breaks between two of JSON's tokens: deep enough an indentation."""
MAX_CALLS = 16
"""Calls of one answer, so that a model cannot go on calling for ever."""
HAS_REASONING = frozenset({"harmony"})
"""Formats whose grammars describe the reasoning as well, so that no gate has to."""
MARKED = frozenset({"hermes", "mistral", "glm", "gemma4", "functiongemma", "harmony"})
"""Formats whose calls begin with a token that begins nothing else, so that text ends there."""
GEMMA_QUOTES = {"gemma4": '<|"|>', "functiongemma": "<escape>"}
"""The tokens around strings of Gemma's calls."""
_MORE = f"{{0,{MAX_CALLS - 1}}}"
_MAX_THOUGHTS = 16
"""Messages in which a Harmony model thinks before it answers."""


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls that have to come, or may.

    Args:
        tools: names and JSON schemas of their arguments.
        parallel: whether there may be several.
        content: the schema of a JSON answer that may come in their place; None: they must come.
        free: whether text may come, and calls behind it if there are tools.
    """

    tools: tuple[tuple[str, Mapping[str, Any]], ...]
    parallel: bool = True
    content: Mapping[str, Any] | bool | None = None
    free: bool = False

    @classmethod
    def from_json(cls, text: str) -> Calls:
        """Of `{"tools": [{"name", "parameters"}], "parallel": true, "content": null}`.

        `content` is null or `{"kind": "json_object" | "json_schema" | "text", "text": schema}`.

        Raises:
            UsageError: it is something else.
        """
        try:
            said = json.loads(text)
            tools = tuple((tool["name"], closed(tool["parameters"])) for tool in said["tools"])
            content = said.get("content")
            if content is not None and content["kind"] == "text":
                return cls(tools, bool(said.get("parallel", True)), free=True)
            if content is not None:
                is_any = content["kind"] == "json_object"
                content = {"type": "object"} if is_any else closed(json.loads(content["text"]))
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            raise UsageError(f"the tools cannot be read: {error}") from None
        return cls(tools, bool(said.get("parallel", True)), content)


def bounded(schema: Any) -> Any:
    """A JSON schema whose answers have few blanks."""
    if not isinstance(schema, dict):
        schema = {} if schema is True else {"not": {}} if schema is False else schema
    if not isinstance(schema, dict):
        raise UsageError("a JSON schema must be an object")
    spaces = rf"[ \n]{{1,{MAX_SPACES}}}"
    return {**schema, "x-guidance": {"whitespace_pattern": spaces}}


def lark(calls: Calls, name: str, tokenizer: Tokenizer) -> str:
    """The grammar of an answer that calls.

    Args:
        calls: which.
        name: of the model's format, see `formats.format_of`.
        tokenizer: the model's: markers are tokens.

    Raises:
        UsageError: the format's calls cannot be described, or its markers are no tokens.
    """
    if name not in _FORMATS:
        raise UsageError(
            f"this model's chat template has no calls that we know ({name}), so they cannot be "
            f'required, nor stand beside a response_format: leave tool_choice at "auto" and '
            f"response_format out"
        )
    markers = _Markers(tokenizer)
    try:
        rules = _FORMATS[name](calls, markers) if calls.tools else []
    except RecursionError:
        raise UsageError("the schemas of the tools nest too deeply") from None
    thoughts, head = "", ""
    if name == "harmony":
        thoughts, head = _harmony_thoughts(markers, with_preambles=calls.free)
    start = "calls"
    if calls.free:
        rules.append(f"content: {head} {ANY}")
        start = "content" if not calls.tools else "content | calls" if head else "content calls?"
    elif calls.content is not None:
        rules.append(f"content: {head} {_json(calls.content)}")
        start = "calls | content"
    return "\n".join([f"start: {thoughts} ({start})", *rules]) + "\n"


class _Markers:
    """Markers as a grammar names tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __getitem__(self, text: str) -> str:
        token = self._tokenizer.id_of(text)
        if token is None:
            raise UsageError(f"calls cannot be required: {text} is no token of this model")
        return f"<[{token}]>"

    def written(self, text: str) -> str:
        """The same, for a marker that may also be ordinary text."""
        return literal(text) if self._tokenizer.id_of(text) is None else self[text]

    def template_has(self, text: str) -> bool:
        """Whether the model's chat template writes a text."""
        template = self._tokenizer.chat_template
        return template is not None and text in template.source + (template.tools_source or "")


def _json(schema: Any) -> str:
    return f"%json {json.dumps(bounded(schema))}"


def _arguments(schema: Any) -> str:
    """JSON of a call's arguments: an object, where their schema does not say so itself."""
    if schema is True:
        schema = {}
    if isinstance(schema, Mapping):
        said = schema.get("type", "object")
        if "object" not in (said if isinstance(said, list) else [said]):
            raise UsageError("its parameters can be no object")
        schema = {**schema, "type": "object"}
    return _json(schema)


def _calls_of(rule: str, calls: Calls, write: Callable[[str, Any], str]) -> list[str]:
    return call_rules(rule, each_tool(calls.tools, write))


def _objects(calls: Calls, key: str) -> list[str]:
    """Rules of `call`: an object of a name and arguments."""

    def write(name: str, schema: Any) -> str:
        head = f'{{"name": {json.dumps(name)}, "{key}": '
        return f'{literal(head)} {_arguments(schema)} "}}"'

    return _calls_of("call", calls, write)


def _hermes(calls: Calls, markers: _Markers) -> list[str]:
    opens, closes = markers.written("<tool_call>"), markers.written("</tool_call>")
    more = f' ("\\n" {opens} "\\n" call "\\n" {closes}){_MORE}' if calls.parallel else ""
    rule = f'calls: {opens} "\\n" call "\\n" {closes}{more}'
    return [rule, *_objects(calls, "arguments")]


def _qwen_xml(calls: Calls, markers: _Markers) -> list[str]:
    opens, closes = markers["<tool_call>"], markers["</tool_call>"]
    more = f' ("\\n" {opens} "\\n" call "\\n" {closes}){_MORE}' if calls.parallel else ""
    rule = f'calls: {opens} "\\n" call "\\n" {closes}{more}'
    return [rule, *pair_call_grammar.xml(calls.tools)]


def _bare(calls: Calls, markers: _Markers) -> list[str]:
    return ["calls: call", *_objects(calls, "parameters")]


def _mistral(calls: Calls, markers: _Markers) -> list[str]:
    opens = markers["[TOOL_CALLS]"]
    if not markers.template_has("[ARGS]"):
        more = f' (", " call){_MORE}' if calls.parallel else ""
        return [f'calls: {opens} "[" call{more} "]"', *_objects(calls, "arguments")]
    args = markers["[ARGS]"]
    rules = _calls_of("call", calls, lambda n, schema: f"{literal(n)} {args} {_arguments(schema)}")
    more = f" ({opens} call){_MORE}" if calls.parallel else ""
    return [f"calls: {opens} call{more}", *rules]


def _glm4(calls: Calls, markers: _Markers) -> list[str]:
    def write(name: str, schema: Any) -> str:
        return f'{literal(name)} "\\n" {_arguments(schema)}'

    return _calls_of("calls", calls, write)


def _glm(calls: Calls, markers: _Markers) -> list[str]:
    opens, closes = markers["<tool_call>"], markers["</tool_call>"]
    more = f' ("\\n"? {opens} call {closes}){_MORE}' if calls.parallel else ""
    rules = pair_call_grammar.glm(calls.tools, markers.__getitem__)
    return [f"calls: {opens} call {closes}{more}", *rules]


def _gemma(opening: str, closing: str, quote: str) -> Callable[[Calls, _Markers], list[str]]:
    def write(calls: Calls, markers: _Markers) -> list[str]:
        call = f"{markers[opening]} call {markers[closing]}"
        more = f" ({call}){_MORE}" if calls.parallel else ""
        rules = native_call_grammar.gemma(calls.tools, quote, markers[quote])
        return [f"calls: {call}{more}", *rules]

    return write


def _harmony(calls: Calls, markers: _Markers) -> list[str]:
    channel, message = markers[harmony.CHANNEL], markers[harmony.MESSAGE]
    kind = f'(" "? {markers[harmony.CONSTRAIN]} "json" | " json")?'

    def write(name: str, schema: Any) -> str:
        if not re.fullmatch(r"[^\s<]+", name):
            raise UsageError("such a name cannot be written")
        to = literal(f" to=functions.{name}")
        header = f'{channel} "commentary" {to} {kind} | {to} {channel} "commentary" {kind}'
        return f"({header}) {message} {_arguments(schema)}"

    return _calls_of("calls", calls, write)


def _harmony_thoughts(markers: _Markers, with_preambles: bool) -> tuple[str, str]:
    """What may come before an answer, and what comes before its content.

    Args:
        with_preambles: what the model says of what it is going to do, too.
    """
    channel, message = markers[harmony.CHANNEL], markers[harmony.MESSAGE]
    kinds = '("analysis" | "commentary")' if with_preambles else '"analysis"'
    ends = f'{markers["<|end|>"]} {markers[harmony.START]} "assistant"'
    thought = f"{channel} {kinds} {message} {ANY} {ends}"
    return f"({thought}){{0,{_MAX_THOUGHTS}}}", f'{channel} "final" {message}'


_FORMATS: Mapping[str, Callable[[Calls, _Markers], list[str]]] = {
    "hermes": _hermes,
    "qwen_xml": _qwen_xml,
    "llama3": _bare,
    "gemma3": _bare,
    "mistral": _mistral,
    "glm4": _glm4,
    "glm": _glm,
    "gemma4": _gemma("<|tool_call>", "<tool_call|>", GEMMA_QUOTES["gemma4"]),
    "functiongemma": _gemma(
        "<start_function_call>", "<end_function_call>", GEMMA_QUOTES["functiongemma"]
    ),
    "harmony": _harmony,
}
