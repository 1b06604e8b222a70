"""Requests of Ollama's API, converted to keywords of `Request.of`.

Differences from Ollama:

- `truncate` and `shift` are off by default: a prompt longer than the context is an error, and no
  token is dropped silently. Without `num_ctx` the model's own setting counts.
- `template`, `suffix`, `context`: refused unless empty.
- Options of device and loading (`Loading`) are accepted and ignored. Options of samplers that mlxkv
  does not have are accepted at the value that means "off".
"""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Annotated, Any, Literal

from pydantic import Field

from mlxkv.errors import UsageError
from mlxkv.media.kinds import kind_of
from mlxkv.sampling.grammar import Grammar
from mlxkv.sampling.params import PARAMETERS
from mlxkv.server.fields import (
    MAX_WHOLE,
    AdapterNames,
    DrafterName,
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
from mlxkv.server.media.content import Content, Given, Place, content_of, refused

Images = list[str] | None
"""Pictures and sound in base64."""
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
            UsageError: none, or two different names.
        """
        names = {self.model, self.name} - {None, ""}
        if len(names) != 1:
            raise UsageError("model and name differ: give one" if names else "model is required")
        return names.pop() or ""


class Answered(Named):
    """Fields of requests that generate text."""

    options: Options | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    stream: bool | None = None
    keep_alive: Real | str | None = None
    think: Think | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="More variables of the model's chat template."
    )
    truncate: bool | None = None
    shift: bool | None = None
    draft: DrafterName | None = None
    adapter: AdapterNames | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    @property
    def keep_alive_s(self) -> float | None:
        """Seconds that the model stays loaded; negative: for ever."""
        return keep_alive_s(self.keep_alive)

    @property
    def n_logprobs(self) -> int | None:
        """The value of `Request.logprobs`.

        Raises:
            UsageError: `top_logprobs` without `logprobs`.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def keywords(self) -> dict[str, Any]:
        """Keywords of `Request.of`.

        Raises:
            UsageError: values that contradict each other.
        """
        made = (self.options or Options()).keywords()
        if self.shift is not None:
            made["overflow"] = "shift" if self.shift else "stop"
        if self.options is not None and self.options.num_predict == -2:
            made["overflow"] = "stop"
        return made | {
            "truncate": self.truncate,
            "think": self.think,
            "format": self.grammar(),
            "template_options": self.chat_template_kwargs or None,
            "draft": self.draft,
            "adapter": self.adapter,
        }

    def grammar(self) -> Grammar | None:
        """The grammar that the answer must follow; None for any text."""
        if isinstance(self.format, dict):
            return Grammar("json_schema", json.dumps(self.format))
        return Grammar("json_object") if self.format else None


class GenerateRequest(Answered):
    """A prompt to answer, or with `raw` a text to continue."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    template: Refused = None
    suffix: Refused = None
    context: Refused = Field(None, description="Not supported: use /api/chat.")
    images: Images = None

    def engine_prompt(self) -> str | list[dict[str, Any]]:
        """The raw text, or messages.

        Raises:
            UsageError: `system` with `raw`. RequestValidationError: `images` with `raw`.
        """
        if self.raw and self.images:
            raise refused(("images",), "not allowed with raw, which uses no chat template")
        if self.raw:
            if self.system:
                raise UsageError("system is not allowed with raw, which uses no chat template")
            return self.prompt or ""
        system = [{"role": "system", "content": self.system}] if self.system else []
        content = content_with(("images",), self.images, self.prompt or "")
        return [*system, {"role": "user", "content": content}]


def content_with(place: Place, images: Images, text: str, is_result: bool = False) -> Content:
    """A message's pictures, and behind them its text, as Ollama writes them.

    Args:
        place: the field of the pictures.
        images: in base64, sound too.
        text: of the message.
        is_result: whether a tool gave it.
    """
    given = [
        Given(_kind_of(data), (*place, i), data, is_result=is_result)
        for i, data in enumerate(images or ())
    ]
    return content_of([*given, text] if text or not given else given, "")


def _kind_of(data: str) -> str:
    """What a file of `images` is: Ollama's API has no other field for sound."""
    start = data[data.find(",") + 1 if data.startswith("data:") else 0 :][:88]
    try:
        return kind_of(b64decode(start[: len(start) // 4 * 4])) or "image"
    except ValueError:  # refused later, with its field
        return "image"


def keep_alive_s(value: float | str | None) -> float | None:
    """`seconds`, which here also accepts a number as text.

    Raises:
        UsageError: not a duration.
    """
    if isinstance(value, str):
        digits = value.strip().removeprefix("-")
        if digits.isascii() and digits.isdigit() and len(digits) <= 12:
            value = float(value)
    return seconds(value)
