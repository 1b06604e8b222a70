"""What is asked of a model, and how its tokens become chunks; `chunks` has what these are."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxkv import settings
from mlxkv.chunks import Chunk, Miss, Parts, Result, Stats, TokenLogprobs, join_parts
from mlxkv.errors import UsageError
from mlxkv.pages import WORTH
from mlxkv.parsing import Content, Event, OutputParser, PlainParser, Reasoning, ToolCall
from mlxkv.sampling_params import SamplingParams
from mlxkv.session import Restored
from mlxkv.stopping import StopTexts
from mlxkv.tokenizer import Tokenizer

__all__ = [
    "AnswerReader",
    "Chunk",
    "Clock",
    "Message",
    "Miss",
    "Parts",
    "Request",
    "Result",
    "Stats",
    "TokenLogprobs",
    "explain_miss",
    "join_parts",
    "read_answer",
]

Message = Mapping[str, Any]
EFFORTS = ("low", "medium", "high")
AROUND = 12
"""Tokens shown on either side of where a prompt left what was held."""


@dataclass(frozen=True, slots=True)
class Request:
    """Everything about an answer but its prompt; None takes the default.

    Args:
        max_tokens: length of the answer; None for as long as the context allows.
        stop: texts that end the answer and are not part of it.
        truncate: cut the head of a prompt that is longer than the context.
        sampling: how tokens are chosen.
        on_progress: called with (done, all) tokens during a long prefill.
        think: reason before the answer, as far as the chat template has a switch for it: True,
            False, or how much (low, medium, high); None leaves it to the model.
        tools: JSON schemas of functions that the model may call.
        context: tokens that prompt and answer may have together; None for the model's setting,
            and so for the two below.
        overflow: what happens there: `stop`, or `shift`.
        keep: leading tokens that a shift keeps, besides the system prompt.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    truncate: bool = False
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    on_progress: Callable[[int, int], None] | None = None
    think: bool | str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    context: int | None = None
    overflow: str | None = None
    keep: int | None = None

    @classmethod
    def of(
        cls,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        truncate: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
        think: bool | str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        context: int | None = None,
        overflow: str | None = None,
        keep: int | None = None,
        **sampling: Any,
    ) -> Request:
        """Build one from the keywords of `LLM.stream`.

        Raises:
            UsageError: an unknown keyword, or a value out of its range.
        """
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        if unknown := sorted(sampling.keys() - known):
            raise UsageError(
                f"unknown option {unknown[0]!r}; allowed are {', '.join(sorted(known))}"
            )
        if max_tokens is not None and (
            isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1
        ):
            raise UsageError(f"--max-tokens must be at least 1; got {max_tokens!r}")
        if think not in (None, True, False, *EFFORTS):
            raise UsageError(f"think must be on, off, {', '.join(EFFORTS)}; got {think!r}")
        texts = StopTexts(stop).texts
        params = SamplingParams(**sampling)
        bounds = {"context": context, "overflow": overflow, "keep": keep}
        settings.checked(bounds)
        return cls(max_tokens, texts, truncate, params, on_progress, think, tools, **bounds)


class Clock:
    """When an answer began, and when its first and last tokens came."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first: float | None = None
        self.last = self.start

    def tick(self) -> None:
        self.last = time.perf_counter()
        if self.first is None:
            self.first = self.last

    def stats(
        self,
        prompt: Sequence[int],
        restored: Restored,
        n_generated: int,
        kv_bytes: int,
        tokenizer: Tokenizer,
    ) -> Stats:
        first = self.last if self.first is None else self.first
        n_prompt = len(prompt)
        return Stats(
            prompt_tokens=n_prompt,
            restored_tokens=restored.n_tokens,
            restored_ram_tokens=restored.n_tokens - restored.ssd_tokens,
            restored_ssd_tokens=restored.ssd_tokens,
            computed_tokens=n_prompt - restored.n_tokens,
            generated_tokens=n_generated,
            prefill_s=first - self.start,
            decode_s=self.last - first,
            first_token_s=first - self.start,
            peak_bytes=mx.get_peak_memory(),
            kv_bytes=kv_bytes,
            diverged_at=restored.diverged_at(n_prompt),
            miss=explain_miss(prompt, restored, first - self.start, tokenizer),
        )


def explain_miss(
    prompt: Sequence[int], restored: Restored, prefill_s: float, tokenizer: Tokenizer
) -> Miss | None:
    """Why not more of a prompt was restored; None where there was no more to restore.

    A few tokens of what is shared are computed again as a rule, and are no miss.
    """
    token = restored.diverged_at(len(prompt))
    n_lost = min(restored.n_known, len(prompt) - 1) - restored.n_tokens
    reason = "diverged"
    n_dropped = min(restored.shared, len(prompt) - 1) - restored.n_tokens
    if n_dropped > WORTH:
        reason, token, n_lost = "dropped", restored.n_tokens, n_dropped
    if token is None or n_lost <= 0:
        return None

    before = tokenizer.decode(list(prompt[max(0, token - AROUND) : token]))

    def marked(after: Sequence[int]) -> str:
        return f"{before}|{tokenizer.decode(list(after[:AROUND]))}"

    return Miss(
        reason,
        token,
        marked(restored.held) if reason == "diverged" else "",
        marked(prompt[token:]),
        n_lost,
        prefill_s * n_lost / (len(prompt) - restored.n_tokens),
    )


class AnswerReader:
    """Tokens to text, reasoning and tool calls.

    Stop texts are looked for in the text for the user alone: reasoning may hold them.

    Args:
        tokenizer: the model's.
        parser: of its output; None for plain text.
        stop: stop texts.
    """

    def __init__(
        self, tokenizer: Tokenizer, parser: OutputParser | None = None, stop: Sequence[str] = ()
    ):
        self._parser = PlainParser() if parser is None else parser
        self._words = tokenizer.stream(keep=self._parser.markers)
        self._ends = tokenizer.eos_token_ids
        self._shown_ends = {tokenizer.id_of(marker) for marker in self._parser.markers}
        self._stop = StopTexts(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self._stop.stopped

    @property
    def stopped_by(self) -> str | None:
        """The stop text that came."""
        return self._stop.found

    def add(self, token: int) -> Parts:
        """The next token; an end token adds nothing, unless it is a marker of the format."""
        if token in self._ends and token not in self._shown_ends:
            return Parts()
        return self._parts(self._parser.add(self._words.add(token), token))

    def finish(self) -> Parts:
        """What was held back; nothing after a stop text."""
        if self.stopped:
            return Parts()
        events = [*self._parser.add(self._words.finish()), *self._parser.finish()]
        parts = self._parts(events)
        if self.stopped:
            return parts
        return dataclasses.replace(parts, text=parts.text + self._stop.finish())

    def _parts(self, events: Iterable[Event]) -> Parts:
        text, reasoning, calls = "", None, []
        for event in events:
            match event:
                case Content():
                    text += self._stop.add(event.text)
                    if self.stopped:
                        break
                case Reasoning():
                    reasoning = (reasoning or "") + event.text
                case ToolCall():
                    calls.append(event)
        return Parts(text, reasoning, tuple(calls))


def read_answer(
    tokenizer: Tokenizer, parser: OutputParser, tokens: Iterable[int]
) -> tuple[str, str, tuple[ToolCall, ...]]:
    """Text, reasoning and calls of a whole answer."""
    reader = AnswerReader(tokenizer, parser)
    parts = [*map(reader.add, tokens), reader.finish()]
    return join_parts(parts)
