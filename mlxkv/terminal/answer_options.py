"""The options of an answer, on the command line and in a chat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mlxkv.errors import UsageError
from mlxkv.sampling.params import PARAMETERS, SamplingParams

SAMPLING = {name: parameter for name, parameter in PARAMETERS.items() if parameter.help}
"""The sampling parameters of the command line and of a chat."""


@dataclass(frozen=True, slots=True)
class AnswerOptions(SamplingParams):
    """Sampling and other options of an answer; None leaves one to the model.

    `format` is what `Grammar.of` reads: "json" or a JSON schema.

    Raises:
        UsageError: a value out of its range.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    truncate: bool = False
    think: bool | str | None = None
    format: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"must be 1 or more; got {self.max_tokens}", field="max_tokens")
        if "" in self.stop:
            raise UsageError("must not be empty", field="stop")


def with_defaults(
    settings: AnswerOptions, advice: SamplingParams, repeat_penalty: float | None = None
) -> AnswerOptions:
    """The settings, with unset ones from the model's recommendation, or `repeat_penalty`."""
    values = {"repeat_penalty": repeat_penalty, **advice.chosen()}
    unset = {name: x for name, x in values.items() if getattr(settings, name) is None}
    return replace(settings, **unset)


def options_of(settings: AnswerOptions) -> dict[str, Any]:
    """The settings as `stream` and `send` take them."""
    return {field.name: getattr(settings, field.name) for field in fields(settings)}
