"""What is asked of a model, and how its tokens become chunks; `chunks` has what these are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxkv.checkpoint import mlxkv_json
from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Chunk, Miss, Parts, Result, Stats, TokenLogprobs, join_parts
from mlxkv.generation.reader import AnswerReader, read_answer
from mlxkv.generation.stats import Clock, explain_miss
from mlxkv.sampling.params import SamplingParams
from mlxkv.text.stop_strings import StopTexts

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
        mlxkv_json.checked(bounds)
        return cls(max_tokens, texts, truncate, params, on_progress, think, tools, **bounds)
