"""The gated delta rule: a state S `[Dk, Dv]` of each head that a token changes and then reads.

    S <- e^g S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q

A chunk is computed in blocks of `BLOCK` tokens. Within one, the changes of its tokens are the
solution of a triangular system (the WY form): with T = (1 + A)^-1, A the strictly lower part of
beta k k^T under the decays between two tokens, the tokens write T beta v, less what they read of
the state before the block. So a block is a few products, and only the states between blocks come
one after the other. Sources: Yang et al., "Gated Delta Networks" (arXiv 2412.06464), "Parallelizing
Linear Transformers with the Delta Rule" (arXiv 2406.06484).

All of it is float32. Each of Hk key heads serves r value heads.
"""

from __future__ import annotations

import functools

import mlx.core as mx

from mlxkv.kv.types import RULE_BLOCK
from mlxkv.nn.layers import compiled

BLOCK = RULE_BLOCK
"""Tokens of a block, a power of two."""


def step(
    qk: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """One token of each sequence.

    Args:
        qk: its query and its key, `[B, Hk, 2, Dk]`.
        v: `[B, Hk, r, Dv]`.
        decay: e^g, `[B, Hk, r, 1]`.
        beta: `[B, Hk, r, 1]`.
        state: `[B, Hk, r, Dk, Dv]`.

    Returns:
        o `[B, Hk, r, Dv]`, and the state behind it.
    """
    q, k = qk[:, :, 0], qk[:, :, 1]
    seen = mx.expand_dims(qk, 2) @ state  # one pass over the state for both
    change = _change(v, decay, beta, seen[..., 1, :])
    o = _read(seen[..., 0, :], decay, mx.sum(q * k, axis=-1, keepdims=True)[..., None], change)
    return o, _written(state, decay[..., None], k[:, :, None, :, None], change[..., None, :])


@compiled
def _change(v: mx.array, decay: mx.array, beta: mx.array, seen: mx.array) -> mx.array:
    return (v - decay * seen) * beta


@compiled
def _read(seen: mx.array, decay: mx.array, qk: mx.array, change: mx.array) -> mx.array:
    return decay * seen + qk * change


@compiled
def _written(state: mx.array, decay: mx.array, k: mx.array, change: mx.array) -> mx.array:
    return state * decay + k * change


def chunk(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """L tokens of each sequence.

    Args:
        q: `[B, L, Hk, Dk]`.
        k: `[B, L, Hk, Dk]`.
        v: `[B, L, Hk, r, Dv]`.
        g: the logarithm of the decay, at most 0, `[B, L, Hk, r]`.
        beta: `[B, L, Hk, r]`.
        state: `[B, Hk, r, Dk, Dv]`.

    Returns:
        o `[B, L, Hk, r, Dv]`, and the state behind the last token.
    """
    L = q.shape[1]
    C = min(BLOCK, 1 << (L - 1).bit_length())
    # Blocks first, so that one is a part of the outermost axis: [n, B, Hk, r, C, ...].
    q, k = (_blocks(x, C).transpose(1, 0, 3, 2, 4)[:, :, :, None] for x in (q, k))
    v = _blocks(v, C).transpose(1, 0, 3, 4, 2, 5)
    g, beta = (_blocks(x, C).transpose(1, 0, 3, 4, 2) for x in (g, beta))
    total = mx.cumsum(g, axis=-1)
    between = _between(total[..., :, None], total[..., None, :], _lower(C))
    system = _system(k @ k.swapaxes(-1, -2), between, beta[..., None], _strictly_lower(C))
    solved = _inverse(system) * beta[..., None, :]
    grown = mx.exp(total)[..., None]
    u = solved @ v
    # What the block's tokens, and its queries, see of the state before it.
    views = mx.concatenate([solved @ (k * grown), q * grown], axis=-2)
    within = (q @ k.swapaxes(-1, -2)) * between
    kept = (k * mx.exp(total[..., -1:] - total)[..., None]).swapaxes(-1, -2)
    last = grown[..., -1:, :]
    found = []
    for i in range(q.shape[0]):
        seen = views[i] @ state
        new = u[i] - seen[..., :C, :]
        found.append(seen[..., C:, :] + within[i] @ new)
        state = state * last[i] + kept[i] @ new
    o = mx.stack(found) if len(found) > 1 else found[0][None]  # [n, B, Hk, r, C, Dv]
    o = o.transpose(1, 0, 4, 2, 3, 5).flatten(1, 2)
    return (o[:, :L] if o.shape[1] > L else o), state


def _blocks(x: mx.array, C: int) -> mx.array:
    """`[B, L, ...]` -> `[B, n, C, ...]`; a token of zeros behind the last changes no state."""
    if missing := -x.shape[1] % C:
        x = mx.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return mx.unflatten(x, 1, (-1, C))


@compiled
def _between(to: mx.array, since: mx.array, lower: mx.array) -> mx.array:
    """The decay from each token of a block to each that is not before it; 0 elsewhere."""
    return mx.exp(mx.where(lower, to - since, -mx.inf))


@compiled
def _system(kk: mx.array, between: mx.array, beta: mx.array, strict: mx.array) -> mx.array:
    return mx.where(strict, kk * between * beta, 0.0)


def _inverse(a: mx.array) -> mx.array:
    """(1 + a)^-1 of strictly lower matrices `[..., C, C]`.

    Diagonal blocks are inverted, then joined to blocks of twice the size:
    [[P, 0], [R, Q]]^-1 = [[P', 0], [-Q' R P', Q']]. A series of powers of `a` needs as many
    products and loses all digits where keys repeat.
    """
    C = a.shape[-1]
    found = mx.eye(C) - a * _corners(C, 1)
    size = 2
    while size < C:
        found = found - found @ (a * _corners(C, size)) @ found
        size *= 2
    return found


@functools.lru_cache(maxsize=16)
def _corners(C: int, size: int) -> mx.array:
    """Where the lower left block of each pair of diagonal blocks of a size is: 1, else 0."""
    at = mx.arange(C) // size
    row, column = at[:, None], at[None]
    return ((row // 2 == column // 2) & (row % 2 == 1) & (column % 2 == 0)).astype(mx.float32)


@functools.lru_cache(maxsize=8)
def _lower(C: int) -> mx.array:
    return mx.arange(C)[:, None] >= mx.arange(C)[None]


@functools.lru_cache(maxsize=8)
def _strictly_lower(C: int) -> mx.array:
    return mx.arange(C)[:, None] > mx.arange(C)[None]
