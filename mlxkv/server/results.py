"""Collects an answer's chunks, for all three APIs."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mlxkv.errors import OutOfMemory
from mlxkv.generation.outputs import Chunk, Stats, TokenLogprobs
from mlxkv.parsers.events import ToolCall
from mlxkv.server.errors import OPENAI

NEVER = -9999.0
"""OpenAI's log-probability of an impossible token; JSON has no infinity."""


@dataclass(slots=True)
class AnswerState:
    """Calls, counts and the end of an answer that is being read.

    Args:
        parallel: whether calls after the first are shown.
        n_calls: valid calls so far.
        n_reasoning: tokens of reasoning.
        n_prompt: tokens of the prompt, known from the first chunk on.
        n_tokens: tokens of the answer so far.
        reason: why it ended.
        stats: its times and counts, once it ended.
        error: the error, if memory ended it.
    """

    parallel: bool = True
    n_calls: int = 0
    n_reasoning: int = 0
    n_prompt: int = 0
    n_tokens: int = 0
    reason: str | None = None
    stats: Stats | None = None
    error: OutOfMemory | None = None

    def take(self, chunk: Chunk) -> list[ToolCall]:
        """Count a chunk, and return those of its calls that the client gets."""
        self.n_reasoning += chunk.reasoning is not None and chunk.token is not None
        self.n_prompt = chunk.prompt_tokens or self.n_prompt
        self.n_tokens += chunk.token is not None
        if chunk.stats is not None:
            self.n_prompt, self.n_tokens = chunk.stats.prompt_tokens, chunk.stats.generated_tokens
        self.reason, self.stats = chunk.finish_reason, chunk.stats
        self.error = chunk.error
        calls = [call for call in chunk.tool_calls if call.error is None]
        if not self.parallel:
            calls = calls[: max(0, 1 - self.n_calls)]
        self.n_calls += len(calls)
        return calls

    @property
    def finish_reason(self) -> str:
        """OpenAI's `stop`, `length` or `tool_calls`."""
        if self.reason in ("length", "memory"):
            return "length"
        return "tool_calls" if self.n_calls else "stop"

    @property
    def finish(self) -> dict[str, Any]:
        """`finish_reason`, and `finish_details` where memory was the reason."""
        if self.reason != "memory":
            return {"finish_reason": self.finish_reason}
        message = "the memory limit does not allow a longer answer"
        if self.error is not None:
            message = self.error.spelled(OPENAI)
        details = {"type": "memory", "message": message}
        return {"finish_reason": self.finish_reason, "finish_details": details}


@dataclass(slots=True)
class Collected:
    """A whole answer."""

    progress: AnswerState = field(default_factory=AnswerState)
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    errors: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        """Append a chunk."""
        self.calls += self.progress.take(chunk)
        self.errors += broken_calls(chunk)
        self.text += [chunk.text, *(call.text for call in broken_calls(chunk))]
        self.reasoning.append(chunk.reasoning or "")
        self.logprobs += shown_logprobs(chunk)


def broken_calls(chunk: Chunk) -> list[ToolCall]:
    """A chunk's invalid calls: clients get their text and `tool_call_errors`."""
    return [call for call in chunk.tool_calls if call.error is not None]


def call_errors(calls: Iterable[ToolCall]) -> list[dict[str, Any]]:
    """Each invalid call's name and error."""
    return [{"name": call.name, "error": call.error} for call in calls]


def arguments_of(call: ToolCall) -> str:
    """A call's arguments as JSON."""
    return json.dumps(call.arguments, ensure_ascii=False)


def shown_logprobs(chunk: Chunk) -> list[TokenLogprobs]:
    """A chunk's log-probabilities; none for a token of reasoning or of a call."""
    if chunk.logprobs is None or chunk.reasoning is not None or chunk.tool_calls:
        return []
    return [chunk.logprobs]


def finite(logprob: float | None) -> float | None:
    """A log-probability that JSON can hold."""
    return logprob if logprob is None or math.isfinite(logprob) else NEVER


def logprob_fields(token: TokenLogprobs) -> dict[str, Any]:
    """A token and its likeliest alternatives, as OpenAI and Ollama show them."""

    def fields(each: TokenLogprobs) -> dict[str, Any]:
        logprob = finite(each.logprob)
        return {"token": each.text, "logprob": logprob, "bytes": list(each.bytes)}

    return {**fields(token), "top_logprobs": [fields(each) for each in token.top]}


def usage_so_far(answer: AnswerState) -> dict[str, int]:
    """Token counts of an answer that is being read, under OpenAI's names."""
    return {
        "prompt_tokens": answer.n_prompt,
        "completion_tokens": answer.n_tokens,
        "total_tokens": answer.n_prompt + answer.n_tokens,
    }


def new_id(prefix: str) -> str:
    """A random id."""
    return f"{prefix}-{secrets.token_hex(12)}"


def details(stats: Stats | None) -> dict[str, Any]:
    """OpenAI's `cached_tokens`, how many tokens came from RAM, SSD or prefill, and what was moved
    for that."""
    if stats is None:
        return {"cached_tokens": 0}
    return {
        "cached_tokens": stats.restored_tokens,
        "restored_ram_tokens": stats.restored_ram_tokens,
        "restored_ssd_tokens": stats.restored_ssd_tokens,
        "computed_tokens": stats.computed_tokens,
        "miss": stats.miss and dataclasses.asdict(stats.miss),
        **({"moved_chars": stats.moved_chars} if stats.moved_chars else {}),
        **media_details(stats),
        **upper_details(stats),
        **ahead_details(stats),
    }


def upper_details(stats: Stats) -> dict[str, Any]:
    """Computed tokens whose lower layers were restored; empty where there were none."""
    return {"upper_tokens": stats.upper_tokens} if stats.upper_tokens else {}


def media_details(stats: Stats) -> dict[str, Any]:
    """Tokens of a prompt that are rows of pictures and of sound; empty for a text."""
    found = {"image_tokens": stats.image_tokens, "audio_tokens": stats.audio_tokens}
    return {name: n for name, n in found.items() if n}


def ahead_details(stats: Stats) -> dict[str, Any]:
    """What of a prompt was computed before it came, and an estimate of the seconds that saved;
    empty where nothing was."""
    if not stats.ahead_tokens:
        return {}
    return {"ahead_tokens": stats.ahead_tokens, "ahead_saved_s": stats.ahead_saved_s}


def draft_details(answers: Iterable[Stats | None]) -> dict[str, Any]:
    """What drafts gave some answers together; empty where there were none."""
    stats = [each for each in answers if each is not None]
    drafts = [each.drafts for each in stats if each.drafts is not None]
    if not drafts:
        return {}
    by: dict[str, dict[str, int]] = {}
    for name, (n, right) in [item for each in drafts for item in each.by.items()]:
        known = by.setdefault(name, {"proposed": 0, "accepted": 0})
        known["proposed"] += n
        known["accepted"] += right
    names = ("passes", "proposed", "accepted")
    figures = {name: sum(getattr(each, name) for each in drafts) for name in names}
    n_tokens = sum(each.generated_tokens for each in stats)
    per_pass = n_tokens / max(1, n_tokens - figures["accepted"])
    return {"drafts": {**figures, "tokens_per_pass": round(per_pass, 3), "by": by}}
