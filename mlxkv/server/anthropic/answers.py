"""Answers in Anthropic's shape: a message, or the events that build it.

- `input_tokens` are those that were computed, `cache_read_input_tokens` those whose KV was
  restored; together they are the prompt. KV is cached without marks, so
  `cache_creation_input_tokens` is 0. When a stream begins only the prompt's length is known:
  `message_start` has it as `input_tokens`, `message_delta` has the final figures.
- `usage.prompt_cache` is an extension: where the prompt's KV came from, and why not more of it.
- Calls that cannot be read are shown as the text that the model wrote.
- An answer that ends before `max_tokens` because the context or the memory is full has the stop
  reason `model_context_window_exceeded`; for memory, `stop_details` (an extension) says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from mlxkv.engine.messages import Answer
from mlxkv.generation.outputs import Chunk
from mlxkv.parsers.events import ToolCall
from mlxkv.server import sse
from mlxkv.server.anthropic.fields import MessagesRequest
from mlxkv.server.anthropic.messages import CALL_PREFIX
from mlxkv.server.errors import ANTHROPIC, anthropic_error, failure_of
from mlxkv.server.results import AnswerState, broken_calls, details, draft_details, new_id

PING = sse.event({"type": "ping"}, "ping")
Kind = Literal["thinking", "text"]


def event(kind: str, **data: Any) -> bytes:
    """One event."""
    return sse.event({"type": kind, **data}, kind)


def error_event(error: BaseException) -> bytes:
    """The last event of a stream that failed."""
    return sse.event(anthropic_error(failure_of(error, ANTHROPIC)), "error")


@dataclass(slots=True)
class Reply:
    """The response to one request.

    Args:
        body: the request.
    """

    body: MessagesRequest
    _progress: AnswerState = field(init=False)
    _stopped_by: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._progress = AnswerState(parallel=self.body.parallel)

    def _pieces(self, chunk: Chunk) -> Iterator[tuple[Kind, str] | ToolCall]:
        """Thinking, text and calls that a chunk adds, in order."""
        had_calls = self._progress.n_calls > 0
        calls = self._progress.take(chunk)
        self._stopped_by = chunk.stopped_by
        if chunk.reasoning and self.body.shows_thinking:
            yield "thinking", chunk.reasoning
        text = chunk.text + "".join(call.text for call in broken_calls(chunk))
        # With parallel calls off, the answer ends at its first call.
        if text and not (had_calls and not self.body.parallel):
            yield "text", text
        yield from calls

    def _head(self) -> dict[str, Any]:
        return {
            "id": new_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": self.body.model,
        }

    def _stop(self) -> dict[str, Any]:
        """`stop_reason` and `stop_sequence`, and `stop_details` where memory was the reason."""
        progress = self._progress
        if progress.reason in ("length", "memory"):
            n = 0 if progress.stats is None else progress.stats.generated_tokens
            full = n < self.body.max_tokens
            reason = "model_context_window_exceeded" if full else "max_tokens"
        elif progress.n_calls:
            reason = "tool_use"
        else:
            reason = "end_turn" if self._stopped_by is None else "stop_sequence"
        sequence = self._stopped_by if reason == "stop_sequence" else None
        stop: dict[str, Any] = {"stop_reason": reason, "stop_sequence": sequence}
        if progress.reason == "memory":
            stop["stop_details"] = progress.finish["finish_details"]
        return stop

    def _usage(self) -> dict[str, Any]:
        stats = self._progress.stats
        if stats is None:
            return {"input_tokens": 0, "output_tokens": 0}
        return {
            "input_tokens": stats.computed_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": stats.restored_tokens,
            "output_tokens": stats.generated_tokens,
            "prompt_cache": details(stats),
            **draft_details([stats]),
        }

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The message in one piece."""
        content: list[dict[str, Any]] = []
        async for chunk in answer:
            for piece in self._pieces(chunk):
                if isinstance(piece, ToolCall):
                    content.append({**_tool_use(piece), "input": dict(piece.arguments)})
                    continue
                kind, text = piece
                if not content or content[-1]["type"] != kind:
                    content.append(_block(kind))
                content[-1][kind] += text
        return {**self._head(), "content": content, **self._stop(), "usage": self._usage()}

    async def events(self, answer: Answer) -> sse.Events:
        """The message as server-sent events."""
        blocks, begun = Blocks(), False
        async for chunk in answer:
            if not begun:
                begun = True
                yield self._start(chunk.prompt_tokens or 0)
            for piece in self._pieces(chunk):
                for each in blocks.add(piece):
                    yield each
            if chunk.finish_reason is not None:
                for each in blocks.close():
                    yield each
                yield event("message_delta", delta=self._stop(), usage=self._usage())
                yield event("message_stop")

    def _start(self, n_prompt: int) -> bytes:
        usage = {"input_tokens": n_prompt, "output_tokens": 0}
        empty = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return event("message_start", message={**self._head(), **empty})


class Blocks:
    """The numbered blocks of a stream; one is open at a time."""

    def __init__(self) -> None:
        self._index = -1
        self._open: Kind | None = None

    def add(self, piece: tuple[Kind, str] | ToolCall) -> Iterator[bytes]:
        """Events that extend the open block, or open the next."""
        if isinstance(piece, ToolCall):
            yield from self.close()
            yield self._begin({**_tool_use(piece), "input": {}})
            arguments = json.dumps(dict(piece.arguments), ensure_ascii=False)
            yield self._delta("input_json_delta", partial_json=arguments)
            yield event("content_block_stop", index=self._index)
            return
        kind, text = piece
        if self._open != kind:
            yield from self.close()
            yield self._begin(_block(kind))
            self._open = kind
        yield self._delta(f"{kind}_delta", **{kind: text})

    def close(self) -> Iterator[bytes]:
        """The end of the open block, if one is."""
        if self._open is not None:
            self._open = None
            yield event("content_block_stop", index=self._index)

    def _begin(self, block: dict[str, Any]) -> bytes:
        self._index += 1
        return event("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: str, **data: Any) -> bytes:
        delta = {"type": kind, **data}
        return event("content_block_delta", index=self._index, delta=delta)


def _block(kind: Kind) -> dict[str, Any]:
    """An empty block."""
    return {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}


def _tool_use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"{CALL_PREFIX}{call.id}", "name": call.name}
