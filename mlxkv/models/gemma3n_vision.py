"""The picture encoder of Gemma 3n: MobileNetV5 of 300M parameters with its multi-scale adapter.

Reference: timm `mobilenetv5.py` (`mobilenetv5_300m_enc`), as transformers wraps it. Pictures lie as
MLX's convolutions take them: `[1, H, W, C]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxkv.models.gemma3n_config import VisionConfig
from mlxkv.nn.encoder_attention import attend_all
from mlxkv.nn.layers import RMSNorm, compiled, gelu_tanh

STEM_CHANNELS = 64
OUT_CHANNELS = 2048
EPS = 1e-6
"""Of every norm."""


class Edge(NamedTuple):
    """A 3 x 3 convolution to 4 times the channels, and back."""

    channels: int
    stride: int = 1


class Inverted(NamedTuple):
    """A wide middle between two products; kernels of 0 stand for no convolution there.

    Args:
        start: kernel of the convolution by channel before the first product.
        mid: kernel of the one between the products, which has the stride.
        expand: the middle's channels over the input's.
    """

    channels: int
    start: int
    mid: int = 0
    stride: int = 1
    expand: float = 4.0


class MultiQuery(NamedTuple):
    """Attention of all places to all, with one head of keys and values of `head_dim`."""

    channels: int
    n_heads: int
    head_dim: int
    kv_stride: int


Block = Edge | Inverted | MultiQuery
_ATTEND_3 = (MultiQuery(640, 12, 64, 2), Inverted(640, 0, expand=2.0))
_ATTEND_4 = (MultiQuery(1280, 16, 96, 1), Inverted(1280, 0, expand=2.0))
STAGES: tuple[tuple[Block, ...], ...] = (
    (Edge(128, 2), Edge(128), Edge(128)),
    (Inverted(256, 3, 5, 2, 6.0), *(Inverted(256, start) for start in (5, 3, 5, 3))),
    (
        Inverted(640, 5, 5, 2, 6.0),
        *(Inverted(640, 5),) * 7,
        Inverted(640, 0, expand=1.0),
        *_ATTEND_3 * 14,
    ),
    (Inverted(1280, 5, 5, 2, 6.0), *_ATTEND_4 * 19),
)
"""The adapter reads the outputs of the last two."""


def divisible(channels: float) -> int:
    """The nearest multiple of 8, not under 90% of it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class Conv(nn.Module):
    """A convolution of k x k whose output has 1/stride of the rows and columns, rounded up.

    Args:
        by_channel: each output channel reads its input channel alone.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        by_channel: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        self._stride, self._groups = stride, channels if by_channel else 1
        self.weight = mx.zeros((out_channels, kernel, kernel, channels // self._groups))
        if bias:
            self.bias = mx.zeros((out_channels,))

    def __call__(self, x: mx.array) -> mx.array:
        weight, stride = self["weight"], self._stride
        kernel = weight.shape[1]
        if kernel == 1:
            x = x @ weight.reshape(weight.shape[0], -1).T
        else:
            pads = [_padding(size, kernel, stride) for size in x.shape[1:3]]
            x = mx.pad(x, [(0, 0), *pads, (0, 0)])
            x = mx.conv2d(x, weight, stride, groups=self._groups)
        return x + self["bias"] if "bias" in self else x


def _padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and behind, as TensorFlow's "same": an odd one goes behind."""
    zeros = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return zeros // 2, zeros - zeros // 2


class ConvNorm(nn.Module):
    """A convolution and a norm over the channels; `activates` adds GELU in its tanh form."""

    def __init__(self, conv: Conv, activates: bool = False):
        super().__init__()
        self.conv = conv
        self.bn = RMSNorm(conv["weight"].shape[0], EPS)
        self._activates = activates

    def __call__(self, x: mx.array) -> mx.array:
        x = self["bn"](self["conv"](x))
        return _gelu(x) if self._activates else x


_gelu = compiled(gelu_tanh)


