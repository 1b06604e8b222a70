"""Requests of Ollama's API, and what the engine is asked for them.

Fields that are not here are refused. What differs from Ollama:

- `truncate` and `shift` are off unless they are asked for: a prompt past the context is an error,
  and nothing is dropped silently. What `num_ctx` leaves out is the model's own setting.
- `template`, `suffix`, `context`, `images`: refused unless empty.
- Options of the device and of loading (`_LOADING`) are taken and change nothing: MLX needs none
  of them. Options of samplers that are not here are taken at the value that means "off".
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from mlxkv.errors import UsageError
from mlxkv.sampling.grammar import Grammar
from mlxkv.sampling.params import PARAMETERS
from mlxkv.server.fields import (
    MAX_WHOLE,
    NoEffect,
    Part,
    Real,
    Refused,
    StopText,
    StopTexts,
    TopLogprobs,
    Whole,
    only,
    sampled,
    seconds,
)

Think = bool | Literal["low", "medium", "high"]


class Loading(Part):
    """Options about the device and the loading of a model: taken, and without effect."""

    numa: Annotated[bool | None, NoEffect()] = None
    num_batch: Annotated[int | None, NoEffect()] = None
    num_gpu: Annotated[int | None, NoEffect()] = None
    main_gpu: Annotated[int | None, NoEffect()] = None
    num_thread: Annotated[int | None, NoEffect()] = None
    low_vram: Annotated[bool | None, NoEffect()] = None
    f16_kv: Annotated[bool | None, NoEffect()] = None
    use_mmap: Annotated[bool | None, NoEffect()] = None
    use_mlock: Annotated[bool | None, NoEffect()] = None
    logits_all: Annotated[bool | None, NoEffect()] = None


class Options(Loading, sampled({name: name for name in PARAMETERS})):
    """How an answer is made; what is left out, the model's settings decide.

    `num_predict` -1 and -2 are both as long as the context allows; with `shift` and -1 the answer
    has no bound of its own. `repeat_last_n` -1 is all of the context, `seed` -1 a random one.
    """

    num_ctx: Annotated[int, Field(ge=2, le=MAX_WHOLE)] | None = None
    num_keep: Whole | None = None
    num_predict: Annotated[int, Field(ge=-2, le=MAX_WHOLE)] | None = None
    stop: StopText | StopTexts | None = None
    mirostat: Annotated[int, only(0)] | None = None
    mirostat_tau: Annotated[Real | None, NoEffect()] = None
    mirostat_eta: Annotated[Real | None, NoEffect()] = None
    tfs_z: Annotated[float, only(1)] | None = None
    typical_p: Annotated[float, only(1)] | None = None
    penalize_newline: Annotated[bool, only(True)] | None = None
    embedding_only: Annotated[bool, only(False)] | None = None
    vocab_only: Annotated[bool, only(False)] | None = None

    def keywords(self) -> dict[str, Any]:
        """Keywords of `Request.of`.

        Raises:
            UsageError: an answer of no tokens.
        """
        n = self.num_predict
        if n == 0:
            raise UsageError(
                "options.num_predict must be 1 or more, -1 (no bound) or -2 (until the context "
                "is full); got 0"
            )
        return self.sampling() | {
            "max_tokens": n if n is not None and n > 0 else None,
            "context": self.num_ctx,
            "keep": self.num_keep,
            "stop": self.stop or None,
        }


class Named(Part):
    """A request that names a model; `name` is how older clients spell `model`."""

    model: str | None = None
    name: str | None = None

    @property
    def model_name(self) -> str:
        """The model.

        Raises:
            UsageError: there is none, or there are two.
        """
        given = {self.model, self.name} - {None, ""}
        if len(given) != 1:
            raise UsageError("model is required" if not given else "model and name are one thing")
        return given.pop() or ""


class Answered(Named):
    """What requests for answers share."""

    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    stream: bool | None = None
    keep_alive: Real | str | None = None
    think: Think | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    @property
    def keep_alive_s(self) -> float | None:
        """How long the model stays; negative is for ever."""
        return keep_alive_s(self.keep_alive)

    @property
    def n_logprobs(self) -> int | None:
        """As `Request.logprobs` has it.

        Raises:
            UsageError: the likeliest tokens are asked for, and not the chosen one.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def keywords(self) -> dict[str, Any]:
        """Keywords of `Request.of`.

        Raises:
            UsageError: values that do not go together.
        """
        made = (self.options or Options()).keywords()
        if self.shift is not None:
            made["overflow"] = "shift" if self.shift else "stop"
        if self.options is not None and self.options.num_predict == -2:
            made["overflow"] = "stop"
        return made | {"truncate": self.truncate, "think": self.think}

    def grammar(self) -> Grammar | None:
        """What the answer has to match."""
        if isinstance(self.format, dict):
            return Grammar("json_schema", json.dumps(self.format))
        return Grammar("json_object") if self.format else None


class GenerateRequest(Answered):
    """A text to be answered, or to go on from."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    template: Refused = None
    suffix: Refused = None
    context: Refused = Field(
        default=None, description="Use /api/chat: what was computed is found again."
    )
    images: Refused = None

    def engine_prompt(self) -> str | list[dict[str, Any]]:
        """The text as it is, or messages.

        Raises:
            UsageError: a system prompt beside a raw text.
        """
        if self.raw:
            if self.system:
                raise UsageError("with raw the prompt goes to the model as it is: no system")
            return self.prompt or ""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt or ""}]


def keep_alive_s(value: float | str | None) -> float | None:
    """Seconds; also of a number that is written as a text.

    Raises:
        UsageError: it is no duration.
    """
    if isinstance(value, str):
        digits = value.strip().removeprefix("-")
        if digits.isascii() and digits.isdigit() and len(digits) <= 12:
            value = float(value)
    return seconds(value)
