"""What the encoders of sound of Gemma 3n and 4 share: conformers (Universal Speech Model).

Two strided convolutions over frames and frequencies, then blocks of feed-forward, local attention,
depthwise convolution and feed-forward. A clip is alone and not padded: x is `[T, E]` throughout.

References: transformers `modeling_gemma3n.py` and `modeling_gemma4.py`; https://arxiv.org/abs/2303.01037.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.models.gemma_audio_config import ConformerConfig, Gemma4Audio, RawAudio, Span
from mlxkv.models.gemma_vision import BOUNDS, ClippableLinear
from mlxkv.nn.layers import ACTIVATIONS, RMSNorm, compiled, on_halves, soft_cap
from mlxkv.nn.linear import Linear

QUERY_SCALE, KEY_SCALE = 1 / math.log(2), math.log(1 + math.e) / math.log(2)
"""softplus(0) and softplus(1) over softplus(0): what the learned scales are relative to."""


def linear(config: ConformerConfig, n_in: int, n_out: int) -> nn.Module:
    """A projection as the family has it."""
    if isinstance(config, Gemma4Audio):
        return ClippableLinear(n_in, n_out, config.use_clipped_linears)
    return Linear(n_in, n_out, bias=False)


@compiled
def _bounded(x: mx.array, bound: float) -> mx.array:
    return mx.clip(x, -bound, bound)


@compiled
def _gated_linear(x: mx.array, gate: mx.array) -> mx.array:
    return x * _sigmoid(gate)


def _sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)); the CPU backend's own takes 4 times as long."""
    if not device.on_cpu():
        return mx.sigmoid(x)
    return 1 / (1 + mx.power(2.0, x * -math.log2(math.e)))


def _silu(x: mx.array) -> mx.array:
    return x * _sigmoid(x)


def _activation(config: ConformerConfig) -> Callable[[mx.array], mx.array]:
    name = config.hidden_act
    return compiled(_silu if name in ("silu", "swish") else ACTIVATIONS[name])


