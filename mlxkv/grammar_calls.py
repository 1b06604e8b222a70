"""Grammars of tool calls, for the formats that write their arguments as JSON.

| format | a call |
| --- | --- |
| hermes (Qwen, Hermes) | `<tool_call>` `{"name": N, "arguments": {...}}` `</tool_call>`, several |
| llama3, gemma3 | `{"name": N, "parameters": {...}}`, one |
| mistral | `[TOOL_CALLS]` `[{"name": N, "arguments": {...}}, ...]`, or `N[ARGS]{...}`, several |
| glm4 | `N`, a line break, `{...}`, one |

The others (GLM-4.5 and later, Gemma 4, FunctionGemma, Harmony) write arguments in ways of their
own: there a call can be allowed and not required.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlxkv.errors import UsageError
from mlxkv.tokenizer import Tokenizer

MAX_SPACES = 32
"""Blanks and line breaks between two of JSON's tokens: deep enough an indentation."""
MAX_CALLS = 16
"""Calls of one answer, so that a model cannot go on calling for ever."""
_MORE = f"{{0,{MAX_CALLS - 1}}}"


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls that have to come, or may.

    Args:
        tools: names and JSON schemas of their arguments.
        parallel: whether there may be several.
        content: the schema of a JSON answer that may come in their place; None: they must come.
    """

    tools: tuple[tuple[str, Mapping[str, Any]], ...]
    parallel: bool = True
    content: Mapping[str, Any] | bool | None = None

    @classmethod
    def from_json(cls, text: str) -> Calls:
        """Of `{"tools": [{"name", "parameters"}], "parallel": true, "content": null}`.

        `content` is null or `{"kind": "json_object" | "json_schema", "text": schema}`.

        Raises:
            UsageError: it is something else.
        """
        try:
            said = json.loads(text)
            tools = tuple((tool["name"], tool["parameters"]) for tool in said["tools"])
            content = said.get("content")
            if content is not None:
                is_any = content["kind"] == "json_object"
                content = {"type": "object"} if is_any else json.loads(content["text"])
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
        name: of the model's format, see `parsing.format_of`.
        tokenizer: the model's: markers are tokens.

    Raises:
        UsageError: the format's calls cannot be described, or its markers are no tokens.
    """
    if name not in _FORMATS:
        raise UsageError(
            f"this model's calls ({name}) cannot be required, nor stand beside a response_format: "
            f'leave tool_choice at "auto" and response_format out'
        )
    rules = _FORMATS[name](calls, _Markers(tokenizer))
    content = ""
    if calls.content is not None:
        content = " | content"
        rules.append(f"content: {_json(calls.content)}")
    return "\n".join([f"start: calls{content}", *rules]) + "\n"


class _Markers:
    """Markers as a grammar names tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __getitem__(self, text: str) -> str:
        token = self._tokenizer.id_of(text)
        if token is None:
            raise UsageError(f"calls cannot be required: {text} is no token of this model")
        return f"<[{token}]>"

    def template_has(self, text: str) -> bool:
        """Whether the model's chat template writes a text."""
        template = self._tokenizer.chat_template
        return template is not None and text in template.source + (template.tools_source or "")


def _json(schema: Any) -> str:
    return f"%json {json.dumps(bounded(schema))}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _objects(calls: Calls, key: str) -> list[str]:
    """Rules of `call`: an object of a name and arguments."""
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(calls.tools)))}"]
    for i, (name, schema) in enumerate(calls.tools):
        head = f'{{"name": {json.dumps(name)}, "{key}": '
        rules += [f'call_{i}: {_text(head)} arguments_{i} "}}"', f"arguments_{i}: {_json(schema)}"]
    return rules


def _hermes(calls: Calls, markers: _Markers) -> list[str]:
    opens, closes = markers["<tool_call>"], markers["</tool_call>"]
    more = f' ("\\n" {opens} "\\n" call "\\n" {closes}){_MORE}' if calls.parallel else ""
    rule = f'calls: {opens} "\\n" call "\\n" {closes}{more}'
    return [rule, *_objects(calls, "arguments")]


def _bare(calls: Calls, markers: _Markers) -> list[str]:
    return ["calls: call", *_objects(calls, "parameters")]


def _mistral(calls: Calls, markers: _Markers) -> list[str]:
    opens = markers["[TOOL_CALLS]"]
    if not markers.template_has("[ARGS]"):
        more = f' (", " call){_MORE}' if calls.parallel else ""
        return [f'calls: {opens} "[" call{more} "]"', *_objects(calls, "arguments")]
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(calls.tools)))}"]
    for i, (name, schema) in enumerate(calls.tools):
        rules += [f"call_{i}: {_text(name)} {markers['[ARGS]']} arguments_{i}"]
        rules += [f"arguments_{i}: {_json(schema)}"]
    more = f" ({opens} call){_MORE}" if calls.parallel else ""
    return [f"calls: {opens} call{more}", *rules]


def _glm4(calls: Calls, markers: _Markers) -> list[str]:
    rules = [f"calls: {' | '.join(f'call_{i}' for i in range(len(calls.tools)))}"]
    for i, (name, schema) in enumerate(calls.tools):
        head = _text(name + "\n")
        rules += [f"call_{i}: {head} arguments_{i}", f"arguments_{i}: {_json(schema)}"]
    return rules


_FORMATS: Mapping[str, Callable[[Calls, _Markers], list[str]]] = {
    "hermes": _hermes,
    "llama3": _bare,
    "gemma3": _bare,
    "mistral": _mistral,
    "glm4": _glm4,
}
