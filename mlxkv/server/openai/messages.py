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

from mlxkv.server.fields import NoEffect, Part
from mlxkv.server.media.content import Content, Given, Place, content_of
from mlxkv.server.tools import Name

BETWEEN = "\n"
"""Separates the texts of one message."""
Detail = Literal["low", "high", "auto", "original"]


class TextPart(Part):
    """A piece of text."""

    type: Literal["text"]
    text: str


class FilePart(Part):
    """A picture or a recording."""

    def given(self, place: Place, is_result: bool = False) -> Given:
        """It, for the prompt.

        Args:
            place: of this part.
            is_result: whether a tool gave it.
        """
        raise NotImplementedError


class ImageURL(Part):
    """Where a picture is: a data URL, or a server that the operator allows."""

    url: str
    detail: Detail | None = None


class ImagePart(FilePart):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL | str

    def given(self, place: Place, is_result: bool = False) -> Given:
        its = ImageURL(url=self.image_url) if isinstance(self.image_url, str) else self.image_url
        return Given("image", (*place, self.type), its.url, True, its.detail, is_result)


class InputAudio(Part):
    """A recording in base64. What it is its content says, not `format`."""

    data: str
    format: str | None = None


class SoundPart(FilePart):
    """A recording."""

    type: Literal["input_audio"]
    input_audio: InputAudio

    def given(self, place: Place, is_result: bool = False) -> Given:
        return Given("audio", (*place, self.type), self.input_audio.data, is_result=is_result)


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


MediaPart = Annotated[TextPart | ImagePart | SoundPart, Field(discriminator="type")]


class SystemMessage(Part):
    """What the model is told to be."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]
    name: str | None = None


class UserMessage(Part):
    """A message of the user."""

    role: Literal["user"]
    content: str | list[MediaPart]
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


class ToolMessage(Part):
    """What a call gave."""

    role: Literal["tool"]
    content: str | list[MediaPart]
    tool_call_id: str
    name: str | None = None


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates take; pictures and sound as `Given`."""
    names: dict[str, str] = {}
    found = []
    for i, message in enumerate(messages):
        place = ("messages", i, "content")
        match message:
            case AssistantMessage():
                names |= {call.id: call.function.name for call in message.tool_calls or ()}
                found.append(_assistant(message))
            case ToolMessage():
                # Some templates need the function's name, which only its call has.
                name = message.name or names.get(message.tool_call_id)
                made = {"role": "tool", "tool_call_id": message.tool_call_id}
                made |= {"name": name} if name else {}
                found.append({**made, "content": content_at(place, message.content, True)})
            case SystemMessage():
                found.append({"role": "system", "content": joined(message.content)})
            case _:
                found.append({"role": "user", "content": content_at(place, message.content)})
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


def joined(content: str | Sequence[Any]) -> str:
    """The texts of a content, separated by line breaks."""
    if isinstance(content, str):
        return content
    return BETWEEN.join(_text_of(part) for part in content)


def content_at(place: Place, content: str | Sequence[Any], is_result: bool = False) -> Content:
    """A content that may have pictures and sound.

    Args:
        place: its field.
        content: a text or parts.
        is_result: whether a tool gave it.
    """
    if isinstance(content, str):
        return content
    made = (
        part.given((*place, j), is_result) if isinstance(part, FilePart) else _text_of(part)
        for j, part in enumerate(content)
    )
    return content_of(made, BETWEEN)


def _text_of(part: Any) -> str:
    return part.refusal if isinstance(part, RefusalPart) else part.text
