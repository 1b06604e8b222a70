"""Tools for models whose chat template knows none: told of, called and answered in plain text.

Gemma 2 and 3 get the form that Google documents for them, JSON with "name" and "parameters"; all
others that of Hermes and Qwen, JSON with "name" and "arguments" in <tool_call>. The history's calls
are written in the same form, and results are user text in <tool_response>.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlxkv.chat.chat_template import ChatTemplate

Style = Literal["hermes", "gemma3"]

_FORM: Mapping[Style, str] = {
    "hermes": (
        "To call functions, write one block for each call, with a JSON object of the function's "
        "name and its arguments:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>\n\n'
        "Each result comes back inside <tool_response></tool_response>."
    ),
    "gemma3": (
        "To call a function, answer with a JSON object in this form and no other text:\n"
        '{"name": <function name>, "parameters": <dictionary of argument names and values>}\n\n'
        "The result comes back inside <tool_response></tool_response>."
    ),
}


def style_of(template: ChatTemplate) -> Style:
    """The form in which a model without tools of its own is told of them."""
    return "gemma3" if "<start_of_turn>" in template.source else "hermes"


def told(tools: Sequence[Mapping[str, Any]], style: Style) -> str:
    """The text that tells a model of tools."""
    lines = "\n".join(_json(tool) for tool in tools)
    return (
        "# Tools\n\nYou may call functions to answer the user. These are the functions, as JSON "
        f"schemas:\n<tools>\n{lines}\n</tools>\n\n{_FORM[style]}"
    )


def call(function: Mapping[str, Any], style: Style) -> str:
    """A call of the history."""
    name, arguments = function.get("name"), function.get("arguments")
    if style == "gemma3":
        return _json({"name": name, "parameters": arguments})
    return f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"


def result(text: str) -> str:
    """What a call gave, as the user says it."""
    return f"<tool_response>\n{text}\n</tool_response>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
