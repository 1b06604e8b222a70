"""Input items of OpenAI's Responses API, converted to chat messages.

Clients send back the items they got, so the fields of those are taken: `id`, `status`, `phase`,
`annotations` and `logprobs` say nothing to a template and are left out, and so is
`encrypted_content`: reasoning comes and goes in the clear. Items of tools that OpenAI's server runs
are left out, and named (`ignored`). `response_store` puts items in the place of references.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mlxkv.server.fields import LeftOut, Part, Refused, type_of
from mlxkv.server.media.content import Given, Place, refused
from mlxkv.server.openai.messages import (
    Detail,
    FilePart,
    RefusalPart,
    SoundPart,
    TextPart,
    content_at,
    joined,
    made_call,
)
from mlxkv.server.openai.response_tools import INPUT, full_name
from mlxkv.server.tools import Name

Status = Literal["in_progress", "completed", "incomplete"]


class TextContent(TextPart):
    """Text."""

    type: Literal["input_text", "output_text"]  # pyright: ignore[reportIncompatibleVariableOverride]
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class ImageContent(FilePart):
    """A picture: a data URL, or the URL of a server that the operator allows."""

    type: Literal["input_image"]
    image_url: str
    detail: Detail | None = None
    file_id: Refused = None

    def given(self, place: Place, is_result: bool = False) -> Given:
        return Given("image", (*place, self.type), self.image_url, True, self.detail, is_result)


ContentPart = Annotated[
    TextContent | RefusalPart | ImageContent | SoundPart, Field(discriminator="type")
]


class ItemPart(Part):
    """What items have that came of a response."""

    id: str | None = None
    status: Status | None = None


class MessageItem(ItemPart):
    """A message of one role."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]
    phase: str | None = None


class CallItem(ItemPart):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: Name
    namespace: Name | None = None
    arguments: str


class CustomCallItem(ItemPart):
    """A call of a custom tool."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: Name
    namespace: Name | None = None
    input: str


class ShellCallItem(ItemPart):
    """A command that a model asked for."""

    type: Literal["local_shell_call"]
    call_id: str
    action: dict[str, Any]


class CallOutputItem(ItemPart):
    """The result of a call."""

    type: Literal["function_call_output", "custom_tool_call_output", "local_shell_call_output"]
    call_id: str
    output: str | list[ContentPart]


class ReasoningText(Part):
    """Reasoning, or a summary of it."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(ItemPart):
    """The model's reasoning."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


class HostedItem(LeftOut):
    """What a tool of OpenAI's server did, or what only that server can read."""

    type: Literal[
        "web_search_call", "file_search_call", "computer_call", "computer_call_output",
        "image_generation_call", "code_interpreter_call", "mcp_call", "mcp_list_tools",
        "mcp_approval_request", "mcp_approval_response", "compaction", "tool_search_call",
        "tool_search_output",
    ]  # fmt: skip


class ItemReference(Part):
    """An item of an earlier response."""

    type: Literal["item_reference"] = "item_reference"
    id: str


_OUTPUTS = ("function_call_output", "custom_tool_call_output", "local_shell_call_output")
_KINDS = ("message", "function_call", "custom_tool_call", "local_shell_call", "reasoning")


def _kind(item: Any) -> str:
    given = type_of(item)
    if given is None:
        return "message" if not isinstance(item, dict) or "role" in item else "item_reference"
    if given in _OUTPUTS:
        return "output"
    return given if given in (*_KINDS, "item_reference") else "hosted"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[ShellCallItem, Tag("local_shell_call")]
    | Annotated[CallOutputItem, Tag("output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[HostedItem, Tag("hosted")],
    Discriminator(_kind),
]


def item_messages(
    items: Sequence[Item], instructions: str | None, n_before: int = 0
) -> list[dict[str, Any]]:
    """Items as chat templates take them: reasoning, text and calls of one turn are one message.

    Args:
        items: the conversation.
        instructions: its system message.
        n_before: items that come of an earlier response.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    names: dict[str, str] = {}
    for i, item in enumerate(items):
        place = ("input", i - n_before) if i >= n_before else ("previous_response_id", i)
        match item:
            case ReasoningItem():
                turn = _turn(messages, before=("content", "tool_calls"))
                turn["reasoning_content"] = _thought(item)
            case CallItem() | CustomCallItem() | ShellCallItem():
                name, arguments = _called(item)
                names[item.call_id] = name
                made = made_call(item.call_id, name, arguments)
                _turn(messages).setdefault("tool_calls", []).append(made)
            case CallOutputItem():
                output = {"role": "tool", "tool_call_id": item.call_id}
                if name := names.get(item.call_id):
                    output["name"] = name
                content = content_at((*place, "output"), item.output, is_result=True)
                messages.append({**output, "content": content})
            case MessageItem(role="assistant"):
                turn = _turn(messages, before=("content", "tool_calls"))
                turn["content"] = _texts((*place, "content"), item)
            case MessageItem(role="user"):
                content = content_at((*place, "content"), item.content)
                messages.append({"role": "user", "content": content})
            case MessageItem():
                content = _texts((*place, "content"), item)
                messages.append({"role": "system", "content": content})
    return messages


def _texts(place: Place, item: MessageItem) -> str:
    """The content of a message that has no pictures and no sound.

    Raises:
        RequestValidationError: it has.
    """
    for j, part in enumerate(item.content):
        if isinstance(part, FilePart):
            given = part.given((*place, j))
            raise refused(given.place, f"not allowed in a message of role {item.role}")
    return joined(item.content)


def gone_on(items: Sequence[Item], answer: Sequence[Item]) -> list[Item]:
    """A conversation and the answer that goes on from its last item: one text where both are of
    one kind."""
    match (items[-1:], answer[:1]):
        case ([MessageItem() as begun], [MessageItem() as rest]):
            text = joined(begun.content) + joined(rest.content)
            return [*items[:-1], rest.model_copy(update={"content": text, "id": None}), *answer[1:]]
        case ([ReasoningItem() as begun], [ReasoningItem() as rest]):
            text = ReasoningText(type="reasoning_text", text=_thought(begun) + _thought(rest))
            return [
                *items[:-1],
                rest.model_copy(update={"content": [text], "id": None}),
                *answer[1:],
            ]
    return [*items, *answer]


def _thought(item: ReasoningItem) -> str:
    return "\n".join(part.text for part in item.content or item.summary)


def _called(item: CallItem | CustomCallItem | ShellCallItem) -> tuple[str, str]:
    """The function of a call as the model knows it, and its arguments as JSON."""
    match item:
        case CallItem():
            return full_name(item.namespace, item.name), item.arguments
        case CustomCallItem():
            return full_name(item.namespace, item.name), json.dumps({INPUT: item.input})
    return "local_shell", json.dumps(item.action)


def _turn(messages: list[dict[str, Any]], before: Sequence[str] = ()) -> dict[str, Any]:
    """The last message if it is the assistant's and has no part of `before`, else a new one."""
    if not messages or messages[-1]["role"] != "assistant" or any(map(messages[-1].get, before)):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]
