"""Ollama's chat messages and tools, converted for chat templates.

Ollama's clients do not send back the ids of calls. Calls without one are numbered from the start
of the conversation, and results are matched by the function's name, in order: the same conversation
always gives the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mlxkv.errors import UsageError
from mlxkv.server.fields import Part
from mlxkv.server.media.content import Content
from mlxkv.server.ollama.fields import Answered, Images, content_with
from mlxkv.server.tools import Function, Name, tool_options


class CalledFunction(Part):
    """A function and its arguments."""

    name: str
    arguments: dict[str, Any]
    index: int | None = Field(default=None, description="Ignored; answers have it.")


class MadeCall(Part):
    """A call that the model made."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class ChatMessage(Part):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[MadeCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: str | None = Field(default=None, description="An older spelling of tool_name.")
    images: Images = None


class Tool(Part):
    """A function that the model may call."""

    type: Literal["function"] | None = None
    function: Function


class NameOf(Part):
    """A function's name."""

    name: Name


class NamedTool(Part):
    """The tool that must be called."""

    type: Literal["function"]
    function: NameOf


class ChatRequest(Answered):
    """A conversation to answer."""

    messages: list[ChatMessage] | None = None
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = Field(
        None, description="As in OpenAI's API; an extension that clients of Ollama send."
    )

    def keywords(self) -> dict[str, Any]:
        """Keywords of `Request.of`.

        Raises:
            UsageError: two tools of one name, or values that contradict each other.
        """
        choice, named = self.tool_choice or "auto", None
        if isinstance(choice, NamedTool):
            choice, named = "required", [choice.function.name]
        functions = [tool.function for tool in self.tools or ()]
        made = tool_options(
            functions, choice, named, parallel=named is None, content=self.grammar()
        )
        return super().keywords() | made


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages in the form that chat templates take; pictures as `Given`.

    Raises:
        UsageError: a message has a field that its role does not allow.
    """
    open_calls: list[tuple[str, str]] = []
    n_calls, made = 0, []
    for i, message in enumerate(messages):
        for field in ("tool_calls", "thinking"):
            if getattr(message, field) and message.role != "assistant":
                raise UsageError(f"messages.{i}: {field} is for assistant messages only")
        if message.images and message.role not in ("user", "tool"):
            raise UsageError(f"messages.{i}: images is for user and tool messages only")
        is_result = message.role == "tool"
        place = ("messages", i, "images")
        content = content_with(place, message.images, message.content or "", is_result)
        if message.role == "assistant":
            made.append(_assistant(message, n_calls))
            open_calls = [
                (call["id"], call["function"]["name"]) for call in made[-1].get("tool_calls", ())
            ]
            n_calls += len(message.tool_calls or ())
        elif message.role == "tool":
            made.append(_result(message, content, open_calls))
        else:
            made.append({"role": message.role, "content": content})
    return made


def _assistant(message: ChatMessage, n_before: int) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "assistant", "content": message.content or ""}
    if message.thinking:
        made["reasoning_content"] = message.thinking
    if message.tool_calls:
        made["tool_calls"] = [
            {
                # Some templates accept ids of nine letters and digits only.
                "id": call.id or f"call{n:05d}",
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for n, call in enumerate(message.tool_calls, n_before)
        ]
    return made


def _result(
    message: ChatMessage, content: Content, open_calls: list[tuple[str, str]]
) -> dict[str, Any]:
    """The result of a call, which is then removed from the open calls."""
    name, call_id = message.tool_name or message.name, message.tool_call_id
    for call in open_calls:
        if call_id == call[0] or (call_id is None and name in (None, call[1])):
            open_calls.remove(call)
            call_id, name = call[0], name or call[1]
            break
    named = {key: value for key, value in (("tool_call_id", call_id), ("name", name)) if value}
    return {"role": "tool", **named, "content": content}
