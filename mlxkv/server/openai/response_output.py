"""An answer as output items of a response, and as the events that stream them.

One item is open at a time, in the order in which the model wrote reasoning, text and calls. Events
of an item: item added, part added, deltas, text done, part done, item done.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxkv.generation.outputs import Chunk
from mlxkv.parsers.events import ToolCall
from mlxkv.server.openai.respond import chat_logprobs
from mlxkv.server.openai.response_tools import INPUT, Callee
from mlxkv.server.results import AnswerState, arguments_of, broken_calls, shown_logprobs

Event = dict[str, Any]


@dataclass(slots=True)
class _Open:
    """The open item; `kind` is `reasoning` or `message`."""

    kind: str
    id: str
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def place(self, index: int) -> dict[str, Any]:
        """The fields by which an event says where it belongs."""
        return {"item_id": self.id, "output_index": index, "content_index": 0}

    def part(self, text: str) -> dict[str, Any]:
        """Its only part, with this text."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = {"logprobs": list(self.logprobs)}
        return {"type": "output_text", "text": text, "annotations": [], **logprobs}

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """The item, with this content."""
        own = {"summary": []} if self.kind == "reasoning" else {"role": "assistant"}
        return {"id": self.id, "type": self.kind, "status": status, **own, "content": content}


class Output:
    """The items of one answer.

    Args:
        progress: what is known of it besides.
        logprobs: whether messages show theirs.
        callees: the request's tools, by the names that the model knows.
        new_id: makes the id of an item.

    Attributes:
        items: the items that are done.
    """

    def __init__(
        self,
        progress: AnswerState,
        logprobs: bool,
        callees: Mapping[str, Callee],
        new_id: Callable[[str], str],
    ):
        self._new_id = new_id
        self.progress = progress
        self.items: list[dict[str, Any]] = []
        self._logprobs, self._callees = logprobs, callees
        self._open: _Open | None = None

    def take(self, chunk: Chunk) -> list[Event]:
        """The events of a chunk."""
        events: list[Event] = []
        calls = self.progress.take(chunk)
        logprobs = shown_logprobs(chunk) if self._logprobs else []
        if chunk.reasoning:
            events += self._grow("reasoning", chunk.reasoning, [])
        text = chunk.text + "".join(call.text for call in broken_calls(chunk))
        if text or logprobs:
            events += self._grow("message", text, chat_logprobs(logprobs)["content"])
        for call in calls:
            events += [*self.close(), *self._call(call)]
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """The events that end the open item, if one is open."""
        if self._open is None:
            return []
        item, self._open = self._open, None
        text, index = "".join(item.text), len(self.items)
        where = item.place(index)
        name = "reasoning_text" if item.kind == "reasoning" else "output_text"
        logprobs = {} if item.kind == "reasoning" else {"logprobs": item.logprobs}
        part = item.part(text)
        self.items.append(item.item(status, [part]))
        return [
            {"type": f"response.{name}.done", **where, "text": text, **logprobs},
            {"type": "response.content_part.done", **where, "part": part},
            {"type": "response.output_item.done", "output_index": index, "item": self.items[-1]},
        ]

    def _grow(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        events = [] if self._open is None or self._open.kind == kind else self.close()
        index = len(self.items)
        if self._open is None:
            item = self._open = _Open(kind, self._new_id("rs" if kind == "reasoning" else "msg"))
            added = item.item("in_progress", [])
            events += [
                {"type": "response.output_item.added", "output_index": index, "item": added},
                {"type": "response.content_part.added", **item.place(index), "part": item.part("")},
            ]
        item = self._open
        item.text.append(text)
        item.logprobs += logprobs
        name = "reasoning_text" if kind == "reasoning" else "output_text"
        delta: Event = {"type": f"response.{name}.delta", **item.place(index), "delta": text}
        return [*events, delta if kind == "reasoning" else {**delta, "logprobs": logprobs}]

    def _call(self, call: ToolCall) -> list[Event]:
        """The events of a call: under the API's names, and of a custom tool as text."""
        callee = self._callees.get(call.name)
        head: dict[str, Any] = {"call_id": call.id, "name": callee.name if callee else call.name}
        if callee is not None and callee.namespace:
            head["namespace"] = callee.namespace
        if callee is not None and callee.is_custom:
            text, field, events = (
                str(call.arguments.get(INPUT, "")),
                "input",
                "custom_tool_call_input",
            )
            head = {"id": self._new_id("ctc"), "type": "custom_tool_call", **head}
        else:
            field, events = "arguments", "function_call_arguments"
            text = arguments_of(call)
            head = {"id": self._new_id("fc"), "type": "function_call", **head}
        index = len(self.items)
        where = {"item_id": head["id"], "output_index": index}
        done = {**head, "status": "completed", field: text}
        self.items.append(done)
        return [
            {
                "type": "response.output_item.added",
                "output_index": index,
                "item": {**head, "status": "in_progress", field: ""},
            },
            {"type": f"response.{events}.delta", **where, "delta": text},
            {"type": f"response.{events}.done", **where, "name": head["name"], field: text},
            {"type": "response.output_item.done", "output_index": index, "item": done},
        ]


def new_id(prefix: str) -> str:
    """A random id."""
    return f"{prefix}_{secrets.token_hex(16)}"


def ids_of(response_id: str) -> Callable[[str], str]:
    """Makes the ids of a response's items: the same ones each time that it is written."""
    n = itertools.count()

    def new_id(prefix: str) -> str:
        return f"{prefix}_{hashlib.sha256(f'{response_id} {next(n)}'.encode()).hexdigest()[:32]}"

    return new_id
