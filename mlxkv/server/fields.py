"""Fields that requests of several APIs have."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mlxkv.errors import UsageError
from mlxkv.generation.request import MAX_LOGPROBS


def _empty(value: Any) -> Any:
    if value:
        raise ValueError("not supported")
    return value


Refused = Annotated[Any, AfterValidator(_empty)]
"""A field that may only be empty."""
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
Temperature = Annotated[float, Field(ge=0, le=1e6)]
TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(gt=0, le=1e6)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
StopTexts = Annotated[list[StopText], Field(max_length=16)]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_S = 1e9


class Strict(BaseModel):
    """A part of a request: other fields, and values of other types, are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


def one_or_more(value: str | list[str]) -> list[str]:
    """A text or several, as several."""
    return [value] if isinstance(value, str) else value


def seconds(value: float | str | None) -> float | None:
    """`keep_alive` in seconds: a number, or Ollama's `1h30m`; negative is for ever.

    Raises:
        UsageError: it is neither, or longer than a calendar.
    """
    if isinstance(value, str):
        text = value.removeprefix("-")
        parts = _DURATION.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            raise UsageError(
                f'keep_alive must be seconds, or like "5m" or "1h30m"; got {value[:40]!r}'
            )
        total = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
        value = -total if value.startswith("-") else total
    if value is not None and not value <= _LONGEST_S:
        raise UsageError("keep_alive is too long: a negative one is for ever")
    return value
