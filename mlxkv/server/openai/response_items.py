"""Input items of OpenAI's responses, and the chat messages that they are.

Clients send back the items they got, so the fields of those are taken: `id`, `status`, `phase`,
`annotations` and `logprobs` say nothing to a template and are left out, and so is
`encrypted_content`: reasoning comes and goes in the clear. References to stored items are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mlxkv.server.fields import Strict
from mlxkv.server.openai.messages import made_call
from mlxkv.server.tools import Name

Status = Literal["in_progress", "completed", "incomplete"]


class TextContent(Strict):
    """A piece of text; images, sound and files are refused."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalContent(Strict):
    """A piece of an answer that refused something."""

    type: Literal["refusal"]
    refusal: str


Content = Annotated[TextContent | RefusalContent, Field(discriminator="type")]


class MessageItem(Strict):
    """A message of one role."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Content]
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class CallItem(Strict):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str
    id: str | None = None
    status: Status | None = None


class CallOutputItem(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Content]
    id: str | None = None
    status: Status | None = None


class SummaryText(Strict):
    """A summary of reasoning."""

    type: Literal["summary_text"]
    text: str


class ReasoningText(Strict):
    """Reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """What the model thought."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[SummaryText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


def _kind(item: Any) -> str:
    given = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if given is None else str(given)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def item_messages(items: str | Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Items as chat templates take them: reasoning, text and calls of one turn are one message."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    names: dict[str, str] = {}
    for item in items:
        match item:
            case ReasoningItem():
                parts = item.content or item.summary
                turn = _turn(messages, behind=("content", "tool_calls"))
                turn["reasoning_content"] = "\n".join(part.text for part in parts)
            case CallItem():
                names[item.call_id] = item.name
                made = made_call(item.call_id, item.name, item.arguments)
                _turn(messages).setdefault("tool_calls", []).append(made)
            case CallOutputItem():
                name = names.get(item.call_id)
                named = {"name": name} if name else {}
                output = {"role": "tool", "tool_call_id": item.call_id, **named}
                messages.append({**output, "content": _text(item.output)})
            case MessageItem(role="assistant"):
                turn = _turn(messages, behind=("content", "tool_calls"))
                turn["content"] = _text(item.content)
            case MessageItem():
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": _text(item.content)})
    return messages


def _turn(messages: list[dict[str, Any]], behind: Sequence[str] = ()) -> dict[str, Any]:
    """The message of the turn that is the assistant's; a new one where these parts are there."""
    if not messages or messages[-1]["role"] != "assistant" or any(map(messages[-1].get, behind)):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: str | Sequence[Content]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(p.text if isinstance(p, TextContent) else p.refusal for p in content)
