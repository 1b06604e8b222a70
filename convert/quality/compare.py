"""Two models on the same text: how far one's next-token distributions are from the other's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlxkv.errors import UsageError
from mlxkv.nn.model import CausalLM

LENGTH = 256
"""Tokens of a window: what precedes a position."""
N_WINDOWS = 32


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model beside a reference; divergences are KL(reference || model) in nats.

    Attributes:
        n_positions: positions compared.
        kl_mean: over them.
        kl_p99: 99 of 100 are below it.
        top1: share of positions where both have the same likeliest token.
        perplexity: of the text under the model.
        reference_perplexity: under the reference.
    """

    n_positions: int
    kl_mean: float
    kl_p99: float
    top1: float
    perplexity: float
    reference_perplexity: float

    def text(self) -> str:
        """On one line."""
        return (
            f"KL {self.kl_mean:.4g} nats (p99 {self.kl_p99:.3g}), the same likeliest token at "
            f"{100 * self.top1:.1f}%, perplexity {self.perplexity:.3f} (source "
            f"{self.reference_perplexity:.3f}), over {self.n_positions:,} positions"
        )


def compare(
    reference: CausalLM,
    model: CausalLM,
    tokens: mx.array,
    progress: Callable[[int, int, float], None] | None = None,
) -> Comparison:
    """Compare at every position of these windows but the last.

    Args:
        reference: what the other is held against.
        model: with the same vocabulary.
        tokens: `[n, length]`, see `texts.windows`.
        progress: called after each window with windows done, of how many, and KL so far.

    Raises:
        UsageError: the vocabularies differ in size.
    """
    kl: list[float] = []
    same, log_p, log_q = 0, 0.0, 0.0
    for i in range(len(tokens)):
        for rows in _window(reference, model, tokens[i : i + 1]):
            kl += cast(list[float], rows[0].tolist())
            same += int(rows[1].sum())
            log_p, log_q = log_p + float(rows[2].sum()), log_q + float(rows[3].sum())
        if progress is not None:
            progress(i + 1, len(tokens), sum(kl) / len(kl))
    n = len(kl)
    p99 = sorted(kl)[min(n - 1, math.ceil(0.99 * n) - 1)]
    return Comparison(n, sum(kl) / n, p99, same / n, math.exp(-log_q / n), math.exp(-log_p / n))


Rows = tuple[mx.array, mx.array, mx.array, mx.array]


def _window(reference: CausalLM, model: CausalLM, tokens: mx.array) -> Iterator[Rows]:
    """KL, equal choices, and both log-probabilities of the next token, `[n]` each."""
    both = (each.position_logits(tokens[:, :-1]) for each in (reference, model))
    stop = 0
    for rows in zip(*both, strict=True):
        p, q = (log_softmax(logits) for logits in rows)
        start, stop = stop, stop + len(p)
        if p.shape != q.shape:
            raise UsageError(
                f"the models have vocabularies of {p.shape[-1]:,} and {q.shape[-1]:,} tokens: "
                "only models with one vocabulary can be compared"
            )
        following = tokens[0, start + 1 : stop + 1, None]
        p_next, q_next = (mx.take_along_axis(x, following, axis=-1)[:, 0] for x in (p, q))
        found = divergence(p, q), p.argmax(-1) == q.argmax(-1), p_next, q_next
        mx.eval(found)
        yield found


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def divergence(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q) of log-probabilities `[n, V]`, `[n]`; rounding is not less than 0."""
    return mx.maximum((mx.exp(p) * (p - q)).sum(-1), 0.0)
