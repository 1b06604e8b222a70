"""What quantized KV costs: the next token's distribution beside the one with native KV.

A text is fed to the model with native KV and with another KV type, all of it the same tokens, each
token quantized as soon as it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.generation.session import Session
from mlxkv.kv.types import KVFormat
from mlxkv.nn.model import CausalLM

ROWS = 64
"""Positions whose logits are in memory at a time, of each KV type."""
NATIVE = "native"


@dataclass(frozen=True, slots=True)
class Quality:
    """One KV type beside native KV; divergences are KL(native || it) in nats.

    Args:
        kv_type: the KV type.
        share: bytes that its caches take, of those in native 16 bits.
        n_positions: positions compared.
        kl_mean: over all of them.
        kl_median: of them.
        kl_max: at the worst of them.
        n_same: those where the likeliest next token is native KV's.
        perplexity: of the text.
    """

    kv_type: str
    share: float
    n_positions: int
    kl_mean: float
    kl_median: float
    kl_max: float
    n_same: int
    perplexity: float


@dataclass(frozen=True, slots=True)
class Text:
    """The tokens that are fed.

    Args:
        tokens: of the text.
        n_skipped: leading positions that are not compared; the last has no next token.
        chunk: tokens that are fed at a time.
    """

    tokens: Sequence[int]
    n_skipped: int
    chunk: int

    @property
    def n_fed(self) -> int:
        """Tokens whose KV is computed."""
        return len(self.tokens) - 1


def measure(model: CausalLM, text: Text, kv_types: Sequence[str]) -> list[Quality]:
    """Native KV, and then each KV type, beside native KV."""
    kv_types = NATIVE, *kv_types
    found: list[list[tuple[float, bool, float]]] = [[] for _ in kv_types]
    runs = zip(*(log_probs(model, text, kv_type) for kv_type in kv_types), strict=True)
    for following, (native, *others) in zip(text.tokens[text.n_skipped + 1 :], runs, strict=True):
        for of, own in zip(found, (native, *others), strict=True):
            same = bool(native.argmax() == own.argmax())
            of.append((divergence(native, own), same, float(own[following])))
    return [
        _summed(kv_type, share(model, kv_type, text.n_fed), of)
        for kv_type, of in zip(kv_types, found, strict=True)
    ]


def log_probs(model: CausalLM, text: Text, kv_type: str) -> Iterator[np.ndarray]:
    """float64 log-probabilities `[V]` of the next token behind each position that is compared."""
    caches = Session(model, kv_type).caches
    for start in range(0, text.n_fed, text.chunk):
        stop = min(start + text.chunk, text.n_fed)
        part = mx.array([list(text.tokens[start:stop])])
        hidden = model.hidden(model.embed(part), caches, model.embed_per_layer(part))
        mx.eval(hidden)
        for first in range(max(start, text.n_skipped), stop, ROWS):
            last = min(first + ROWS, stop)
            logits = model.logits(hidden[:, first - start : last - start])
            # Row by row: what is summed in float64 stays in the processor's caches.
            yield from map(log_softmax, np.array(logits[0].astype(mx.float32)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities `[V]` in float64: a vocabulary is a long sum for float32."""
    x = logits.astype(np.float64)
    x -= x.max()
    return x - np.log(np.exp(x).sum())


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) in nats of log-probabilities `[V]`."""
    return float((np.exp(p) * (p - q)).sum())


def share(model: CausalLM, kv_type: str, n_tokens: int) -> float:
    """Bytes of the caches at so many tokens, over those of native 16-bit ones."""
    of, native = (
        sum(spec.nbytes(n_tokens, own) for spec, own in KVFormat(name, 2).layers(specs))
        for name, specs in ((kv_type, model.cache_specs()), (NATIVE, model.cache_specs()))
    )
    return of / native


def _summed(kv_type: str, share: float, found: Sequence[tuple[float, bool, float]]) -> Quality:
    kl, same, log_p = (np.array(column) for column in zip(*found, strict=True))
    return Quality(
        kv_type,
        share,
        len(kl),
        float(kl.mean()),
        float(np.median(kl)),
        float(kl.max()),
        int(same.sum()),
        float(np.exp(-log_p.mean())),
    )
