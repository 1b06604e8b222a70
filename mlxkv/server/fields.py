"""Fields that requests of several APIs have."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from mlxkv.errors import UsageError

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_S = 1e9


class Strict(BaseModel):
    """A part of a request: other fields, and values of other types, are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


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
