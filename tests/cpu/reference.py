"""The operations of the kernels in float64, written for reading."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxkv.cpu.formats import DENSE, KINDS, Weight

SILU, GELU_TANH, CLAMPED = 1, 2, 3


def array(x: mx.array) -> np.ndarray:
    """Its values as float64."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def packed(
    w: mx.array, mode: str, bits: int, group: int, dtype: mx.Dtype = mx.float32
) -> tuple[Weight, np.ndarray]:
    """A quantized weight as the kernels take it, and its values."""
    codes, scales, *rest = mx.quantize(w.astype(dtype), group_size=group, bits=bits, mode=mode)
    biases = rest[0] if rest else None
    widened = [None if x is None else x.astype(mx.float32) for x in (scales, biases)]
    scales_of, biases_of = widened if mode == "affine" else (scales, None)
    values = mx.dequantize(
        codes, scales_of, biases_of, group_size=group, bits=bits, mode=mode, dtype=mx.float32
    )
    return (codes, scales, biases, KINDS[mode, bits], group, None), array(values)


def dense(w: mx.array, dtype: mx.Dtype) -> tuple[Weight, np.ndarray]:
    w = w.astype(dtype)
    return (w, None, None, DENSE[dtype], 0, None), array(w)


def normed(x: np.ndarray, scale: np.ndarray | None, eps: float) -> np.ndarray:
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return y if scale is None else y * scale


def gated(act: tuple[int, float, float], both: np.ndarray) -> np.ndarray:
    """The activation of rows of gates and then up projections."""
    gate, up = np.split(both, 2, axis=-1)
    kind, alpha, limit = act
    if kind == SILU:
        return gate / (1 + np.exp(-gate)) * up
    if kind == GELU_TANH:
        inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + np.tanh(inner)) * up
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (up + 1) * gate / (1 + np.exp(-alpha * gate))


def rotated(x: np.ndarray, frequencies: np.ndarray, offsets: Sequence[int]) -> np.ndarray:
    """Heads `[B, N, L, D]` rotated by their positions, the halves of the turned part."""
    half, L = len(frequencies), x.shape[2]
    y = x.copy()
    for b in range(len(x)):
        at = offsets[b if len(offsets) > 1 else 0] + np.arange(L)[:, None]
        c, s = np.cos(at * frequencies), np.sin(at * frequencies)
        first, second = x[b, ..., :half], x[b, ..., half : 2 * half]
        y[b, ..., :half], y[b, ..., half : 2 * half] = (
            first * c - second * s,
            second * c + first * s,
        )
    return y


def attended(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    cap: float = 0.0,
    seen: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Heads side by side, `[B, L, H V]`; `seen` broadcasts to the scores `[B, H, L, S]`."""
    B, H, L, _ = q.shape
    k, v = (np.repeat(x, H // x.shape[1], axis=1) for x in (k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    scores = np.tanh(scores / cap) * cap if cap else scores
    if seen is not None:
        scores = np.where(seen, scores, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(sinks[None, :, None, None], (B, H, L, 1))
        scores = np.concatenate([scores, sink], axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights[..., : k.shape[2]] @ v
    return out.transpose(0, 2, 1, 3).reshape(B, L, -1)


def assert_near(
    got: mx.array, expected: np.ndarray, tolerance: float = 1e-5, size: float | None = None
) -> None:
    """Equal within a part of the size of what is expected: of its standard deviation, or given.

    float32 sums of a thousand values are off by a few 1e-6 of it.
    """
    assert got.shape == expected.shape
    off = np.abs(np.array(got) - expected).max(initial=0) / (size or expected.std())
    assert off < tolerance, f"off by {off:.2g}"
