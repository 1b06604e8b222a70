"""The encoder of sound of Gemma 3n.

Reference: transformers `modeling_gemma3n.py`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxkv.models.gemma_audio import (
    Bounding,
    FeedForward,
    Frames,
    LightConvolution,
    LocalAttention,
    frames,
)
from mlxkv.models.gemma_audio_config import Gemma3nAudio
from mlxkv.nn.layers import RMSNorm, compiled
from mlxkv.nn.linear import Linear


class CumulativeNorm(nn.Module):
    """A norm of all channels and frequencies of the frames so far, in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self._eps = mx.ones((dim,)), eps

    def __call__(self, x: mx.array) -> mx.array:
        """x `[T, F, C]` normed, and what is negative set to 0."""
        T, F, C = x.shape
        wide = x.astype(mx.float32)
        n = (mx.arange(1, T + 1) * (F * C))[:, None, None]
        mean = mx.cumsum(wide.sum(axis=(1, 2), keepdims=True), axis=0) / n
        wide = wide - mean
        squares = mx.square(wide).sum(axis=(1, 2), keepdims=True)
        scale = mx.rsqrt(mx.cumsum(squares, axis=0) / n + self._eps)
        return _rectified(wide, scale, self["weight"]).astype(x.dtype)


@compiled
def _rectified(x: mx.array, scale: mx.array, weight: mx.array) -> mx.array:
    return mx.maximum(x * scale * weight, 0.0)


class Gemma3nSubsampling(nn.Module):
    """One of two convolutions that take fewer frames and frequencies."""

    def __init__(self, config: Gemma3nAudio, i: int):
        super().__init__()
        n_in = 1 if i == 0 else config.subsampling_conv_channels[0]
        n_out, kernel = config.subsampling_conv_channels[i], config.kernels[i]
        self._strides, self._ahead = config.strides[i], kernel[0] - 1
        self.conv = nn.Conv2d(n_in, n_out, kernel, bias=False)
        self.norm = CumulativeNorm(n_out, config.group_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        # A frame sees those that follow it, and 0 behind the last.
        padding = ([0, 1], [self._ahead, 1])
        x = mx.conv_general(x[None], self["conv"]["weight"], self._strides, padding)[0]
        return self["norm"](x)


class Gemma3nProjection(nn.Module):
    """Mel frames `[T, bins]` -> encoder frames, one for four."""

    def __init__(self, config: Gemma3nAudio):
        super().__init__()
        self.conv_0, self.conv_1 = (Gemma3nSubsampling(config, i) for i in (0, 1))
        n_bins = config.input_feat_size
        for (_, kernel), (_, stride) in zip(config.kernels, config.strides, strict=True):
            n_bins = (n_bins + 2 - kernel) // stride + 1
        n_in = n_bins * config.subsampling_conv_channels[1]
        self.input_proj_linear = Linear(n_in, config.hidden_size, bias=False)

    def __call__(self, mel: mx.array) -> mx.array:
        x = self["conv_1"](self["conv_0"](mel[:, :, None]))
        return self["input_proj_linear"](x.flatten(1))


class RelativeKeys(nn.Module):
    """The projection of relative positions."""

    def __init__(self, dim: int):
        super().__init__()
        self.pos_proj = Linear(dim, dim, bias=False)


class Gemma3nHeads(LocalAttention):
    """The attention itself."""

    def __init__(self, config: Gemma3nAudio):
        super().__init__(config)
        self.relative_position_embedding = RelativeKeys(config.hidden_size)

    def relative_keys(self, positions: mx.array) -> mx.array:
        return self["relative_position_embedding"]["pos_proj"](positions)


class Gemma3nAttention(Bounding):
    """Attention and its projection between norms, added to x."""

    def __init__(self, config: Gemma3nAudio):
        super().__init__(config)
        E = config.hidden_size
        self.attn = Gemma3nHeads(config)
        self.post = Linear(E, E, bias=False)
        self.pre_attn_norm, self.post_norm = RMSNorm(E, 1e-6), RMSNorm(E, 1e-6)

    def __call__(self, x: mx.array, frames: Frames) -> mx.array:
        r = self["attn"].attended(self["pre_attn_norm"](self.bounded(x)), frames)
        return x + self["post_norm"](self.bounded(self["post"](r)))


class Gemma3nBlock(Bounding):
    """As `Gemma4Block`."""

    def __init__(self, config: Gemma3nAudio):
        super().__init__(config)
        self.ffw_layer_start, self.ffw_layer_end = FeedForward(config), FeedForward(config)
        self.attention = Gemma3nAttention(config)
        self.lconv1d = LightConvolution(config)
        self.norm = RMSNorm(config.hidden_size, 1e-6)

    def __call__(self, x: mx.array, frames: Frames) -> mx.array:
        x = self["lconv1d"](self["attention"](self["ffw_layer_start"](x), frames))
        return self["norm"](self.bounded(self["ffw_layer_end"](x)))


class Gemma3nTower(nn.Module):
    """The encoder of Gemma 3n: a row for 160 ms."""

    def __init__(self, config: Gemma3nAudio):
        super().__init__()
        self._span, self._reduction = config.span, config.reduction
        self.subsample_conv_projection = Gemma3nProjection(config)
        self.conformer = [Gemma3nBlock(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, mel: mx.array) -> mx.array:
        """Rows `[n, E]` of mel frames `[T, bins]`, in their dtype."""
        x = self["subsample_conv_projection"](mel)
        shared = frames(x.shape[0], self._span, x.shape[1], x.dtype)
        for layer in self["conformer"]:
            x = layer(x, shared)
        return x[:: self._reduction]
