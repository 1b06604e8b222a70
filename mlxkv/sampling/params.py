"""How tokens are to be chosen: what a request says and what a model recommends.

The fields of `SamplingParams` are the table of parameters. The options of `mlxkv run`, the chat's
parameters and the fields of the HTTP APIs are made of it. A new parameter is an entry here, and its
mathematics in `sampler`. Nothing here needs MLX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from types import EllipsisType
from typing import Any

from mlxkv.checkpoint.config import read_json
from mlxkv.errors import ConfigError, Spelling, UsageError


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a sampling parameter is, for all interfaces.

    Args:
        kind: int or float.
        off: its value where neither the caller nor the model sets it; None for none.
        allowed: the range in words, for errors.
        low: the smallest value.
        high: the largest value.
        above: whether `low` itself is out of the range.
        help: the option's help in `mlxkv run`; "" where neither that nor the chat has it.
        letter: the option's short form.
        config: its key in a model's generation_config.json, where that may recommend it; OpenAI's
            APIs take this name too.
        minus_one: what -1 stands for in the HTTP APIs; `...` where it stands for nothing else.
    """

    kind: type[int] | type[float]
    off: float | None
    allowed: str
    low: float
    high: float = math.inf
    above: bool = False
    help: str = ""
    letter: str = ""
    config: str = ""
    minus_one: int | EllipsisType | None = ...

    def check(self, name: str, value: Any) -> None:
        """Refuse a value of another type or out of the range; None is not set.

        Raises:
            UsageError: says what is allowed.
        """
        is_kind = _is_whole if self.kind is int else _is_finite
        if value is None or (is_kind(value) and self._has(value)):
            return
        whole = "a whole number, " if self.kind is int else ""
        raise UsageError(f"must be {whole}{self.allowed}; got {_shown(value)}", field=name)

    def _has(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.above and value == self.low)


def _parameter(*args: Any, **more: Any) -> Any:
    return field(default=None, metadata={"parameter": Parameter(*args, **more)})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. None means "not set": see `merged` and `resolved`.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float | None = _parameter(
        float, 0.0, "0 or more", 0, letter="t", config="temperature",
        help="0 takes the likeliest token; default: the model's recommendation, or 0.",
    )  # fmt: skip
    """0 is greedy; logits are divided by it otherwise."""
    top_k: int | None = _parameter(
        int, 0, "0 (all) or more", 0, config="top_k", minus_one=0,
        help="Draw from the K likeliest; 0: all.",
    )  # fmt: skip
    """Keep the k likeliest tokens; 0, or anything past the vocabulary, keeps all."""
    top_p: float | None = _parameter(
        float, 1.0, "above 0 and at most 1", 0, 1, above=True, config="top_p",
        help="Draw from the likeliest P.",
    )  # fmt: skip
    """Keep the smallest set of likeliest tokens whose probabilities sum to this or more; tokens
    exactly as likely as the last one of the set stay too. 1 keeps all."""
    min_p: float | None = _parameter(
        float, 0.0, "between 0 and 1", 0, 1, config="min_p",
        help="Drop what is less likely than P x the likeliest.",
    )  # fmt: skip
    """Keep tokens at least this fraction as likely as the likeliest; 0 keeps all."""
    repeat_penalty: float | None = _parameter(
        float, 1.0, "above 0", 0, above=True, config="repetition_penalty",
        help="Above 1 makes repetition less likely.",
    )  # fmt: skip
    """Positive logits of recent tokens are divided by it, negative multiplied (CTRL,
    arXiv:1909.05858). 1 is off."""
    repeat_last_n: int | None = _parameter(int, 64, "0 (off) or more", 0, minus_one=2**31 - 1)
    """How many recent tokens count as recent; 0 is off."""
    seed: int | None = _parameter(
        int, None, "from 0 to 2^64 - 1", 0, 2**64 - 1, minus_one=None,
        help="The same seed gives the same answer.",
    )  # fmt: skip
    """The same seed, logits and parameters give the same tokens, whatever MLX's global random state
    is; unset draws a fresh one."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids first."""
    presence_penalty: float | None = _parameter(
        float, 0.0, "between -2 and 2", -2, 2,
        help="Above 0 makes what the answer has less likely, -2 to 2.",
    )  # fmt: skip
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: float | None = _parameter(
        float, 0.0, "between -2 and 2", -2, 2,
        help="The same for each time that the answer has it.",
    )  # fmt: skip
    """Subtracted once for each time that the answer has the token."""

    def __post_init__(self) -> None:
        for name, parameter in PARAMETERS.items():
            parameter.check(name, getattr(self, name))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    def merged(self, defaults: SamplingParams) -> SamplingParams:
        """These parameters, with what is not set taken from `defaults`."""
        unset = {f.name for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **{name: getattr(defaults, name) for name in unset})

    def resolved(self) -> SamplingParams:
        """These parameters, with what is not set taken from `DEFAULTS` (seed and bias may stay)."""
        return self.merged(DEFAULTS)

    def chosen(self) -> dict[str, Any]:
        """Those that are set, by name."""
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    @classmethod
    def from_generation_config(cls, raw: Mapping[str, Any], source: str) -> SamplingParams:
        """What a model's generation_config.json recommends; keys it lacks stay unset.

        Args:
            raw: the parsed file.
            source: its path, for errors.

        Raises:
            ConfigError: a value that is out of its range.
        """
        values = {
            ours: raw[key] for key, ours in GENERATION_CONFIG.items() if raw.get(key) is not None
        }
        # transformers samples only where do_sample says so, whatever the temperature is.
        if raw.get("do_sample") is False:
            values["temperature"] = 0.0
        try:
            return cls(**values)
        except UsageError as error:
            raise ConfigError(f"{source}: {error.spelled(_FileKeys())}") from None


