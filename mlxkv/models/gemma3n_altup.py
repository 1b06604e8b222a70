"""AltUp, the residual streams of Gemma 3n: how they are mixed, and what they are made of."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxkv.models.gemma3n_config import Config
from mlxkv.nn.layers import RMSNorm, compiled
from mlxkv.nn.linear import Linear


class AltUp(nn.Module):
    """Alternating updates: a layer computes one stream, the others are predicted and corrected.

    Streams are the outermost axis: each of them lies in order, as products and norms want it.

    Source: Baykal et al., "Alternating Updates for Efficient Transformers", NeurIPS 2023.
    """

    def __init__(self, config: Config):
        super().__init__()
        E, A = config.hidden_size, config.altup_num_inputs
        self.active, self.dim = config.altup_active_idx, E
        self.correct_output_scale = mx.zeros((E,))
        self.correction_coefs = Linear(A, A, bias=False)
        self.prediction_coefs = Linear(A, A * A, bias=False)
        self.modality_router = Linear(E, A, bias=False)
        self.router_norm = RMSNorm(E, config.rms_norm_eps)

    def modalities(self, x: mx.array) -> mx.array:
        """What the coefficients depend on, `[B, L, A]` of x `[B, L, E]`."""
        return _bounded(self["modality_router"](self["router_norm"](x)), self.dim)

    def predict(self, streams: mx.array) -> mx.array:
        """Streams `[A, B, L, E]` mixed by coefficients of the active one."""
        A, B, L, _ = streams.shape
        mixing = self["prediction_coefs"](self.modalities(one_stream(streams, self.active)))
        mixed = mixing.reshape(B, L, A, A) @ streams.transpose(1, 2, 0, 3)  # [B, L, A, E]
        # By way of fewer axes, which gives a single token's rows the strides of dense ones: the
        # sum may take those of either side.
        mixed = mixed.transpose(2, 0, 1, 3).flatten(1, 2)
        return streams + mixed.reshape(A, B, L, -1)

    def correct(self, predicted: mx.array, computed: mx.array) -> mx.array:
        """Predictions `[A, B, L, E]`, each moved by what the active one was wrong about."""
        gains = self["correction_coefs"](self.modalities(computed))  # [B, L, A]
        gains = gains.transpose(2, 0, 1)[..., None]
        return _moved(predicted, gains, computed, one_stream(predicted, self.active))


def one_stream(streams: mx.array, i: int) -> mx.array:
    """One of the streams, `[B, L, E]`: a view, where an integer as the index would copy it."""
    return streams[i : i + 1].squeeze(0)


@compiled
def _bounded(routed: mx.array, dim: int) -> mx.array:
    return mx.tanh(routed.astype(mx.float32) / dim).astype(routed.dtype)


@compiled
def _moved(
    predicted: mx.array, gains: mx.array, computed: mx.array, expected: mx.array
) -> mx.array:
    return predicted + (gains + 1.0) * (computed - expected)


def root_mean_square(x: mx.array) -> mx.array:
    """`[..., 1]` in float32, whose range squares need."""
    return mx.sqrt(_squares(x).mean(axis=-1, keepdims=True))


def rescaled(x: mx.array, target: mx.array) -> mx.array:
    """x with the root mean square `target`; the floor is the reference's."""
    return _rescaled(x, target, root_mean_square(x))


@compiled
def _squares(x: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32))


@compiled
def _rescaled(x: mx.array, target: mx.array, size: mx.array) -> mx.array:
    return (x * (target / mx.maximum(size, 1e-5**0.5))).astype(x.dtype)
