"""The interface of models that make one vector of a text: no KV, no tokens to write.

Texts lie one behind the other in one row of tokens, without padding; those of one length, side by
side, share a product in attention (`Run`). Everything but attention sees one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

from mlxkv.base import device
from mlxkv.kv.types import CacheSpec
from mlxkv.nn import kernels
from mlxkv.nn.encoder_attention import attend_all, masks_bytes, near
from mlxkv.nn.layers import ACTIVATIONS, merge_heads
from mlxkv.nn.linear import Linear
from mlxkv.nn.model import CausalLM

if TYPE_CHECKING:
    from mlxkv.checkpoint.sentence import DenseConfig


@dataclass(frozen=True, slots=True)
class Run:
    """Texts of one length, side by side in a row of tokens.

    Args:
        start: of the first one.
        n_texts: their number.
        n_tokens: of each.
    """

    start: int
    n_texts: int
    n_tokens: int

    def of(self, rows: mx.array) -> mx.array:
        """This run's part `[n_texts, n_tokens, E]` of rows `[1, T, E]`."""
        stop = self.start + self.n_texts * self.n_tokens
        return rows[0, self.start : stop].reshape(self.n_texts, self.n_tokens, -1)


@dataclass(frozen=True, slots=True)
class Texts:
    """How the texts of one row of tokens lie in it."""

    runs: tuple[Run, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Texts:
        """Texts of these lengths, in order."""
        runs, start = [], 0
        for length, same in itertools.groupby(lengths):
            n = len(list(same))
            runs.append(Run(start, n, length))
            start += n * length
        return cls(tuple(runs))


class TwoWay(Protocol):
    """Attention whose projections can be turned to heads by rows."""

    @property
    def uses_kernels(self) -> bool: ...

    def turned(self, qkv: mx.array, offset: int) -> tuple[mx.array, mx.array, mx.array]: ...


def attend_texts(
    attention: TwoWay, qkv: mx.array, texts: Texts, scale: float, radius: int | None
) -> mx.array:
    """Attention of each text to itself, `[1, T, H D]`.

    Args:
        attention: makes the heads.
        qkv: its projections of all texts, `[1, T, (H + 2 Hk) D]`.
        texts: how they lie.
        scale: factor on the scores.
        radius: see `attend_all`.
    """
    parts = []
    for run in texts.runs:
        q, k, v = attention.turned(run.of(qkv), 0)
        if attention.uses_kernels and kernels.can_attend(q, k, v):
            out = _by_kernels(q, k, v, scale, radius)
        else:
            out = merge_heads(attend_all(q, k, v, scale, radius))
        parts.append(out.reshape(1, -1, out.shape[-1]))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _by_kernels(
    q: mx.array, k: mx.array, v: mx.array, scale: float, radius: int | None
) -> mx.array:
    """`attend_all` with the heads side by side, `[B, L, H D]`."""

    def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
        out = kernels.attended(q, k, v, scale, mask)
        assert out is not None
        return out

    if radius is None or q.shape[2] <= radius + 1:
        return attend(q, k, v, None)
    return near(q, k, v, radius, attend, axis=1)


def settled(x: mx.array) -> mx.array:
    """A layer's output, computed before the next layer is queued on the CPU backend.

    It queues some hundred tasks ahead, and the results of five layers would be memory at once.
    """
    if device.on_cpu() and not kernels.is_traced():
        mx.eval(x)
    return x


class Dense(Linear):
    """A layer behind the mean: activation(x W^T + b)."""

    def __init__(self, config: DenseConfig):
        super().__init__(config.in_features, config.out_features, bias=config.bias)


class Embedder(CausalLM):
    """A model that makes one vector of a text.

    A family sets `config`, whose `sentence` says what follows its hidden states, and has
    `through_layers`.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.dense = [Dense(each) for each in config.sentence.dense]

    @property
    def mixes_dtypes(self) -> bool:
        return False

    @property
    def overflows_float16(self) -> bool:
        return True

    def keeps_dtype(self, name: str) -> bool:
        """The Dense layers compute in float32, on whatever the file has."""
        return name.startswith("dense.")

    def cache_specs(self) -> list[CacheSpec | None]:
        return []

    @property
    def n_dimensions(self) -> int:
        """Values of a vector."""
        return self.config.sentence.size(self.config.hidden_size)

    def masks_bytes(self, longest: int) -> int:
        """Bytes beside what a trace finds, for texts of up to this many tokens."""
        return 0 if self.radius is None else masks_bytes(longest, self.radius)

    @property
    def radius(self) -> int | None:
        """How far a token sees on both sides in layers that slide; None without such layers."""
        raise NotImplementedError

    def through_layers(self, tokens: mx.array, texts: Texts) -> mx.array:
        """Final hidden states `[1, T, E]` of tokens `[1, T]`."""
        raise NotImplementedError

    def vectors(self, tokens: mx.array, texts: Texts) -> mx.array:
        """Vectors of texts, float32 `[N, n_dimensions]`.

        Args:
            tokens: of all texts, one behind the other, `[1, T]`.
            texts: how they lie.
        """
        hidden = self.through_layers(tokens, texts)
        means = [run.of(hidden).astype(mx.float32).mean(axis=1) for run in texts.runs]
        x = means[0] if len(means) == 1 else mx.concatenate(means)
        for layer, config in zip(self.dense, self.config.sentence.dense, strict=True):
            x = layer(x).astype(mx.float32)
            if config.activation is not None:
                x = ACTIVATIONS[config.activation](x)
        return self._scaled(x)

    def shortened(self, vectors: mx.array, dimensions: int | None) -> mx.array:
        """The first values of each vector `[N, D]`, scaled to length 1 again; None for all.

        Matryoshka representations, https://arxiv.org/abs/2205.13147.
        """
        return vectors if dimensions is None else self._scaled(vectors[:, :dimensions])

    def _scaled(self, x: mx.array) -> mx.array:
        """x with rows of length 1, where the model's are."""
        if not self.config.sentence.normalized:
            return x
        return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
