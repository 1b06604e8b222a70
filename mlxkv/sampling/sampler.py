"""Logits to token ids: what SamplingParams mean, and the Sampler that applies them.

Order of the steps (llama.cpp's, which Ollama runs as well; mlx-lm also applies temperature last):

    logit bias -> repeat penalty -> presence and frequency penalty
        -> top-k -> top-p -> min-p -> temperature -> draw

Top-p and min-p therefore judge the probabilities at temperature 1, and top-p those left by top-k,
renormalized. `temperature` 0 takes the likeliest token and ignores the filters. Everything is lazy:
a Sampler never evaluates, so that the step after it can be queued before its token is known.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlxkv.base import device
from mlxkv.errors import UsageError
from mlxkv.nn import kernels
from mlxkv.sampling.math import (
    at_least,
    biased,
    discounted,
    draw,
    likely,
    masked,
    nucleus_floor,
    occurrences,
    padded,
    penalized,
    row_sums,
    rows_of,
    weigh,
    without,
)
from mlxkv.sampling.params import DEFAULTS, SamplingParams

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "DEFAULTS",
    "AnswerIds",
    "Recent",
    "RowChoice",
    "Sampler",
    "SamplingParams",
    "choose",
]

# Below this the likeliest token's lead is divided by so little that float32 only overflows:
# the result is the greedy one.
_GREEDY_BELOW = 1e-5


class Sampler:
    """Chooses one token for each row of logits. Holds the random state of one sequence.

    Random numbers come from Python's Mersenne Twister on the host, two to a token, which costs no
    kernels and gives the same stream on every device; they never touch `mx.random`'s state.

    Args:
        params: what to apply; unset values mean `DEFAULTS`.
        n_vocab: V, the width of the logits.
        suppressed: tokens that are never chosen, whatever their bias; those past V are none.

    Attributes:
        n_chosen: tokens that were chosen so far.
        rule: samplers of equal rules choose in the same way, but for their random numbers.

    Raises:
        UsageError: a token id of `logit_bias` past the vocabulary.
    """

    def __init__(self, params: SamplingParams, n_vocab: int, suppressed: Collection[int] = ()):
        self.params = p = params.resolved()
        self.n_vocab = n_vocab
        self.seed: int = secrets.randbits(63) if p.seed is None else int(p.seed)
        self.greedy = _real(p.temperature) < _GREEDY_BELOW
        self.top_k = min(int(p.top_k or 0), n_vocab) or n_vocab
        self._random = random.Random(self.seed)
        self._coming: list[list[float]] = []  # numbers of tokens that are not taken yet
        self.n_chosen = 0
        self._suppressed = tuple(sorted(token for token in suppressed if token < n_vocab))
        self._bias = _bias_arrays(p.logit_bias, self._suppressed, n_vocab)
        self.rule = self._rule()
        # Arrays: a fused kernel takes them as inputs, and would be compiled anew for each number.
        self._temperature, self._top_p = mx.array(_real(p.temperature)), mx.array(_real(p.top_p))
        self._log_min_p = mx.array(math.log(_real(p.min_p) or 1))
        self._last = mx.array(self.top_k - 1, mx.uint32)
        self._penalty = mx.array(_real(p.repeat_penalty))
        self._presence = mx.array(_real(p.presence_penalty))
        self._frequency = mx.array(_real(p.frequency_penalty))

    @property
    def needs_recent(self) -> bool:
        """Whether the repeat penalty is on, and `recent` is looked at."""
        return self.params.repeat_penalty != 1 and bool(self.params.repeat_last_n)

    @property
    def needs_answer(self) -> bool:
        """Whether a penalty is on that counts the answer's tokens, and `answer` is looked at."""
        return bool(self.params.presence_penalty or self.params.frequency_penalty)

    def __call__(
        self, logits: mx.array, recent: mx.array | None = None, answer: mx.array | None = None
    ) -> mx.array:
        """Choose a token for each row, lazily.

        Args:
            logits: [B, V], any float type; computed on in float32.
            recent: [B, N] or [N] ids of the tokens before this one, newest last; N may be 0.
            answer: [B, N] or [N] ids of the answer's tokens so far; V stands for no token.

        Returns:
            [B] uint32 token ids.
        """
        self.n_chosen += 1
        return self._choose(
            logits, recent, answer, [self._numbers() for _ in range(logits.shape[0])]
        )

    def rewind(self, n_chosen: int) -> None:
        """Go back to where so many tokens of one row had been chosen."""
        self.n_chosen = n_chosen
        self._random, self._coming = random.Random(self.seed), []
        for _ in range(0 if self.greedy else 2 * n_chosen):
            self._random.getrandbits(24)

    def take(self, n: int) -> None:
        """Count the next tokens as chosen, with the random numbers that `ahead` chose them with."""
        self.n_chosen += n
        if n and not self.greedy:  # those of places where nothing was drawn are taken as well
            self._numbers(ahead=n - 1)
        del self._coming[:n]

    def _numbers(self, ahead: int | None = None) -> list[float]:
        """Random numbers of the next token, or of the one so many behind it, which is not taken."""
        # 24 bits: every one is a float32 below 1.
        if self.greedy:
            return []
        while len(self._coming) <= (ahead or 0):
            self._coming.append([self._random.getrandbits(24) * 2.0**-24 for _ in range(2)])
        return self._coming.pop(0) if ahead is None else self._coming[ahead]

    def probabilities(
        self, logits: mx.array, recent: mx.array | None = None, answer: mx.array | None = None
    ) -> mx.array:
        """The distribution that a call with the same arguments draws from: [B, V] float32."""
        logits = self._adjusted(logits, recent, answer)
        if self.greedy:
            best = mx.argmax(logits, axis=-1, keepdims=True)
            return (mx.arange(self.n_vocab) == best).astype(mx.float32)
        weights, ids = self._weighted(logits)
        weights = (weights / row_sums(weights))[:, : self.top_k]
        if ids is None:
            return weights
        return mx.put_along_axis(mx.zeros(logits.shape), ids, weights, axis=-1)

    def _choose(
        self,
        logits: mx.array,
        recent: mx.array | None,
        answer: mx.array | None,
        u: Sequence[Sequence[float]],
    ) -> mx.array:
        """Tokens [B], drawn with random numbers u [B, 2]; none where this is greedy."""
        logits = self._adjusted(logits, recent, answer)
        if self.greedy:
            return kernels.argmax(logits)
        weights, ids = self._weighted(logits)
        choice = draw(weights, mx.array([list(each) for each in u]), self._last)
        return choice if ids is None else mx.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]

    def _rule(self) -> Hashable:
        p = self.params
        adjusted = (
            tuple(sorted((p.logit_bias or {}).items())),
            self._suppressed,
            (p.repeat_penalty, p.repeat_last_n) if self.needs_recent else None,
            (p.presence_penalty, p.frequency_penalty),
        )
        if self.greedy:
            return self.n_vocab, adjusted
        return self.n_vocab, adjusted, p.temperature, self.top_k, p.top_p, p.min_p

    def _adjusted(
        self, logits: mx.array, recent: mx.array | None, answer: mx.array | None
    ) -> mx.array:
        """Logits [B, V] after the bias and the penalties."""
        B, V = logits.shape
        assert self.n_vocab == V, logits.shape
        if self._bias is not None:
            ids, values = self._bias
            ids = mx.broadcast_to(ids, (B, ids.shape[-1]))
            shifted = biased(mx.take_along_axis(logits, ids, axis=-1), values)
            logits = mx.put_along_axis(logits.astype(mx.float32), ids, shifted, axis=-1)
        if self.needs_recent and recent is not None and recent.size:
            recent = recent[..., -int(self.params.repeat_last_n or 0) :]
            recent = mx.broadcast_to(recent, (B, recent.shape[-1]))
            # A token that occurs twice is written twice with the same value: penalized once.
            seen = penalized(mx.take_along_axis(logits, recent, axis=-1), self._penalty)
            logits = mx.put_along_axis(logits.astype(mx.float32), recent, seen, axis=-1)
        if self.needs_answer and answer is not None and answer.size:
            counts = occurrences(mx.broadcast_to(answer, (B, answer.shape[-1])), V)
            logits = discounted(logits, counts, self._presence, self._frequency)
        return logits

    def _weighted(self, logits: mx.array) -> tuple[mx.array, mx.array | None]:
        """Temperature behind top-k, top-p and min-p.

        Returns:
            Unnormalized probabilities [B, n] of the first `top_k` tokens, padded with zeros to
            whole rows if there are more than one; and those tokens' ids (None: all, in order).
        """
        if device.on_cpu():
            # Its kernels of 16 bits are slower than this; a GPU's fused ones convert as they read.
            logits = logits.astype(mx.float32)
        values, ids = logits, None
        if self.top_k < self.n_vocab:
            start = self.n_vocab - self.top_k
            # In order: a partition's hangs on the last bits of the logits, and with it the draw.
            ids = mx.sort(mx.argpartition(logits, kth=start, axis=-1)[:, start:], axis=-1)
            values = mx.take_along_axis(logits, ids, axis=-1)
        values = padded(values, -mx.inf)
        largest = values.max(axis=-1, keepdims=True)
        weights = weigh(values, largest, self._temperature)
        if _real(self.params.top_p) < 1:
            at_one = weights
            if self.params.temperature != 1:
                at_one = weigh(values, largest, mx.array(1.0))
            weights = at_least(weights, at_one, nucleus_floor(at_one, self._top_p))
        if _real(self.params.min_p) > 0:
            weights = likely(weights, values, largest, self._log_min_p)
        return weights, ids


