"""Attention of encoders, in which every query sees every key."""

from __future__ import annotations

import mlx.core as mx

from mlxkv.base import device
from mlxkv.nn.fused import CHUNK_DIMS, VECTOR_QUERIES

QUERY_BLOCK = 256
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
    """The queries divided over the cores, and each core's in blocks, one after the other."""
    L, streams = q.shape[2], device.core_streams()
    if L <= QUERY_BLOCK:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    parts: list[mx.array] = []
    for stream, first, last in device.shares(L, streams):
        before: list[mx.array] = []
        for start in range(first, last, QUERY_BLOCK):
            rows = q[:, :, start : min(start + QUERY_BLOCK, last)]
            if before:
                with mx.stream(stream):
                    (rows,) = mx.depends([rows], before)
            out = mx.fast.scaled_dot_product_attention(rows, k, v, scale=scale, stream=stream)
            before = [out]
            parts.append(out)
    return mx.concatenate(parts, axis=2)
