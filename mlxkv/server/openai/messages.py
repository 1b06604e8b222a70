"""OpenAI's chat messages, converted for chat templates.

Clients send answers back as messages, so the fields of answers are accepted: `refusal`,
`annotations`, `name` and our own `tool_call_errors` are ignored, `audio` and `function_call` must
be null.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mlxkv.server.fields import NoEffect, Part, ToolPicture
from mlxkv.server.tools import Name


class TextPart(Part):
    """A piece of text; images, sound and files are refused."""

    type: Literal["text"]
    text: str


class RefusalPart(Part):
    """The text of a refusal."""

    type: Literal["refusal"]
    refusal: str


class CalledFunction(Part):
    """A function and its arguments, as a JSON string."""

    name: Name
    arguments: str


class MadeCall(Part):
    """A call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int | None, NoEffect()] = None


class SystemMessage(Part):
    """What the model is told to be."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Part):
    """A message of the user."""

    role: Literal["user"]
    content: str | list[TextPart]
    name: str | None = None


class AssistantMessage(Part):
    """An answer of the model."""

    role: Literal["assistant"]
    content: str | list[TextPart | RefusalPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[MadeCall] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    tool_call_errors: list[Any] | None = None
    audio: None = None
    function_call: None = None


class PicturePart(ToolPicture):
    """A picture that a tool gave."""

    type: Literal["image_url"]


class ToolMessage(Part):
    """What a call gave."""

    role: Literal["tool"]
    content: str | list[Annotated[TextPart | PicturePart, Field(discriminator="type")]]
    tool_call_id: str
    name: str | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates take."""
    names: dict[str, str] = {}
    found = []
    for message in messages:
        match message:
            case AssistantMessage():
                names |= {call.id: call.function.name for call in message.tool_calls or ()}
                found.append(_assistant(message))
            case ToolMessage():
                # Some templates need the function's name, which only its call has.
                name = message.name or names.get(message.tool_call_id)
                made = {"role": "tool", "tool_call_id": message.tool_call_id}
                made |= {"name": name} if name else {}
                found.append({**made, "content": joined(message.content)})
            case SystemMessage():
                found.append({"role": "system", "content": joined(message.content)})
            case _:
                found.append({"role": "user", "content": joined(message.content)})
    return found


def _assistant(message: AssistantMessage) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": joined(message.content or "")}
    if reasoning := message.reasoning_content or message.reasoning:
        made["reasoning_content"] = reasoning
    if message.tool_calls:
        made["tool_calls"] = [
            made_call(call.id, call.function.name, call.function.arguments)
            for call in message.tool_calls
        ]
    return made


def made_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as templates take it: arguments as an object where they are one, else as text."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = arguments
    function = {"name": name, "arguments": value if isinstance(value, dict) else arguments}
    return {"id": call_id, "type": "function", "function": function}


def joined(content: str | Sequence[TextPart | RefusalPart | ToolPicture]) -> str:
    """A content's parts as one text, separated by line breaks."""
    if isinstance(content, str):
        return content
    return "\n".join(p.refusal if isinstance(p, RefusalPart) else p.text for p in content)
