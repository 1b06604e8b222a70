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
from collections.abc import Mapping

import mlx.core as mx

from mlxkv.errors import UsageError
from mlxkv.sampling_params import DEFAULTS, SamplingParams

__all__ = ["DEFAULTS", "Sampler", "SamplingParams", "is_broken", "log_probabilities"]

# Below this the likeliest token's lead is divided by so little that float32 only overflows:
# the result is the greedy one.
_GREEDY_BELOW = 1e-5
# Longer sums are taken over rows of this length first: MLX's CPU backend adds one value after the
# other, and a float32 sum over 262,144 probabilities is off by up to 4e-4 then (by rows: 2e-6).
_ROW = 512


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
            # In order: a partition's hangs on the last bits of the logits, and with it the draw.
            ids = mx.sort(mx.argpartition(logits, kth=start, axis=-1)[:, start:], axis=-1)
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


def _real(value: float | None) -> float:
    """A field that `resolved` has filled."""
    assert value is not None
    return float(value)
