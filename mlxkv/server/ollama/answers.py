"""Answers in Ollama's shape: lines of JSON, the last one with times and token counts.

- `prompt_eval_count` is the length of the whole prompt: clients tell by it how full a context is.
  `prompt_eval_cached_count` of its tokens were restored; the others were computed in
  `prompt_eval_duration`.
- `load_duration` is the time until the model was loaded, `total_duration` the whole time.
- Calls that cannot be read, and calls of a request without tools, are shown as text.
- Extensions: `done_reason` "memory" for an answer that the memory limit ended, `prompt_cache`,
  `memory`, and the `status` of an error that ends a stream.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlxkv.engine.messages import Answer
from mlxkv.generation.outputs import Chunk, Stats, TokenLogprobs
from mlxkv.parsers.events import ToolCall
from mlxkv.server import sse
from mlxkv.server.errors import OLLAMA, failure_of, ollama_error
from mlxkv.server.results import (
    ahead_details,
    broken_calls,
    draft_details,
    logprob_fields,
    media_details,
    upper_details,
)

NDJSON = "application/x-ndjson"


def line(data: dict[str, Any]) -> bytes:
    """One line of a stream."""
    return f"{sse.dumps(data)}\n".encode()


def error_line(error: BaseException) -> bytes:
    """The last line of a stream that failed, with the HTTP status for such an error."""
    failure = failure_of(error, OLLAMA)
    return line({**ollama_error(failure), "status": failure.status})


def now() -> str:
    """The time, as Ollama writes it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class Piece:
    """Part of an answer, or all of it."""

    text: str = ""
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, chunk: Chunk, calls: bool) -> None:
        """Append a chunk; tool calls as text unless the request has tools (`calls`)."""
        broken = broken_calls(chunk) if calls else chunk.tool_calls
        self.text += chunk.text + "".join(call.text for call in broken)
        self.thinking += chunk.reasoning or ""
        self.calls += [call for call in chunk.tool_calls if call.error is None] if calls else []
        self.logprobs += [chunk.logprobs] if chunk.logprobs is not None else []

    @property
    def is_shown(self) -> bool:
        """Whether it holds text, thinking or calls."""
        return bool(self.text or self.thinking or self.calls)


@dataclass(slots=True)
class Reply:
    """The response to one request.

    Args:
        model: as the request names it.
        chats: whether it answers /api/chat; else /api/generate.
        calls: whether the request named tools.
        load_ns: time that loading the model took.
        started_ns: when the request came, on the clock of `perf_counter_ns`.
    """

    model: str
    chats: bool
    calls: bool = False
    load_ns: int = 0
    started_ns: int = field(default_factory=time.perf_counter_ns)
    _n_calls: int = field(default=0, init=False)

    def part(self, piece: Piece, **more: Any) -> dict[str, Any]:
        """A line, or with `done` the last of them."""
        head = {"model": self.model, "created_at": now()}
        if self.chats:
            message: dict[str, Any] = {"role": "assistant", "content": piece.text}
            message |= {"thinking": piece.thinking} if piece.thinking else {}
            if piece.calls:
                message["tool_calls"] = [self._call(call) for call in piece.calls]
            body: dict[str, Any] = {"message": message}
        else:
            body = {"response": piece.text}
            body |= {"thinking": piece.thinking} if piece.thinking else {}
        if piece.logprobs:
            body["logprobs"] = [logprob_fields(token) for token in piece.logprobs]
        return {**head, **body, "done": False, **more}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        index, self._n_calls = self._n_calls, self._n_calls + 1
        function = {"index": index, "name": call.name, "arguments": dict(call.arguments)}
        return {"id": call.id, "function": function}

    def last_fields(self, chunk: Chunk) -> dict[str, Any]:
        """The fields that only the last line has: why the answer ended, times and counts."""
        total = time.perf_counter_ns() - self.started_ns
        durations = {"total_duration": total, "load_duration": self.load_ns}
        figures = {} if chunk.stats is None else _figures(chunk.stats)
        if chunk.error is not None:
            figures.setdefault("memory", {})["message"] = chunk.error.spelled(OLLAMA)
        return {"done": True, "done_reason": chunk.finish_reason, **durations, **figures}

    async def events(self, answer: Answer) -> sse.Events:
        """The answer as lines."""
        held = Piece()
        async for chunk in answer:
            held.add(chunk, self.calls)
            if held.is_shown or (chunk.finish_reason is not None and held.logprobs):
                yield line(self.part(held))
                held = Piece()
            if chunk.finish_reason is not None:
                yield line(self.part(Piece(), **self.last_fields(chunk)))

    async def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""
        piece, last = Piece(), {}
        async for chunk in answer:
            piece.add(chunk, self.calls)
            if chunk.finish_reason is not None:
                last = self.last_fields(chunk)
        return self.part(piece, **last)


def _figures(stats: Stats) -> dict[str, Any]:
    return {
        "prompt_eval_count": stats.prompt_tokens,
        "prompt_eval_cached_count": stats.restored_tokens,
        "prompt_eval_duration": round(stats.prefill_s * 1e9),
        "eval_count": stats.generated_tokens,
        "eval_duration": round(stats.decode_s * 1e9),
        "prompt_cache": {
            "prompt_tokens": stats.prompt_tokens,
            "restored_ram_tokens": stats.restored_ram_tokens,
            "restored_ssd_tokens": stats.restored_ssd_tokens,
            "computed_tokens": stats.computed_tokens,
            "shifted_tokens": stats.shifted_tokens,
            "diverged_at": stats.diverged_at,
            "miss": stats.miss and dataclasses.asdict(stats.miss),
            **({"moved_chars": stats.moved_chars} if stats.moved_chars else {}),
            **media_details(stats),
            **upper_details(stats),
            **ahead_details(stats),
            **draft_details([stats]),
        },
        "memory": {
            "kv_bytes": stats.kv_bytes,
            "gave_way": [dataclasses.asdict(rung) for rung in stats.rungs],
        },
    }