class AnswerIds:
    """The tokens of one answer, for the penalties that count them.

    A step uploads them, four bytes a token, and not a count for each token of the vocabulary.

    Args:
        n_vocab: V, which stands for no token.
        before: tokens that the answer has already.
    """

    def __init__(self, n_vocab: int, before: Sequence[int] = ()):
        self._n_vocab, self._n_before, self._n = n_vocab, len(before), 0
        self._ids: np.ndarray | None = None
        if before:
            self._append(before)

    def first(self, tokens: Sequence[int], n: int) -> np.ndarray:
        """Those before and the first n of `tokens`, and V up to a length that seldom changes.

        Args:
            tokens: those of every call before, and maybe more.
            n: not less than before.
        """
        return self._append(tokens[self._n - self._n_before : n])

    def _append(self, tokens: Sequence[int]) -> np.ndarray:
        end, ids = self._n + len(tokens), self._ids
        if ids is None or end > len(ids):
            import numpy as np

            room = max(256, 1 << (end - 1).bit_length()) if end else 0
            longer = np.full(room, self._n_vocab, np.uint32)
            if ids is not None:
                longer[: self._n] = ids[: self._n]
            self._ids = ids = longer
        ids[self._n : end] = tokens
        self._n = end
        return ids


class Recent(NamedTuple):
    """The tokens before the one to choose.

    Args:
        known: those that the host knows, newest last.
        fed: [B] tokens behind them, still on the device; None where `known` is all.
        row: which of these is the row's.
        answer: what the host knows of the answer, see `AnswerIds`.
    """

    known: Sequence[int]
    fed: mx.array | None = None
    row: int = 0
    answer: np.ndarray | None = None