class LayerScale(nn.Module):
    """A factor on each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return x * self["gamma"]


class EdgeBlock(nn.Module):
    def __init__(self, channels: int, block: Edge):
        super().__init__()
        middle = divisible(channels * 4)
        self._skips = channels == block.channels and block.stride == 1
        self.conv_exp = Conv(channels, middle, 3, block.stride)
        self.bn1 = RMSNorm(middle, EPS)
        self.conv_pwl = Conv(middle, block.channels)
        self.bn2 = RMSNorm(block.channels, EPS)

    def __call__(self, x: mx.array) -> mx.array:
        y = _gelu(self["bn1"](self["conv_exp"](x)))
        y = self["bn2"](self["conv_pwl"](y))
        return x + y if self._skips else y


class InvertedBlock(nn.Module):
    """An `Inverted`, if `scaled` with factors on its channels and, where it can be, its input."""

    def __init__(self, channels: int, block: Inverted, scaled: bool = True):
        super().__init__()
        middle, stride = divisible(channels * block.expand), block.stride
        self._skips = scaled and channels == block.channels and stride == 1
        if block.start:
            first = stride if not block.mid else 1
            conv = Conv(channels, channels, block.start, first, by_channel=True)
            self.dw_start = ConvNorm(conv)
        self.pw_exp = ConvNorm(Conv(channels, middle), activates=True)
        if block.mid:
            conv = Conv(middle, middle, block.mid, stride, by_channel=True)
            self.dw_mid = ConvNorm(conv, activates=True)
        self.pw_proj = ConvNorm(Conv(middle, block.channels))
        if scaled:
            self.layer_scale = LayerScale(block.channels)
        self._steps = [
            name
            for name in ("dw_start", "pw_exp", "dw_mid", "pw_proj", "layer_scale")
            if name in self
        ]

    def __call__(self, x: mx.array) -> mx.array:
        y = x
        for name in self._steps:
            y = self[name](y)
        return x + y if self._skips else y


class Projection(nn.Module):
    """Queries, or, `down` by a stride, keys or values."""

    def __init__(self, channels: int, out_channels: int, down: int = 1):
        super().__init__()
        if down > 1:
            self.down_conv = Conv(channels, channels, 3, down, by_channel=True)
            self.norm = RMSNorm(channels, EPS)
        self.proj = Conv(channels, out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        if "down_conv" in self:
            x = self["norm"](self["down_conv"](x))
        return self["proj"](x)


class MultiQueryAttention(nn.Module):
    def __init__(self, channels: int, block: MultiQuery):
        super().__init__()
        D, H = block.head_dim, block.n_heads
        self._head_dim = D
        self.query = Projection(channels, H * D)
        self.key = Projection(channels, D, block.kv_stride)
        self.value = Projection(channels, D, block.kv_stride)
        self.output = Projection(H * D, block.channels)

    def __call__(self, x: mx.array) -> mx.array:
        D = self._head_dim
        # With one head of keys, the heads' queries are queries of one head, in any order.
        q, k, v = (self[name](x).reshape(1, 1, -1, D) for name in ("query", "key", "value"))
        y = attend_all(q, k, v, D**-0.5)
        return self["output"](y.reshape(*x.shape[:3], -1))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, block: MultiQuery):
        super().__init__()
        self.norm = RMSNorm(channels, EPS)
        self.attn = MultiQueryAttention(channels, block)
        self.layer_scale = LayerScale(block.channels)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self["layer_scale"](self["attn"](self["norm"](x)))


_BLOCKS: Mapping[type, Any] = {
    Edge: EdgeBlock,
    Inverted: InvertedBlock,
    MultiQuery: AttentionBlock,
}


class Adapter(nn.Module):
    """The last two stages' outputs, in the size of the first of them, to one of `resolution`."""

    def __init__(self, channels: int, resolution: int):
        super().__init__()
        self._resolution = resolution
        self.ffn = InvertedBlock(channels, Inverted(OUT_CHANNELS, 0, expand=2.0), scaled=False)
        self.norm = RMSNorm(OUT_CHANNELS, EPS)

    def __call__(self, fine: mx.array, coarse: mx.array) -> mx.array:
        _, H, W, _ = fine.shape
        for axis, n in ((1, H), (2, W)):
            coarse = mx.take(coarse, _nearest(coarse.shape[axis], n), axis=axis)
        x = self["ffn"](mx.concatenate([fine, coarse], axis=-1))
        return self["norm"](_resized(x, self._resolution))


