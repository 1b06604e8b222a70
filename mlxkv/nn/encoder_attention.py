"""Attention of encoders, in which every query sees every key, or those near it on both sides."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlxkv.base import device
from mlxkv.nn.fused import CHUNK_DIMS, VECTOR_QUERIES

QUERY_BLOCK = 64
"""Queries whose scores the CPU backend holds at a time, for each core."""
NEAR_BLOCK = 512
"""Queries within a radius that are computed at a time: the keys past it are left out."""
Attend = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]
LOWEST = -1e30
"""Score of a key that a query does not see."""


def attend_all(
    q: mx.array, k: mx.array, v: mx.array, scale: float, radius: int | None = None
) -> mx.array:
    """softmax(scale * q k^T) v of q, k and v `[B, H, L, D]`; k and v may have fewer heads.

    No scores of whole sequences are kept: Gemma 3's 4096 patches would take 1 GiB of them.

    Args:
        radius: how far from a query the last key lies that it sees, on both sides; None: all.
    """
    L, D = q.shape[2], q.shape[3]
    if radius is not None and L <= radius + 1:
        radius = None
    if device.on_cpu():
        return _in_blocks(q, k, v, scale, radius)
    if radius is not None:
        fused = mx.fast.scaled_dot_product_attention
        return near(q, k, v, radius, lambda q, k, v, mask: fused(q, k, v, scale=scale, mask=mask))
    if device.kind() != "metal" or L <= VECTOR_QUERIES or D in CHUNK_DIMS or D > CHUNK_DIMS[-1]:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    # Zeros behind each head change no score, and make it one that Metal's kernel takes.
    room = [(0, 0), (0, 0), (0, 0), (0, next(n for n in CHUNK_DIMS if n > D) - D)]
    q, k, v = (mx.pad(x, room) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)[..., :D]


def near_mask(L: int, radius: int, start: int, stop: int) -> mx.array:
    """bool `[queries, keys]`: the keys within `radius` of the queries `[start, stop)` of L.

    The keys are those that one of these queries sees, see `seen_keys`.
    """
    first, last = seen_keys(L, radius, start, stop)
    queries, keys = mx.arange(start, stop)[:, None], mx.arange(first, last)[None]
    return (keys <= queries + radius) & (keys >= queries - radius)


def seen_keys(L: int, radius: int | None, start: int, stop: int) -> tuple[int, int]:
    """The first of L keys that one of the queries `[start, stop)` sees, and the one behind the
    last."""
    return (0, L) if radius is None else (max(0, start - radius), min(L, stop + radius))


def near(
    q: mx.array, k: mx.array, v: mx.array, radius: int, attend: Attend, axis: int = 2
) -> mx.array:
    """Attention within a radius, some queries at a time; arguments as for `attend_all`.

    Args:
        attend: of some queries, the keys and values that one of them sees, and the mask.
        axis: of the queries in its result.
    """
    L, parts = q.shape[2], []
    masks: dict[tuple[int, int, int], mx.array] = {}
    for start in range(0, L, NEAR_BLOCK):
        stop = min(start + NEAR_BLOCK, L)
        first, last = seen_keys(L, radius, start, stop)
        shape = stop - start, last - first, start - first
        if shape not in masks:
            masks[shape] = near_mask(L, radius, start, stop)
        seen = k[:, :, first:last], v[:, :, first:last]
        parts.append(attend(q[:, :, start:stop], *seen, masks[shape]))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


def masks_bytes(L: int, radius: int) -> int:
    """Bytes of the masks that `near` makes, of which no trace knows, and of making them."""
    # Blocks at both ends and between them, and two masks that one is made of.
    return 5 * min(L, NEAR_BLOCK) * min(L, NEAR_BLOCK + 2 * radius)


def _in_blocks(q: mx.array, k: mx.array, v: mx.array, scale: float, radius: int | None) -> mx.array:
    """Blocks of queries, which the cores take in turns: each core has one at a time."""
    L, streams = q.shape[2], device.core_streams()
    # Heads side by side, or each block's products copy them; MLX cannot export `contiguous`.
    k, v = (x.flatten().reshape(x.shape) for x in (k, v))
    parts: list[mx.array] = []
    for i, start in enumerate(range(0, L, QUERY_BLOCK)):
        rows, stop = q[:, :, start : start + QUERY_BLOCK], min(L, start + QUERY_BLOCK)
        first, last = seen_keys(L, radius, start, stop)
        with mx.stream(streams[i % len(streams)]):
            if i >= len(streams):
                (rows,) = mx.depends([rows], [parts[i - len(streams)]])
            mask = None if radius is None else near_mask(L, radius, start, stop)
            parts.append(_attend(rows, k[:, :, first:last], v[:, :, first:last], scale, mask))
    return mx.concatenate(parts, axis=2)


def _attend(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None = None
) -> mx.array:
    """What `mx.fast.scaled_dot_product_attention` computes, with powers of two.

    The CPU backend computes a power of two in 7 ns, and an exp, which is most of softmax, in 20.
    """
    B, H, L, D = q.shape
    Hk = k.shape[1]
    q = (q * (scale / math.log(2))).reshape(B, Hk, -1, D)  # heads that share keys
    scores = (q @ k.swapaxes(2, 3)).astype(mx.float32)
    if mask is not None:  # [L, S], for each of the heads that share keys
        apart = scores.reshape(B, Hk, H // Hk, L, -1)
        scores = mx.where(mask, apart, LOWEST).reshape(scores.shape)
    parts = mx.power(2, scores - scores.max(axis=-1, keepdims=True))
    weights = parts / parts.sum(axis=-1, keepdims=True)  # first: sums of parts overflow in float16
    return (weights.astype(v.dtype) @ v).reshape(B, H, L, D)
