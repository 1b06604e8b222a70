"""How tokens are to be chosen: what a request says and what a model recommends.

Nothing here needs MLX; `sampler` applies it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from mlxkv.checkpoint.config import read_json
from mlxkv.errors import ConfigError, Spelling, UsageError

GENERATION_CONFIG = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Keys of a model's generation_config.json that are followed, and what they are called here."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. None means "not set": see `merged` and `resolved`.

    Attributes:
        temperature: 0 is greedy; logits are divided by it otherwise.
        top_k: keep the k likeliest tokens; 0, or anything past the vocabulary, keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities sum to this or more;
            tokens exactly as likely as the last one of the set stay too. 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repeat_penalty: positive logits of recent tokens are divided by it, negative multiplied
            (CTRL, arXiv:1909.05858). 1 is off.
        repeat_last_n: how many recent tokens count as recent; 0 is off.
        seed: the same seed, logits and parameters give the same tokens, whatever MLX's global
            random state is; unset draws a fresh one.
        logit_bias: added to the logits of these token ids first.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, "0 or more", lambda x: x >= 0)
        _check_whole("top_k", self.top_k, "0 (all) or more", lambda x: x >= 0)
        _check_real(
            "top_p",
            self.top_p,
            "between 0 and 1",
            lambda x: 0 < x <= 1,
            at_zero="above 0 and at most 1",
        )
        _check_real("min_p", self.min_p, "between 0 and 1", lambda x: 0 <= x <= 1)
        _check_real("repeat_penalty", self.repeat_penalty, "above 0", lambda x: x > 0)
        _check_whole("repeat_last_n", self.repeat_last_n, "0 (off) or more", lambda x: x >= 0)
        _check_whole("seed", self.seed, "from 0 to 2^64 - 1", lambda x: 0 <= x < 2**64)
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


def _check_real(
    name: str, value: Any, allowed: str, ok: Callable[[float], bool], at_zero: str | None = None
) -> None:
    if value is None or (_is_finite(value) and ok(value)):
        return
    if at_zero is not None and _is_finite(value) and value == 0:
        allowed = at_zero
    raise UsageError(f"must be {allowed}; got {_shown(value)}", field=name)


def _check_whole(name: str, value: Any, allowed: str, ok: Callable[[int], bool]) -> None:
    if value is not None and not (_is_whole(value) and ok(value)):
        raise UsageError(f"must be a whole number, {allowed}; got {_shown(value)}", field=name)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Real) else repr(value)


# What holds for a value that neither the caller nor the model sets; last, as it is checked too.
DEFAULTS = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, repeat_last_n=64
)