class Bounding(nn.Module):
    """A module that bounds its values, so that 16-bit sums of squares stay finite."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        self._bound = config.gradient_clipping

    def bounded(self, x: mx.array) -> mx.array:
        return _bounded(x, min(self._bound, float(mx.finfo(x.dtype).max)))


class FeedForward(Bounding):
    """x + weight * norm(up and down(norm(x)))."""

    def __init__(self, config: ConformerConfig):
        super().__init__(config)
        E = config.hidden_size
        self._activation = _activation(config)
        self._weight = config.residual_weight
        self.pre_layer_norm = RMSNorm(E, 1e-6)
        self.ffw_layer_1 = linear(config, E, 4 * E)
        self.ffw_layer_2 = linear(config, 4 * E, E)
        self.post_layer_norm = RMSNorm(E, 1e-6)

    def __call__(self, x: mx.array) -> mx.array:
        r = self["ffw_layer_1"](self["pre_layer_norm"](self.bounded(x)))
        r = self.bounded(self["ffw_layer_2"](self._activation(r)))
        return x + self["post_layer_norm"](r) * self._weight


class LightConvolution(Bounding):
    """A gated projection, a causal convolution of each channel, and a projection."""

    def __init__(self, config: ConformerConfig):
        super().__init__(config)
        E, K, eps = config.hidden_size, config.conv_kernel_size, config.rms_norm_eps
        self._activation = _activation(config)
        self.pre_layer_norm = RMSNorm(E, eps)
        self.linear_start = linear(config, E, 2 * E)
        self.depthwise_conv1d = nn.Conv1d(E, E, K, groups=E, bias=False)
        self.conv_norm = RMSNorm(E, eps)
        self.linear_end = linear(config, E, E)

    def __call__(self, x: mx.array) -> mx.array:
        r = on_halves(_gated_linear, self["linear_start"](self["pre_layer_norm"](x)))
        r = self.bounded(causal_convolution(r, self["depthwise_conv1d"]["weight"]))
        return x + self["linear_end"](self._activation(self["conv_norm"](r)))


def causal_convolution(x: mx.array, weight: mx.array) -> mx.array:
    """Convolve each channel of x `[T, E]` with its own kernel `[E, K, 1]` over the past."""
    T, (E, K, _) = x.shape[0], weight.shape
    if not device.on_cpu():
        return mx.conv_general(x[None], weight, padding=([K - 1], [0]), groups=E)[0]
    # The CPU backend's convolution takes 4 times as long as these sums (750 frames of 1,024).
    x, taps = mx.pad(x, [(K - 1, 0), (0, 0)]), weight[:, :, 0].T
    total = x[:T] * taps[0]
    for k in range(1, K):
        total = total + x[k : k + T] * taps[k]
    return total


class Frames(NamedTuple):
    """What all layers share for one clip.

    Args:
        seen: `[U, W, C]`, which keys of its chunk's context each query sees.
        positions: `[C + 1, E]`, sinusoids of relative positions; zeros behind the last.
    """

    seen: mx.array
    positions: mx.array


def frames(T: int, span: Span, dim: int, dtype: mx.Dtype) -> Frames:
    """The masks and positions of T encoder frames."""
    W, C = span.chunk, span.context
    n_chunks = -(-T // W)
    first = mx.arange(n_chunks)[:, None, None] * W
    query = first + mx.arange(W)[:, None]
    key = first - span.past + mx.arange(C)  # [U, 1, C]
    distance = query - key
    near = (distance < span.seen) & (distance >= -span.seen_ahead)
    seen = near & (key >= 0) & (key < T)
    steps = math.log(1e4) / max(dim // 2 - 1, 1)
    times = mx.exp(mx.arange(dim // 2) * -steps)
    at = span.top - mx.arange(span.n_positions)
    angles = at[:, None] * times
    signal = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)
    padded = mx.pad(signal, [(0, C + 1 - span.n_positions), (0, 0)])
    return Frames(seen, padded.astype(dtype))


class LocalAttention(nn.Module):
    """Attention of chunks of queries over the keys around them, with relative positions.

    In float32, whatever the encoder computes in, as the reference of Gemma 4 does.
    """

    key_scale: ClassVar[float] = 1.0

    def __init__(self, config: ConformerConfig):
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        self._span, self._heads = config.span, config.num_attention_heads
        self._scale, self._cap = QUERY_SCALE * D**-0.5, config.attention_logit_cap
        self._masked = config.masked_score
        self.q_proj = linear(config, E, E)
        self.k_proj = linear(config, E, E)
        self.v_proj = linear(config, E, E)
        self.per_dim_scale = mx.zeros((D,))

    def relative_keys(self, positions: mx.array) -> mx.array:
        """Projected sinusoids `[C + 1, E]`."""
        raise NotImplementedError

    def attended(self, x: mx.array, frames: Frames) -> mx.array:
        """The heads' results side by side, `[T, E]`."""
        (T, E), H, span = x.shape, self._heads, self._span
        W, C, n_chunks = span.chunk, span.context, frames.seen.shape[0]
        n_more = n_chunks * W - T
        scale = mx.logaddexp(self["per_dim_scale"].astype(mx.float32), 0.0) * self._scale
        q = self._of_heads(self["q_proj"](x), (0, n_more)) * scale  # [H, U * W, D]
        around = (span.past, n_more + span.ahead)
        k = self._of_heads(self["k_proj"](x), around)
        k = _windows(k if self.key_scale == 1 else k * self.key_scale, span)
        v = _windows(self._of_heads(self["v_proj"](x), around), span)  # [H, U, C, D]
        positions = self._of_heads(self.relative_keys(frames.positions), (0, 0))
        # Row w begins w keys later in its chunk's context than row 0: one column more than
        # there are keys, and the rows laid end to end shift each by one.
        near = (q @ positions.swapaxes(-1, -2)).reshape(H, n_chunks, W * (C + 1))
        near = near[..., : W * C].reshape(H, n_chunks, W, C)
        scores = q.reshape(H, n_chunks, W, -1) @ k.swapaxes(-1, -2) + near
        scores = mx.where(frames.seen, soft_cap(scores, self._cap), self._masked)
        out = mx.softmax(scores, axis=-1) @ v  # [H, U, W, D]
        return out.transpose(1, 2, 0, 3).reshape(-1, E)[:T].astype(x.dtype)

    def _of_heads(self, x: mx.array, more: tuple[int, int]) -> mx.array:
        """`[T, H * D]` -> float32 `[H, T, D]`, with zeros before and behind."""
        heads = x.astype(mx.float32).reshape(x.shape[0], self._heads, -1).transpose(1, 0, 2)
        return mx.pad(heads, [(0, 0), more, (0, 0)])


def _windows(x: mx.array, span: Span) -> mx.array:
    """The keys around each chunk, `[H, S, D]` -> `[H, U, C, D]`: a view, most of them twice."""
    H, S, D = x.shape
    n_chunks = (S - span.context) // span.chunk + 1
    return mx.as_strided(x, (H, n_chunks, span.context, D), (S * D, span.chunk * D, D, 1))


def audio_names(
    weights: Mapping[str, mx.array], config: ConformerConfig | RawAudio | None
) -> tuple[dict[str, mx.array], list[str]]:
    """The weights with the encoder's convolutions in MLX's layout, `[out, ..., in]`.

    Hugging Face has `[out, in, ...]`; what was written for MLX is left as it is.

    Returns:
        All weights, and the names left out: bounds of an encoder that clips nothing.
    """
    if not isinstance(config, ConformerConfig):
        return dict(weights), []
    clips = isinstance(config, Gemma4Audio) and config.use_clipped_linears
    kept: dict[str, mx.array] = {}
    skipped: list[str] = []
    for name, array in weights.items():
        ours = name.startswith("audio_tower.")
        if ours and name.endswith(BOUNDS) and not clips:
            skipped.append(name)
            continue
        if ours and "conv" in name and array.ndim > 2:
            second = ".conv_1." in name or ".layer1." in name
            n_in = config.subsampling_conv_channels[0] if second else 1
            array = array if array.shape[-1] == n_in else mx.moveaxis(array, 1, -1)
        kept[name] = array
    return kept, skipped
