"""Logits to token ids: what SamplingParams mean, and the Sampler that applies them.

Order of the steps (llama.cpp's, which Ollama runs as well; mlx-lm also applies temperature last):

    logit bias -> repeat penalty -> top-k -> top-p -> min-p -> temperature -> draw

Top-p and min-p therefore judge the probabilities at temperature 1, and top-p those left by top-k,
renormalized. `temperature` 0 takes the likeliest token and ignores the filters. Everything is lazy:
a Sampler never evaluates, so that the step after it can be queued before its token is known.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import mlx.core as mx

from mlxkv.errors import ConfigError, UsageError

# Below this the likeliest token's lead is divided by so little that float32 only overflows:
# the result is the greedy one.
_GREEDY_BELOW = 1e-5
# Longer sums are taken over rows of this length first: MLX's CPU backend adds one value after the
# other, and a float32 sum over 262,144 probabilities is off by up to 4e-4 then (by rows: 2e-6).
_ROW = 512


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
        _check_real("--temperature", self.temperature, "0 or more", lambda x: x >= 0)
        _check_whole("--top-k", self.top_k, "0 (all) or more", lambda x: x >= 0)
        _check_real(
            "--top-p",
            self.top_p,
            "between 0 and 1",
            lambda x: 0 < x <= 1,
            at_zero="above 0 and at most 1",
        )
        _check_real("--min-p", self.min_p, "between 0 and 1", lambda x: 0 <= x <= 1)
        _check_real("--repeat-penalty", self.repeat_penalty, "above 0", lambda x: x > 0)
        _check_whole("--repeat-last-n", self.repeat_last_n, "0 (off) or more", lambda x: x >= 0)
        _check_whole("--seed", self.seed, "from 0 to 2^64 - 1", lambda x: 0 <= x < 2**64)
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
            raise ConfigError(f"{source}: {error}") from None


class Sampler:
    """Chooses one token for each row of logits. Holds the random state of one sequence.

    Random numbers come from Python's Mersenne Twister on the host, two to a token, which costs no
    kernels and gives the same stream on every device; they never touch `mx.random`'s state.

    Args:
        params: what to apply; unset values mean `DEFAULTS`.
        n_vocab: V, the width of the logits.

    Attributes:
        n_chosen: tokens that were chosen so far.

    Raises:
        UsageError: a token id of `logit_bias` past the vocabulary.
    """

    def __init__(self, params: SamplingParams, n_vocab: int):
        self.params = p = params.resolved()
        self.n_vocab = n_vocab
        self.seed: int = secrets.randbits(63) if p.seed is None else int(p.seed)
        self.greedy = _real(p.temperature) < _GREEDY_BELOW
        self.top_k = min(int(p.top_k or 0), n_vocab) or n_vocab
        self._random = random.Random(self.seed)
        self.n_chosen = 0
        self._bias = _bias_arrays(p.logit_bias, n_vocab)

    @property
    def needs_recent(self) -> bool:
        """Whether the repeat penalty is on, and `recent` is looked at."""
        return self.params.repeat_penalty != 1 and bool(self.params.repeat_last_n)

    @property
    def takes_likeliest(self) -> bool:
        """Whether a token is the argmax of the logits as they are, and nothing else."""
        return self.greedy and self._bias is None and not self.needs_recent

    def __call__(self, logits: mx.array, recent: mx.array | None = None) -> mx.array:
        """Choose a token for each row, lazily.

        Args:
            logits: [B, V], any float type; computed on in float32.
            recent: [B, N] or [N] ids of the tokens before this one, newest last; N may be 0.

        Returns:
            [B] uint32 token ids.
        """
        self.n_chosen += 1
        logits = self._adjusted(logits, recent)
        if self.greedy:
            return mx.argmax(logits, axis=-1)
        values, ids, keep = self._filtered(logits.astype(mx.float32))
        choice = self._draw(_weights(values, keep, _real(self.params.temperature)))
        return choice if ids is None else mx.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]

    def rewind(self, n_chosen: int) -> None:
        """Go back to where so many tokens of one row had been chosen."""
        self.n_chosen = n_chosen
        self._random = random.Random(self.seed)
        for _ in range(0 if self.greedy else 2 * n_chosen):
            self._random.getrandbits(24)

    def probabilities(self, logits: mx.array, recent: mx.array | None = None) -> mx.array:
        """The distribution that a call with the same arguments draws from: [B, V] float32."""
        logits = self._adjusted(logits, recent)
        if self.greedy:
            best = mx.argmax(logits, axis=-1, keepdims=True)
            return (mx.arange(self.n_vocab) == best).astype(mx.float32)
        values, ids, keep = self._filtered(logits.astype(mx.float32))
        weights = _weights(values, keep, _real(self.params.temperature))
        weights = weights / _sum(weights)
        if ids is None:
            return weights
        return mx.put_along_axis(mx.zeros(logits.shape), ids, weights, axis=-1)

    def _adjusted(self, logits: mx.array, recent: mx.array | None) -> mx.array:
        """Logits [B, V] after the bias and the repeat penalty."""
        assert logits.ndim == 2 and logits.shape[-1] == self.n_vocab, logits.shape
        if self._bias is not None:
            ids, values = self._bias
            logits = logits.astype(mx.float32).at[:, ids].add(values)
        if not self.needs_recent or recent is None or recent.size == 0:
            return logits
        recent = recent[..., -int(self.params.repeat_last_n or 0) :]
        recent = mx.broadcast_to(recent, (logits.shape[0], recent.shape[-1]))
        penalty = _real(self.params.repeat_penalty)
        logits = logits.astype(mx.float32)
        seen = mx.take_along_axis(logits, recent, axis=-1)
        # A token that occurs twice is written twice with the same value: penalized once.
        seen = mx.where(seen > 0, seen / penalty, seen * penalty)
        return mx.put_along_axis(logits, recent, seen, axis=-1)

    def _filtered(self, logits: mx.array) -> tuple[mx.array, mx.array | None, mx.array | None]:
        """Top-k, top-p and min-p.

        Returns:
            values [B, n], their token ids [B, n] (None: n is V, in order), and a mask [B, n] of
            what is kept (None: all).
        """
        top_p, min_p = _real(self.params.top_p), _real(self.params.min_p)
        values, ids, keep = logits, None, None
        if self.top_k < self.n_vocab:
            start = self.n_vocab - self.top_k
            ids = mx.argpartition(logits, kth=start, axis=-1)[:, start:]
            values = mx.take_along_axis(logits, ids, axis=-1)
        if top_p < 1:
            weights = _weights(values, None, 1.0)
            keep = weights >= _nucleus_floor(weights, top_p * _sum(weights))
        if min_p > 0:
            likely = values >= values.max(axis=-1, keepdims=True) + math.log(min_p)
            keep = likely if keep is None else keep & likely
        return values, ids, keep

    def _draw(self, weights: mx.array) -> mx.array:
        """Indices [B] drawn in proportion to weights [B, n], by inverting the running sum."""
        B, n = weights.shape
        # 24 bits: every one is a float32 below 1.
        u = mx.array(
            [[self._random.getrandbits(24) * 2.0**-24 for _ in range(2)] for _ in range(B)]
        )
        if n <= _ROW:
            return _invert(weights, u[:, :1])
        rows = _rows(weights)
        row = _invert(rows.sum(axis=-1), u[:, :1])
        inside = mx.take_along_axis(rows, row[:, None, None], axis=1)[:, 0]
        return row * _ROW + _invert(inside, u[:, 1:])


def is_broken(logits: mx.array) -> mx.array:
    """Whether rows of logits [..., V] hold a NaN or +inf, or nothing but -inf: bool [...], lazy.

    Damaged or overflowing weights show here; a sampler would go on with arbitrary tokens.
    """
    logits = logits.astype(mx.float32)
    # A maximum may pass a NaN over, depending on the device; a sum cannot.
    return mx.isnan(logits.sum(axis=-1)) | ~mx.isfinite(logits.max(axis=-1))


def log_probabilities(logits: mx.array) -> mx.array:
    """The model's own log-probabilities [B, V] of logits [B, V], in float32.

    They are those before anything that a Sampler does.
    """
    logits = logits.astype(mx.float32)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - mx.log(_sum(mx.exp(logits)))


def _nucleus_floor(weights: mx.array, target: mx.array) -> mx.array:
    """The smallest weight in the nucleus of weights [B, n]: [B, 1].

    The nucleus is the smallest set of largest weights that sums to target [B, 1] or more. It is
    found by a quickselect by mass whose shapes are fixed, so that it needs no evaluation: split at
    the median, go on with the half in which the mass reaches the target. That touches n + n/2 +
    n/4 ... values where a sort touches n log n, and is as exact as float32 sums. On a GPU a
    partition is a sort, so there everything is sorted at once.
    """
    above = mx.zeros_like(target)
    if _on_cpu():
        n = weights.shape[-1]
        halvings = max(0, math.ceil(math.log2(n / _ROW)))
        weights = mx.pad(weights, [(0, 0), (0, -n % (1 << halvings))])
        for _ in range(halvings):
            half = weights.shape[-1] // 2
            parted = mx.partition(weights, kth=half, axis=-1)
            low, high = parted[:, :half], parted[:, half:]
            with_high = above + _sum(high)
            reached = with_high >= target
            weights = mx.where(reached, high, low)
            above = mx.where(reached, above, with_high)
    weights = -mx.sort(-weights, axis=-1)
    before = above + mx.cumsum(weights, axis=-1) - weights
    return mx.where(before < target, weights, mx.inf).min(axis=-1, keepdims=True)


def _on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def _rows(x: mx.array) -> mx.array:
    """x [B, n] as [B, ceil(n / 512), 512], zeros at the end."""
    B, n = x.shape
    return mx.pad(x, [(0, 0), (0, -n % _ROW)]).reshape(B, -1, _ROW)


def _sum(x: mx.array) -> mx.array:
    """Row sums of x [B, n], added in two levels: [B, 1]."""
    return _rows(x).sum(axis=-1).sum(axis=-1, keepdims=True)


def _weights(values: mx.array, keep: mx.array | None, temperature: float) -> mx.array:
    """Unnormalized probabilities [B, n] at this temperature; the largest is 1, dropped ones 0."""
    weights = mx.exp((values - values.max(axis=-1, keepdims=True)) / temperature)
    return weights if keep is None else mx.where(keep, weights, 0)


def _invert(weights: mx.array, u: mx.array) -> mx.array:
    """The first index at which the running sum of weights [B, n] passes u [B, 1] of the total."""
    total = mx.cumsum(weights, axis=-1)
    index = (total <= u * total[:, -1:]).sum(axis=-1, keepdims=True)
    # u * total may round up to the total itself; never step past the end or onto a zero.
    index = mx.minimum(index, weights.shape[-1] - 1)
    hit = mx.take_along_axis(weights, index, axis=-1) > 0
    best = mx.argmax(weights, axis=-1, keepdims=True)
    return mx.where(hit, index, best)[:, 0].astype(mx.uint32)


def _bias_arrays(
    bias: Mapping[int, float] | None, n_vocab: int
) -> tuple[mx.array, mx.array] | None:
    if not bias:
        return None
    outside = [token for token in bias if not 0 <= token < n_vocab]
    if outside:
        raise UsageError(
            f"logit_bias: token ids must be from 0 to {n_vocab - 1}; got {outside[0]}"
            + (f" and {len(outside) - 1} more outside" if len(outside) > 1 else "")
        )
    return mx.array(list(bias)), mx.array([float(v) for v in bias.values()])


def _checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias must map token ids to numbers; got {bias!r}")
    for token, value in bias.items():
        if not _is_whole(token) or token < 0:
            raise UsageError(
                f"logit_bias: a token id must be a whole number, 0 or more; got {_shown(token)}"
            )
        if not _is_finite(value):
            raise UsageError(
                f"logit_bias: the bias of token {token} must be a finite number; "
                f"got {_shown(value)}"
            )
    return {int(token): float(value) for token, value in bias.items()}


def _check_real(
    name: str, value: Any, allowed: str, ok: Callable[[float], bool], at_zero: str | None = None
) -> None:
    if value is None or (_is_finite(value) and ok(value)):
        return
    if at_zero is not None and _is_finite(value) and value == 0:
        allowed = at_zero
    raise UsageError(f"{name} must be {allowed}; got {_shown(value)}")


def _check_whole(name: str, value: Any, allowed: str, ok: Callable[[int], bool]) -> None:
    if value is not None and not (_is_whole(value) and ok(value)):
        raise UsageError(f"{name} must be a whole number, {allowed}; got {_shown(value)}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Real) else repr(value)


def _real(value: float | None) -> float:
    """A field that `resolved` has filled."""
    assert value is not None
    return float(value)


# What holds for a value that neither the caller nor the model sets; last, as it is checked too.
DEFAULTS = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, repeat_last_n=64
)
