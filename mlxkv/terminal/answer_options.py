"""What a person sets for answers, on the command line and in a chat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from mlxkv.errors import UsageError

if TYPE_CHECKING:
    from mlxkv.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How answers are made; None leaves it to the model.

    `format` is what `Grammar.of` reads: "json" or a JSON schema.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    truncate: bool = False
    think: bool | str | None = None
    format: str | Mapping[str, Any] | None = None


def check(settings: AnswerOptions) -> None:
    """Refuses what is out of range before a model is loaded.

    Raises:
        UsageError: names the option and what is allowed.
    """
    if settings.max_tokens is not None and settings.max_tokens < 1:
        raise UsageError(f"must be 1 or more; got {settings.max_tokens}", field="max_tokens")
    if "" in settings.stop:
        raise UsageError("must not be empty", field="stop")
    from mlxkv.sampling.params import SamplingParams

    SamplingParams(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repeat_penalty=settings.repeat_penalty,
        seed=settings.seed,
    )


def with_defaults(
    settings: AnswerOptions, advice: SamplingParams, repeat_penalty: float | None = None
) -> AnswerOptions:
    """The settings, with what is not set taken from the model's own recommendation.

    Args:
        settings: what the user set.
        advice: what the model recommends.
        repeat_penalty: where neither says.
    """
    values = {"repeat_penalty": repeat_penalty, **advice.chosen()}
    unset = {name: x for name, x in values.items() if getattr(settings, name) is None}
    return replace(settings, **unset)


def options_of(settings: AnswerOptions) -> dict[str, Any]:
    """The settings as `stream` and `send` take them."""
    return {field.name: getattr(settings, field.name) for field in fields(settings)}
