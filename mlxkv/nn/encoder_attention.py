"""Attention of encoders, in which every query sees every key."""

from __future__ import annotations

import math

import mlx.core as mx

from mlxkv.base import device
from mlxkv.nn.fused import CHUNK_DIMS, VECTOR_QUERIES

QUERY_BLOCK = 64
"""Queries whose scores the CPU backend holds at a time, for each core."""


def attend_all(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(scale * q k^T) v of q, k and v `[B, H, L, D]`; k and v may have fewer heads.

    No scores of whole sequences are kept: Gemma 3's 4096 patches would take 1 GiB of them.
    """
    if device.on_cpu():
        return _in_blocks(q, k, v, scale)
    L, D = q.shape[2], q.shape[3]
    if device.kind() != "metal" or L <= VECTOR_QUERIES or D in CHUNK_DIMS or D > CHUNK_DIMS[-1]:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    # Zeros behind each head change no score, and make it one that Metal's kernel takes.
    room = [(0, 0), (0, 0), (0, 0), (0, next(n for n in CHUNK_DIMS if n > D) - D)]
    q, k, v = (mx.pad(x, room) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)[..., :D]


def _in_blocks(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Blocks of queries, which the cores take in turns: each core has one at a time."""
    L, streams = q.shape[2], device.core_streams()
    # Heads side by side, or each block's products copy them; MLX cannot export `contiguous`.
    k, v = (x.flatten().reshape(x.shape) for x in (k, v))
    parts: list[mx.array] = []
    for i, start in enumerate(range(0, L, QUERY_BLOCK)):
        rows = q[:, :, start : start + QUERY_BLOCK]
        with mx.stream(streams[i % len(streams)]):
            if i >= len(streams):
                (rows,) = mx.depends([rows], [parts[i - len(streams)]])
            parts.append(_attend(rows, k, v, scale))
    return mx.concatenate(parts, axis=2)


def _attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """What `mx.fast.scaled_dot_product_attention` computes, with powers of two.

    The CPU backend computes a power of two in 7 ns, and an exp, which is most of softmax, in 20.
    """
    B, H, L, D = q.shape
    q = (q * (scale / math.log(2))).reshape(B, k.shape[1], -1, D)  # heads that share keys
    scores = (q @ k.swapaxes(2, 3)).astype(mx.float32)
    parts = mx.power(2, scores - scores.max(axis=-1, keepdims=True))
    weights = parts / parts.sum(axis=-1, keepdims=True)  # first: sums of parts overflow in float16
    return (weights.astype(v.dtype) @ v).reshape(B, H, L, D)
