"""Operations of MLX that take and give as much memory as the kernels, for a step that is traced.

MLX cannot export the graph of operations that it does not know. These compute nothing of use, and
are one operation where the kernel is one: how many are in flight decides what memory is alive.
Kernels write a new array, never into one of theirs, and so do these.
"""

from __future__ import annotations

import functools

import mlx.core as mx

GROUP, BITS = 32, 4


def rows(x: mx.array, n: int, plus: mx.array | None = None) -> mx.array:
    """Rows of n values that need x, and `plus`."""
    K = x.shape[-1]
    if n == K:
        y = mx.sort(x)
    elif K % GROUP == 0:
        y = mx.quantized_matmul(x, *_weight(n, K), group_size=GROUP, bits=BITS)
    else:
        y = mx.pad(x[..., : min(n, K)], [(0, 0)] * (x.ndim - 1) + [(0, max(n - K, 0) + 1)])[..., :n]
    return y if plus is None else _behind(y, plus)


def experts(x: mx.array, chosen: mx.array, n: int) -> mx.array:
    """Rows `[..., k, n]` of x `[..., K]` or `[..., k, K]`, and of the chosen `[..., k]`."""
    if x.ndim > chosen.ndim:
        return _behind(rows(x, n), chosen)
    k = chosen.shape[-1]
    return _behind(mx.unflatten(rows(x, k * n), -1, (k, n)), chosen)


def heads(x: mx.array, n: int) -> mx.array:
    """`[B, L, n D]` -> `[B, n, L, D]`, dense."""
    B, L, _ = x.shape
    x = x.reshape(B, n, 1, -1) if L == 1 else x.reshape(B, L, n, -1).transpose(0, 2, 1, 3)
    return mx.arctanh(x)  # no task: the two views are counted in its place


def attended(q: mx.array, k: mx.array, v: mx.array, v_dim: int) -> mx.array:
    """Queries `[B, H, L, D]`, keys and values -> `[B, L, H v_dim]`."""
    B, H, L, D = q.shape
    if L > 1 and v_dim == D:
        return _behind(q.transpose(0, 2, 1, 3).reshape(B, L, -1), k, v)  # copies
    return _behind(rows(q.transpose(0, 2, 1, 3).reshape(B, L, -1), H * v_dim), k, v)


def _behind(y: mx.array, *inputs: mx.array) -> mx.array:
    """y, while the inputs are alive."""
    (y,) = mx.depends([y], list(inputs))
    return y


@functools.lru_cache(maxsize=64)
def _weight(n: int, K: int) -> tuple[mx.array, mx.array, mx.array]:
    """A packed weight without memory."""
    codes = mx.broadcast_to(mx.array(0, mx.uint32), (n, K * BITS // 32))
    scales = mx.broadcast_to(mx.array(0.0), (n, K // GROUP))
    mx.eval(codes, scales)
    return codes, scales, scales