def _resized(x: mx.array, n: int) -> mx.array:
    """`[1, H, W, C]` -> `[1, n, n, C]`: means of neighbours where n divides both, else bilinear."""
    _, H, W, C = x.shape
    if H % n == 0 and W % n == 0:
        return x.reshape(1, n, H // n, n, W // n, C).mean(axis=(2, 4))
    for axis, size in ((1, H), (2, W)):
        matrix = _between(size, n).astype(x.dtype)
        x = mx.moveaxis(mx.tensordot(matrix, x, [[1], [axis]]), 0, axis)
    return x


def _nearest(size: int, n: int) -> mx.array:
    """Which of `size` places each of n takes."""
    return mx.array([i * size // n for i in range(n)])


def _between(size: int, n: int) -> mx.array:
    """`[n, size]`: bilinear interpolation, between the two places nearest to each one's middle."""
    rows = []
    for i in range(n):
        at = max((i + 0.5) * size / n - 0.5, 0.0)
        low = int(at)
        row = [0.0] * size
        row[low] += 1 - (at - low)
        row[min(low + 1, size - 1)] += at - low
        rows.append(row)
    return mx.array(rows)


class MobileNet(nn.Module):
    """The encoder: pixels `[1, H, W, 3]` -> `[1, resolution, resolution, 2048]`."""

    def __init__(self, config: VisionConfig, stages: Sequence[Sequence[Block]] = STAGES):
        super().__init__()
        width = config.width
        channels = divisible(STEM_CHANNELS * max(width, 1.0))
        self.conv_stem = ConvNorm(Conv(3, channels, 3, 2, bias=True), activates=True)
        self.blocks: list[list[Any]] = []
        ends = []
        for stage in stages:
            self.blocks.append([])
            for block in stage:
                block = block._replace(channels=divisible(block.channels * width))
                self.blocks[-1].append(_BLOCKS[type(block)](channels, block))
                channels = block.channels
            ends.append(channels)
        self.msfa = Adapter(sum(ends[-2:]), config.resolution)

    def __call__(self, pixels: mx.array) -> mx.array:
        x, ends = self["conv_stem"](pixels), []
        for stage in self["blocks"]:
            for block in stage:
                x = block(x)
            ends.append(x)
        return self["msfa"](*ends[-2:])


class VisionTower(nn.Module):
    """The encoder under transformers' name for it."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        config.check()
        self.timm_model = MobileNet(config)
        self._scale = config.hidden_size**0.5

    def __call__(self, pixels: mx.array) -> mx.array:
        """Rows `[resolution^2, 2048]` for the embedder of pixels `[H, W, 3]`."""
        return self["timm_model"](pixels[None]).reshape(-1, OUT_CHANNELS) * self._scale


def channels_last(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The encoder's tensors with its kernels as MLX's convolutions take them.

    transformers writes `[out, in, k, k]` and mlx-vlm `[out, k, k, in]`.
    """
    kernels = {name: array for name, array in weights.items() if array.ndim == 4}
    if any(_is_torch(array.shape) for array in kernels.values()):
        return weights | {name: array.moveaxis(1, -1) for name, array in kernels.items()}
    return weights


def _is_torch(shape: tuple[int, ...]) -> bool:
    """Whether the kernel's sizes, which are equal, can only be the last two."""
    _, i, j, k = shape
    return j == k != i
