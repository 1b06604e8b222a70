"""Types of fields that several APIs share."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    create_model,
    model_validator,
)
from pydantic_core import core_schema

from mlxkv.errors import UsageError
from mlxkv.generation.request import MAX_LOGPROBS
from mlxkv.sampling.params import PARAMETERS, Parameter
from mlxkv.store.adapter_names import MOST


def _empty(value: Any) -> Any:
    if value:
        raise ValueError("not supported")
    return value


Refused = Annotated[Any, AfterValidator(_empty)]
"""A field that may only be empty."""


def only(*off: Any) -> AfterValidator:
    """Refuse all values but those at which a field does nothing; null is one of them."""

    def check(value: Any) -> Any:
        if value is not None and value not in off:
            shown = " or ".join(json.dumps(each) for each in off) or "null"
            raise ValueError(f"not supported; only {shown} (off) is taken")
        return value

    return AfterValidator(check)


class LeftOut(BaseModel):
    """An item of a list that this server has no use for: the request is served without it, and
    `ignored` names it by its `type`."""

    model_config = ConfigDict(extra="allow", strict=True)


def type_of(value: Any) -> str | None:
    """The `type` of an item, before or after it is read."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


class NoEffect:
    """Marks a declared field that changes nothing, as `Annotated[..., NoEffect()]`."""


MAX_ITEMS = 10_000
"""Messages of a conversation, parts of a message, and other items of lists."""
_PLAIN = (None, "any", "str", "int", "float")
MAX_UNKNOWN = 20
"""Unknown fields of a part of a request that are looked at, where they are refused."""
MAX_WHOLE = 2**31 - 1
MAX_REAL = 1e6
Count = Annotated[int, Field(ge=1, le=MAX_WHOLE)]
Limit = Annotated[Count | None, BeforeValidator(lambda value: None if value == -1 else value)]
"""Length of an answer; -1 is none, as several clients send it."""
Whole = Annotated[int, Field(ge=0, le=MAX_WHOLE)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
DrafterName = Annotated[str, Field(min_length=1, max_length=256)]
"""What drafts an answer: one of `checkpoint.mlxkv_json.DRAFTS`, or the name of a model."""
AdapterName = Annotated[str, Field(min_length=1, max_length=256)]
AdapterNames = AdapterName | Annotated[list[AdapterName], Field(max_length=MOST)]
"""Adapters that the model has for an answer, see `store.adapter_names`."""
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
_TOKEN_ID = re.compile(r"[0-9]{1,9}")
_MOST_BIAS = 1e6


def _first_invalid_bias(value: Any) -> Any:
    """Refuse the first invalid entry alone: each would become an error or two."""
    if not isinstance(value, dict):
        return value
    for token, bias in value.items():
        if not _TOKEN_ID.fullmatch(token):
            raise ValueError(f"{token[:40]!r} is not a token id")
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not is_number or not -_MOST_BIAS <= bias <= _MOST_BIAS:
            raise ValueError(f"the bias of token {token} must be a number within 1e6 of 0")
    return value


LogitBias = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
        Annotated[float, Field(ge=-_MOST_BIAS, le=_MOST_BIAS)],
    ],
    BeforeValidator(_first_invalid_bias),
]
"""Token id -> what is added to its logit."""
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
StopTexts = Annotated[list[StopText], Field(max_length=16)]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_S = 1e9


def _bound_lists(schema: Any, model: type[BaseModel]) -> None:
    """Bound the lists in a model's core schema: they end at their first invalid item, as each would
    become an error, and have `MAX_ITEMS` items if those are more than a text or a number.

    Lists within other models are bounded where those are made.
    """
    nodes = [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list | tuple):
            nodes.extend(node)
        elif isinstance(node, dict):
            if node.get("type") == "list":
                node["fail_fast"] = True
                if node.get("items_schema", {}).get("type") not in _PLAIN:
                    node["max_length"] = min(node.get("max_length") or MAX_ITEMS, MAX_ITEMS)
            is_other = node.get("type") == "model" and node["cls"] is not model
            nodes.extend(() if is_other else node.values())


class Part(BaseModel):
    """A part of a request. Values of other types are refused; fields that are not declared change
    nothing, and `ignored.note` names them.

    A field that would change the answer and is not supported is declared, as `Refused` or with the
    values at which it does nothing (`only`).
    """

    model_config = ConfigDict(extra="allow", strict=True)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        schema = handler(source)
        _bound_lists(schema, cls)
        return schema


class Strict(Part):
    """A part of a request that changes what is stored: fields that are not declared are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_unknown_fields(cls, data: Any) -> Any:
        """Keep the first unknown fields alone: each of them becomes an error."""
        if not isinstance(data, dict) or len(data) <= MAX_UNKNOWN:
            return data
        declared = {info.alias or name for name, info in cls.model_fields.items()}
        known = {name: data[name] for name in declared & data.keys()}
        return known | dict(islice(data.items(), MAX_UNKNOWN))


class Sampled(Part):
    """A request with sampling parameters; `sampled` makes its fields.

    Attributes:
        spellings: field -> parameter; several may be one parameter.
    """

    spellings: ClassVar[Mapping[str, str]] = {}

    def sampling(self) -> dict[str, Any]:
        """The parameters that are set, as keywords of `Request.of`.

        Raises:
            UsageError: one is set twice.
        """
        found: dict[str, Any] = {}
        for spelling, name in self.spellings.items():
            value, instead = getattr(self, spelling), PARAMETERS[name].minus_one
            if value is None:
                continue
            if name in found:
                raise UsageError(f"{name} and {spelling} are one thing: give one")
            found[name] = instead if value == -1 and instead is not ... else value
        return found


def sampled(spellings: Mapping[str, str]) -> type[Sampled]:
    """A base class with a field for each parameter, in the range that the table has, and -1.

    Args:
        spellings: field -> parameter.
    """
    made: Any = {
        spelling: (_range(PARAMETERS[name]) | None, None) for spelling, name in spellings.items()
    }
    base = create_model("Sampled", __base__=Sampled, **made)
    base.spellings = spellings
    return base


def _range(parameter: Parameter) -> Any:
    most = MAX_WHOLE if parameter.kind is int else MAX_REAL
    limits = {
        "gt" if parameter.above else "ge": parameter.low,
        "le": most if math.isinf(parameter.high) else parameter.high,
    }
    if parameter.minus_one is not ...:
        limits["ge"] = -1
    return Annotated[parameter.kind, Field(**limits)]


def one_or_more(value: str | list[str]) -> list[str]:
    """One text or a list of texts, as a list."""
    return [value] if isinstance(value, str) else value


def seconds(value: float | str | None) -> float | None:
    """`keep_alive` in seconds: a number, or Ollama's `1h30m`; negative is for ever.

    Raises:
        UsageError: it is neither, or longer than 1e9 s.
    """
    if isinstance(value, str):
        text = value.removeprefix("-")
        parts = _DURATION.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            raise UsageError(
                f'keep_alive must be seconds, or a time like "5m" or "1h30m"; got {value[:40]!r}'
            )
        total = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
        value = -total if value.startswith("-") else total
    if value is not None and not value <= _LONGEST_S:
        raise UsageError(f"keep_alive must be at most {_LONGEST_S:.0e} s; negative: for ever")
    return value
