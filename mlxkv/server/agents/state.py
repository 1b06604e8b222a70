"""`serve --agent-prompts`: what changes is told behind what stays, once for each state.

The rule, over the messages of one conversation:

1. What `volatile.cut` finds in the leading system messages, and in the `<system-reminder>` blocks
   of the first user message, is taken out. A fixed sentence at the system text's end says so.
2. It is told in a `<current-state>` block at the end of a message of the user or of a tool. A block
   stays in its message in all later turns.
3. A conversation that is not known is told all of it in its first user message.
4. In one that is known (`StateMemory`), what differs from what was told last is told in the newest
   message, and nothing where nothing differs. Something that is no longer there: all is told anew.

So a new conversation shares the system text and the tools with the last one; a turn shares all that
the turn before had, also where the state changed in between; and the last block about a thing is
the state that the client sent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlxkv.generation.request import Message
from mlxkv.server.agents.volatile import Piece, cut, cut_reminders
from mlxkv.server.media.content import Content, is_text, joined

NOTE = (
    "Facts that change (date, folder, repository) are told in <current-state> blocks further on; "
    "of two about the same thing, the later one holds."
)
_SYSTEM = ("system", "developer")
_TOLD = ("user", "tool")


@dataclass(frozen=True, slots=True)
class Block:
    """A text at the end of a message.

    Args:
        at: the message's index.
        text: the block.
    """

    at: int
    text: str


@dataclass(frozen=True, slots=True)
class History:
    """What a conversation was told of its state.

    Args:
        blocks: where.
        state: what holds after the last of them.
    """

    blocks: tuple[Block, ...]
    state: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """A conversation without what changes.

    Args:
        messages: it.
        state: what was cut out.
        names: of the conversation up to each message, by which its history is known.
        first: index of the first user message.
        newest: index of the last message of the user or of a tool.
    """

    messages: list[dict[str, Any]]
    state: tuple[Piece, ...]
    names: list[str]
    first: int
    newest: int


class Known(Protocol):
    """Histories by the name of the conversation up to a message."""

    def get(self, name: str) -> Sequence[History]:
        """Those that a name has, the latest first."""
        ...


def split(owner: str, messages: Sequence[Message]) -> Split | None:
    """Cut what changes out of a conversation; None where nothing does, or there is no user.

    Args:
        owner: whose conversation it is.
        messages: as templates take them.
    """
    kept = [dict(message) for message in messages]
    told = [i for i, message in enumerate(kept) if _is_told(message)]
    users = [i for i in told if kept[i]["role"] == "user"]
    if not users:
        return None
    state: list[Piece] = []
    for message in kept:
        if message.get("role") not in _SYSTEM or not isinstance(message.get("content"), str):
            break
        message["content"], some = cut(message["content"])
        if some:
            message["content"] = f"{message['content']}\n\n{NOTE}".lstrip("\n")
            state += some
    first = kept[users[0]]
    first["content"], some = _without_reminders(first["content"])
    state += some
    if not state:
        return None
    return Split(kept, tuple(state), _names(owner, kept), users[0], told[-1])


def plan_history(conversation: Split, known: Known) -> History:
    """What a conversation is told, and where; the rule of this module."""
    state, newest = conversation.state, conversation.newest
    if again := _same(known.get(conversation.names[newest]), state):
        return again
    for i in range(newest - 1, -1, -1):
        if histories := known.get(conversation.names[i]):
            before = _same(histories, state) or histories[0]
            new = _news(before.state, state)
            more = (Block(newest, _block(new)),) if new else ()
            return History((*before.blocks, *more), state)
    return History((Block(conversation.first, _block(state)),), state)


def with_blocks(conversation: Split, history: History) -> list[dict[str, Any]]:
    """The conversation with its blocks."""
    made = [dict(message) for message in conversation.messages]
    for block in history.blocks:
        if 0 <= block.at < len(made) and _is_told(made[block.at]):
            content = made[block.at]["content"]
            made[block.at]["content"] = joined(content, block.text, "\n\n")
    return made


def _same(histories: Sequence[History], state: Sequence[Piece]) -> History | None:
    return next((known for known in histories if known.state == tuple(state)), None)


def _news(before: Sequence[Piece], now: Sequence[Piece]) -> Sequence[Piece]:
    """What has to be told for `now` to hold where `before` does."""
    if {piece.kind for piece in before} - {piece.kind for piece in now}:
        return now
    return [piece for piece in now if piece not in before]


def _block(pieces: Sequence[Piece]) -> str:
    lines = "\n".join(piece.text for piece in pieces)
    return f"<current-state>\n{lines}\n</current-state>"


def _is_told(message: Message) -> bool:
    return message.get("role") in _TOLD and isinstance(message.get("content"), str | list)


def _without_reminders(content: Content) -> tuple[Content, list[Piece]]:
    """`cut_reminders` of a content, which may have pictures among its texts."""
    if isinstance(content, str):
        return cut_reminders(content)
    made, pieces = list(content), []
    for i, part in enumerate(content):
        if is_text(part):
            text, some = cut_reminders(part["text"])
            made[i] = {**part, "text": text}
            pieces += [Piece(f"part {i}: {piece.kind}", piece.text) for piece in some]
    return made, pieces


def _names(owner: str, messages: Sequence[Message]) -> list[str]:
    """A name for the conversation up to each message.

    Of a message only what clients send back as it was counts: reasoning and the ids of calls are
    left out by some in later turns.
    """
    names, name = [], owner
    for message in messages:
        content = message.get("content")
        calls = [
            (call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls") or ()
        ]
        shown = [message.get("role"), _shown(content)]
        data = json.dumps([name, shown, calls], sort_keys=True, default=str)
        name = hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        names.append(name)
    return names


def _shown(content: Any) -> Any:
    """What counts of a content: its texts, and the bytes of its pictures and sound."""
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, list):
        return content
    return [
        part["text"].strip() if is_text(part) else _digest(part.get(part.get("type")))
        for part in content
    ]


def _digest(value: Any) -> str:
    data = value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()
