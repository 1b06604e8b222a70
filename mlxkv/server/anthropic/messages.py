"""Anthropic's messages, converted for chat templates.

- Consecutive messages of one role are joined. An answer at the end is continued.
- The result of a call becomes a message with the function's name; a failed one begins "Error: ".
- Ids of calls lose the prefix that answers add: some templates accept nine letters and digits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxkv.errors import UsageError
from mlxkv.server.anthropic.blocks import (
    ContentBlock,
    DocumentBlock,
    ImageBlock,
    SearchResultBlock,
    ServerBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from mlxkv.server.anthropic.fields import CountRequest, InputMessage
from mlxkv.server.fields import LeftOut
from mlxkv.server.media.content import Content, Given, Place, content_of, joined

CALL_PREFIX = "toolu_"
BETWEEN = "\n\n"
"""Separates the texts of one message."""


def template_messages(request: CountRequest) -> list[dict[str, Any]]:
    """A request's conversation in the form that chat templates take; pictures as `Given`.

    Raises:
        UsageError: a block in a message of the wrong role, a result without its call, or calls
            without results at the end.
    """
    made: list[dict[str, Any]] = []
    if request.system:
        made.append({"role": "system", "content": _text(request.system)})
    names: dict[str, str] = {}
    for i, message in enumerate(request.messages):
        for each in _translated(i, message, names):
            _append(made, each)
    if made[-1].get("tool_calls"):
        raise UsageError(
            "the last message calls tools: a user message with a tool_result for each of them has "
            "to follow"
        )
    return made


def _append(made: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Append a message, or join it with the last one if that has the same role."""
    last = made[-1] if made else None
    if last is None or last["role"] != message["role"] or message["role"] in ("tool", "system"):
        made.append(message)
        return
    last["content"] = joined(last["content"], message["content"], BETWEEN)
    thoughts = [m["reasoning_content"] for m in (last, message) if m.get("reasoning_content")]
    if thoughts:
        last["reasoning_content"] = BETWEEN.join(thoughts)
    if calls := [*last.get("tool_calls", ()), *message.get("tool_calls", ())]:
        last["tool_calls"] = calls


def _translated(i: int, message: InputMessage, names: dict[str, str]) -> list[dict[str, Any]]:
    """One message as several: results of calls, and the texts between them.

    Args:
        i: its index, for errors.
        message: the message.
        names: id -> function of earlier calls; this message's calls are added.
    """
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if message.role == "assistant":
        return [_assistant(i, message.content, names)]
    made: list[dict[str, Any]] = []
    parts: list[str | Given] = []
    for j, block in enumerate(message.content):
        place = ("messages", i, "content", j)
        if isinstance(block, TextBlock | DocumentBlock | SearchResultBlock):
            parts.append(block.text)
        elif isinstance(block, ImageBlock) and message.role == "user":
            parts.append(block.given(place))
        elif isinstance(block, LeftOut):
            continue
        elif isinstance(block, ToolResultBlock) and message.role == "user":
            if parts:
                made.append({"role": "user", "content": content_of(parts, BETWEEN)})
                parts = []
            made.append(_result(place, block, names))
        else:
            raise _misplaced(i, j, block, message.role)
    if parts or not made:
        made.append({"role": message.role, "content": content_of(parts, BETWEEN)})
    return made


def _assistant(i: int, blocks: Sequence[ContentBlock], names: dict[str, str]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for j, block in enumerate(blocks):
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                names[block.id] = block.name
                function = {"name": block.name, "arguments": block.input}
                call_id = block.id.removeprefix(CALL_PREFIX)
                calls.append({"id": call_id, "type": "function", "function": function})
            case LeftOut():
                continue
            case _:
                raise _misplaced(i, j, block, "assistant")
    made: dict[str, Any] = {"role": "assistant", "content": BETWEEN.join(texts)}
    if any(thoughts):
        made["reasoning_content"] = BETWEEN.join(thoughts)
    return made | ({"tool_calls": calls} if calls else {})


def _result(place: Place, block: ToolResultBlock, names: dict[str, str]) -> dict[str, Any]:
    name = names.get(block.tool_use_id)
    if name is None:
        where = ".".join(map(str, place))
        raise UsageError(
            f"{where}: no earlier tool_use block has the id {block.tool_use_id[:80]!r}"
        )
    content = _result_content((*place, "content"), block.content or "")
    return {
        "role": "tool",
        "tool_call_id": block.tool_use_id.removeprefix(CALL_PREFIX),
        "name": name,
        "content": _failed(content) if block.is_error else content,
    }


def _failed(content: Content) -> Content:
    """The content of a failed call."""
    return joined("Error: ", content, "")


def _result_content(place: Place, content: str | Sequence[Any]) -> Content:
    if isinstance(content, str):
        return content
    parts = (
        block.given((*place, j), is_result=True) if isinstance(block, ImageBlock) else block.text
        for j, block in enumerate(content)
        if not isinstance(block, ServerBlock)
    )
    return content_of(parts, BETWEEN)


def _misplaced(i: int, j: int, block: ContentBlock, role: str) -> UsageError:
    return UsageError(f"messages.{i}.content.{j}: {block.type} is not allowed in a {role} message")


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else BETWEEN.join(block.text for block in content)