class RowChoice(NamedTuple):
    """What chooses a row's token.

    Args:
        sampler: the row's own.
        recent: what its penalties look at; None for nothing.
        mask: bool [V], what may come at all; None for anything.
        barred: tokens that must not come.
        ahead: None to choose the sampler's next token; else the one so many behind it, which is
            chosen only once `Sampler.take` says so.
    """

    sampler: Sampler
    recent: Recent | None = None
    mask: np.ndarray | None = None
    barred: tuple[int, ...] = ()
    ahead: int | None = None


def choose(logits: mx.array, rows: Mapping[int, RowChoice]) -> list[tuple[list[int], mx.array]]:
    """Choose a token for some rows of logits [B, V], rows of one rule in one call. Lazy.

    A row gets the token that its sampler gives it alone, and takes as many random numbers.

    Returns:
        Rows, and their tokens `[n]` in the same order; each row once.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, (sampler, recent, mask, barred, _) in rows.items():
        shape = None
        if recent is not None and (sampler.needs_recent or sampler.needs_answer):
            shape = len(recent.known), id(recent.fed)
        groups.setdefault((sampler.rule, shape, mask is None, barred), []).append(i)
    found = []
    for group in groups.values():
        chosen = [rows[i] for i in group]
        part = rows_of(logits, group)
        masks = [one.mask for one in chosen if one.mask is not None]
        if masks:
            import numpy as np

            # Stacked on the host, where they come from.
            part = masked(part, mx.array(np.stack(masks)))
        if chosen[0].barred:
            part = without(part, chosen[0].barred)
        first = chosen[0].sampler
        recents = [one.recent for one in chosen if one.recent is not None]
        recent = answer = None
        if first.needs_recent and recents:
            recent = _stacked(recents, [one.known for one in recents])
        if first.needs_answer and recents:
            answer = _stacked(recents, _answers(recents, first.n_vocab))
        for one in chosen:
            one.sampler.n_chosen += one.ahead is None
        numbers = [one.sampler._numbers(one.ahead) for one in chosen]
        found.append((group, first._choose(part, recent, answer, numbers)))
    return found


def _answers(recents: Sequence[Recent], n_vocab: int) -> np.ndarray:
    """What the host knows of each answer, up to one length: [n, N]."""
    import numpy as np

    known = [() if one.answer is None else one.answer for one in recents]
    ids = np.full((len(known), max(map(len, known))), n_vocab, np.uint32)
    for row, tokens in zip(ids, known, strict=True):
        row[: len(tokens)] = tokens
    return ids


def _stacked(recents: Sequence[Recent], ids: Any) -> mx.array | None:
    """Tokens that the host knows [n, N], and behind them those that were fed together."""
    import numpy as np

    ids, fed = np.asarray(ids, np.uint32), recents[0].fed
    known = mx.array(ids) if ids.size else None
    if fed is None:
        return known
    last = rows_of(fed, [one.row for one in recents])[:, None].astype(mx.uint32)
    return last if known is None else mx.concatenate([known, last], axis=-1)


def _bias_arrays(
    bias: Mapping[int, float] | None, suppressed: Sequence[int], n_vocab: int
) -> tuple[mx.array, mx.array] | None:
    bias = {**(bias or {}), **dict.fromkeys(suppressed, -math.inf)}
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