class _FileKeys(Spelling):
    """As generation_config.json has them."""

    def name(self, field: str) -> str:
        return next((key for key, ours in GENERATION_CONFIG.items() if ours == field), field)


def recommended(folder: Path) -> SamplingParams:
    """The sampling that the generation_config.json of a model's directory recommends."""
    source = folder / "generation_config.json"
    if not source.exists():
        return SamplingParams()
    return SamplingParams.from_generation_config(read_json(source), str(source))


def suppressed(folder: Path) -> frozenset[int]:
    """Tokens that a model must not write: `suppress_tokens` of its generation_config.json.

    Raises:
        ConfigError: it is no list of token ids.
    """
    source = folder / "generation_config.json"
    ids = read_json(source).get("suppress_tokens") if source.exists() else None
    if not isinstance(ids or [], list) or not all(_is_whole(i) and i >= 0 for i in ids or []):
        raise ConfigError(f"{source}: suppress_tokens must be a list of token ids; got {ids!r}")
    return frozenset(ids or [])


def _checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise UsageError(f"must map token ids to numbers; got {bias!r}", field="logit_bias")
    for token, value in bias.items():
        if not _is_whole(token) or token < 0:
            raise UsageError(
                f"has a token id that is no whole number, 0 or more: {_shown(token)}",
                field="logit_bias",
            )
        if not _is_finite(value):
            raise UsageError(
                f"must be a finite number for token {token}; got {_shown(value)}",
                field="logit_bias",
            )
    return {int(token): float(value) for token, value in bias.items()}


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Real) else repr(value)


PARAMETERS: Mapping[str, Parameter] = {
    f.name: f.metadata["parameter"] for f in fields(SamplingParams) if f.metadata
}
"""All but `logit_bias`, which is no number."""
GENERATION_CONFIG = {p.config: name for name, p in PARAMETERS.items() if p.config}
"""Keys of a model's generation_config.json that are followed, and what they are called here."""
DEFAULTS = SamplingParams(**{name: p.off for name, p in PARAMETERS.items()})  # pyright: ignore[reportArgumentType]
"""What holds for a value that neither the caller nor the model sets."""
