"""OpenAI's chat messages, and what chat templates take of them.

Clients send back the messages they got, so the fields that answers have are taken: `refusal`,
`annotations` and `name` say nothing to a template and are left out; `audio` and `function_call`
must be null.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlxkv.server.fields import LeftOut, NoEffect, Part
from mlxkv.server.tools import PICTURE_NOTE, Name


class TextPart(Part):
    """A piece of text; images, sound and files are refused."""

    type: Literal["text"]
    text: str


class RefusalPart(Part):
    """A piece of an answer that refused something."""

    type: Literal["refusal"]
    refusal: str


class CalledFunction(Part):
    """What was called; the arguments are JSON in a text."""

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
    """What the user says."""

    role: Literal["user"]
    content: str | list[TextPart]
    name: str | None = None


class AssistantMessage(Part):
    """What the model said."""

    role: Literal["assistant"]
    content: str | list[TextPart | RefusalPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[MadeCall] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class PicturePart(LeftOut):
    """A picture that a tool gave: a note stands in its place."""

    type: Literal["image_url"]
    text: ClassVar[str] = PICTURE_NOTE


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
    """The same as chat templates take them."""
    names: dict[str, str] = {}
    found = []
    for message in messages:
        match message:
            case AssistantMessage():
                names |= {call.id: call.function.name for call in message.tool_calls or ()}
                found.append(_assistant(message))
            case ToolMessage():
                # Some templates want the function's name, which only its call has.
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
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        made["reasoning_content"] = reasoning
    if message.tool_calls:
        made["tool_calls"] = [
            made_call(call.id, call.function.name, call.function.arguments)
            for call in message.tool_calls
        ]
    return made


def made_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as templates take it: with arguments as an object, if they can be read as one."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = arguments
    given = value if isinstance(value, dict) else arguments
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": given}}


def joined(content: str | Sequence[TextPart | RefusalPart | PicturePart]) -> str:
    """Parts of a text as one, a line break between them."""
    if isinstance(content, str):
        return content
    return "\n".join(p.refusal if isinstance(p, RefusalPart) else p.text for p in content)
