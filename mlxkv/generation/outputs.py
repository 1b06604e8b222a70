"""What comes of an answer: chunks, results, figures. Nothing here needs MLX."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlxkv.errors import OutOfMemory
from mlxkv.memory.types import Rung
from mlxkv.parsers.events import ToolCall


@dataclass(frozen=True, slots=True)
class Miss:
    """Why part of a cached prefix had to be recomputed.

    Args:
        reason: `diverged`: the prompt differs from the cached sequence; `dropped`: KV of the shared
            prefix was evicted, or its file was damaged; `state`: of a model with layers that keep a
            state, which is kept in few places, the last of those is further back.
        token: position of the first token that differs, or whose KV was missing.
        held: text around it in the cached sequence, the position marked by `|`.
        prompt: the same in the prompt.
        n_tokens: tokens that were computed and would have been restored otherwise.
        cost_s: their part of the prefill time, in seconds.
    """

    reason: str
    token: int
    held: str
    prompt: str
    n_tokens: int
    cost_s: float


@dataclass(frozen=True, slots=True)
class DraftStats:
    """What drafts gave an answer.

    Args:
        passes: steps of the model that had a draft.
        proposed: drafted tokens that were computed.
        accepted: those of them that were right.
        by: drafter -> (proposed, accepted); `grammar` stands for what a format forces.
    """

    passes: int
    proposed: int
    accepted: int
    by: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Stats:
    """Times, token counts and memory of an answer.

    Args:
        prompt_tokens: length of the prompt.
        restored_tokens: leading tokens of it whose KV was held.
        restored_ram_tokens: those of them that were in memory.
        restored_ssd_tokens: those that were read from disk.
        computed_tokens: the rest, which was prefilled.
        generated_tokens: tokens of the answer, its end token included.
        prefill_s: seconds of prefill, up to the first token's logits.
        decode_s: seconds from the first token to the last.
        first_token_s: seconds from the call to the first token.
        peak_bytes: MLX's peak memory during the answer, weights included; None of a server's
            answer, beside which others run.
        kv_bytes: allocated KV at the end.
        diverged_at: the first prompt token that differs from what was held, if one did.
        miss: why not more was restored; None where everything was that could be.
        rungs: what was done to find memory, in that order.
        shifted_tokens: oldest tokens that were dropped because the context was full; those of the
            prompt are not in `prompt_tokens`.
        moved_chars: characters that `serve --agent-prompts` moved behind what stays the same.
        ahead_tokens: restored tokens that were computed before the prompt came, while there were no
            requests.
        ahead_saved_s: seconds that saved, estimated from the speed at which they were computed.
        image_tokens: tokens of the prompt that are rows of pictures.
        audio_tokens: those that are rows of sound.
        drafts: what drafts gave; None where there were none.
        upper_tokens: computed tokens of which only the layers from an adapter's border on were
            computed, the lower ones restored.
    """

    prompt_tokens: int
    restored_tokens: int
    restored_ram_tokens: int
    restored_ssd_tokens: int
    computed_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    first_token_s: float
    peak_bytes: int | None
    kv_bytes: int
    diverged_at: int | None = None
    miss: Miss | None = None
    shifted_tokens: int = 0
    rungs: tuple[Rung, ...] = ()
    moved_chars: int = 0
    ahead_tokens: int = 0
    ahead_saved_s: float = 0.0
    image_tokens: int = 0
    audio_tokens: int = 0
    drafts: DraftStats | None = None
    upper_tokens: int = 0

    @property
    def tokens_a_pass(self) -> float:
        """Tokens of the answer for each step of the model: 1 without drafts."""
        n = self.generated_tokens - (0 if self.drafts is None else self.drafts.accepted)
        return self.generated_tokens / n if n > 0 else 1.0

    @property
    def prefill_tps(self) -> float:
        """Tokens computed per second of prefill: restored ones do not count."""
        return self.computed_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """Tokens per second after the first."""
        n = self.generated_tokens - 1
        return n / self.decode_s if self.decode_s and n > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was.

    Args:
        token: its id.
        text: what it adds to the text before it; a part of a character shows as U+FFFD.
        bytes: the same, in which parts of a character are what they are.
        logprob: natural logarithm of its probability; None of a prompt's first token.
        top: the likeliest tokens at its place.
    """

    token: int
    text: str
    bytes: bytes
    logprob: float | None
    top: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step of a stream.

    Args:
        text: text for the user that is final; may be empty while a character, a stop text or a
            marker is incomplete.
        token: the token id behind it; None on a closing chunk that no token belongs to.
        finish_reason: on the last chunk: `stop` (an end token or a stop text), `length`, or
            `memory`: there was no room for more.
        stats: on the last chunk.
        reasoning: text of the model's reasoning, None if there is none in this step.
        tool_calls: calls that are complete with this step, or cut off by the end of the answer.
        logprobs: of the token, if they were asked for.
        error: with `memory`: the numbers, and what would have helped.
        stopped_by: the stop text that ended it, on the last chunk.
        prompt_tokens: length of the prompt, on the first chunk.
        prompt_logprobs: of the prompt's tokens, on the first chunk, if they were asked for.
    """

    text: str
    token: int | None = None
    finish_reason: str | None = None
    stats: Stats | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: TokenLogprobs | None = None
    error: OutOfMemory | None = None
    stopped_by: str | None = None
    prompt_tokens: int | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer.

    Args:
        text: the answer, without reasoning and calls.
        tokens: ids of all that was written, without the end token.
        finish_reason: `stop`, `length` or `memory`, see `Chunk`.
        stats: what it took.
        reasoning: what the model thought before it answered, None for nothing.
        tool_calls: what it wants called.
        error: with `memory`, see `Chunk`.
        logprobs: of each token, if they were asked for.
        prompt_logprobs: of each token of the prompt, if they were asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    stats: Stats
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    error: OutOfMemory | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Parts:
    """What one step of an answer adds: see `Chunk`."""

    text: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


def join_parts(
    parts: Iterable[Parts | Chunk],
) -> tuple[str, str, tuple[ToolCall, ...]]:
    """Text, reasoning and calls of several steps."""
    text, reasoning, calls = [], [], []
    for part in parts:
        text.append(part.text)
        reasoning.append(part.reasoning or "")
        calls += part.tool_calls
    return "".join(text), "".join(reasoning), tuple(calls)


def reply_message(text: str, reasoning: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """An answer as a message of a chat template. Calls with an error are part of its text."""
    text += "".join(call.text for call in calls if call.error is not None)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if sound := [call for call in calls if call.error is None]:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for call in sound
        ]
    return message
