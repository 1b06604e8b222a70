"""Attention over what a cache returns: the one function that all families call."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import mlx.core as mx

from mlxkv.base import device
from mlxkv.kv.layout import Mask, TwoWayMask, windowed_mask
from mlxkv.kv.storage import KV, QuantizedRows, Ragged, Several, dense_both, in_parts
from mlxkv.nn.layers import soft_cap

SPLIT_QUERIES = 64
"""Queries from which a chunk's attention is divided over the cores of the CPU backend."""
SPLIT_KEYS = 2048
"""Keys from which one query's KV heads are."""
BLOCK = 512
"""Quantized keys that are dequantized at a time on the CPU backend."""
FLOAT16_SHRINK = 64.0
"""Divisor of float16 scores that have no scale: up to 4 million they stay in its range."""


def attend(
    q: mx.array,
    k: KV,
    v: KV,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """softmax(scale * q k^T + mask) v, each KV head serving H / Hk query heads.

    `fused.is_fused` says where this is one kernel, which keeps no scores.

    Args:
        q: `[B, H, L, k_dim]`.
        k: `[B, Hk, S, k_dim]`, quantized or not; `Ragged` for one query of each of some sequences.
        v: `[B, Hk, S, v_dim]`, in the keys' form.
        scale: factor on the scores.
        mask: None, `"causal"` (aligned at the end), or bool `[L, S]` or `[B, 1, L, S]`, true where
            visible, never past the query's own position but as a `TwoWayMask` says.
        sinks: one logit per head that takes part in the softmax and has no value, `[H]`.
        softcap: bound of the scores, `c * tanh(score / c)`, before the mask.

    Returns:
        `[B, H, L, v_dim]`.
    """
    if isinstance(k, Ragged):
        assert isinstance(v, Ragged) and mask is None
        if len(k.parts) != 1 or k.order is not None or isinstance(k.masks[0], Several):
            return in_parts(attend, q, k, v, scale, sinks, softcap)
        k, v, mask = k.parts[0], v.parts[0], k.masks[0]
    if isinstance(k, QuantizedRows):
        assert isinstance(v, QuantizedRows)
        return _attend_quantized(q, k, v, scale, mask, sinks, softcap)
    assert isinstance(v, mx.array)
    if device.on_cpu() and softcap is None:
        return _attend_on_cpu(q, k, v, scale, mask, sinks)
    if isinstance(mask, TwoWayMask):
        mask = mask.array
    if softcap is not None:
        return _attend_capped(q, k, v, scale, mask, softcap)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def _attend_on_cpu(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, sinks: mx.array | None
) -> mx.array:
    B, H, L, D = q.shape
    n_kv_heads = k.shape[1]
    if L >= SPLIT_QUERIES and mask is not None:
        return _attend_on_all_cores(q, k, v, scale, mask, sinks)
    if isinstance(mask, TwoWayMask):
        mask = mask.array
    if L == 1 and not isinstance(mask, str) and H != n_kv_heads:
        # The heads that share a KV head are one product's rows: K and V are read once, not H/Hk
        # times. Metal's kernel for single queries does this by itself.
        rows = q.reshape(B, n_kv_heads, H // n_kv_heads, D)
        if sinks is not None:
            sinks = sinks.reshape(n_kv_heads, H // n_kv_heads, 1)
        return _attend_one(rows, k, v, scale, sinks, mask).reshape(B, H, 1, v.shape[-1])
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def _attend_one(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    sinks: mx.array | None,
    mask: mx.array | None,
) -> mx.array:
    """One query's heads `[B, Hk, H / Hk, D]`; with many keys, the KV heads on several cores.

    Sinks are `[Hk, H / Hk, 1]`, a mask `[B, 1, 1, S]`.
    """
    n_kv_heads, n_keys = k.shape[1], k.shape[0] * k.shape[2]
    streams = device.core_streams()[:n_kv_heads]
    if len(streams) < 2 or n_keys < SPLIT_KEYS:
        return _attend_rows(q, k, v, scale, sinks, mask)
    parts = []
    for stream, i, j in device.shares(n_kv_heads, streams):
        with mx.stream(stream):
            part = None if sinks is None else sinks[i:j]
            parts.append(_attend_rows(q[:, i:j], k[:, i:j], v[:, i:j], scale, part, mask))
    return mx.concatenate(parts, axis=1)


def _attend_rows(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    sinks: mx.array | None,
    mask: mx.array | None,
) -> mx.array:
    if sinks is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    # MLX takes one sink per head; here the heads are rows.
    scores = (q * scale) @ k.swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    sinks = mx.broadcast_to(sinks.astype(q.dtype), (*scores.shape[:-1], 1))
    weights = mx.softmax(mx.concatenate([scores, sinks], axis=-1), axis=-1, precise=True)
    return weights[..., :-1] @ v


def _attend_on_all_cores(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: mx.array | TwoWayMask | str,
    sinks: mx.array | None,
) -> mx.array:
    """Divide a chunk's queries over the cores: the CPU backend computes a softmax on one."""
    L, S = q.shape[2], k.shape[2]
    two_way = mask if isinstance(mask, TwoWayMask) else None
    whole, parts = mask.array if isinstance(mask, TwoWayMask) else mask, []
    for stream, start, stop in device.shares(L, device.core_streams()):
        # The keys that none of these queries sees are not computed.
        seen = S - L + (stop if two_way is None else two_way.n_seen(stop))
        parts.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, :seen],
                v[:, :, :seen],
                scale=scale,
                mask=whole if isinstance(whole, str) else whole[..., start:stop, :seen],
                sinks=sinks,
                stream=stream,
            )
        )
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _attend_capped(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None, softcap: float
) -> mx.array:
    B, H, L, D = q.shape
    Hk, S = k.shape[1], k.shape[2]
    q = (q * scale).reshape(B, Hk, H // Hk, L, D)
    scores = q @ mx.expand_dims(k, 2).swapaxes(-1, -2)  # [B, Hk, H / Hk, L, S]
    scores = soft_cap(scores, softcap)
    if isinstance(mask, str):
        mask = windowed_mask(L, S - L, S)
    if mask is not None:
        if mask.ndim == 4:
            mask = mask[:, None]
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return (weights @ mx.expand_dims(v, 2)).reshape(B, H, L, v.shape[-1])


def _attend_quantized(
    q: mx.array,
    k: QuantizedRows,
    v: QuantizedRows,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
    softcap: float | None,
) -> mx.array:
    B, H, L, D = q.shape
    on_cpu = device.on_cpu()
    if L > 1 and not on_cpu:
        # One layer's KV at a time is dequantized, for the kernels of native KV.
        return attend(q, *dense_both(k, v), scale, mask, sinks, softcap)
    Hk, dtype = k.shape[1], q.dtype
    if on_cpu:  # the CPU backend sums 16-bit products in 16 bits
        q = q.astype(mx.float32)
    if sinks is not None:
        sinks = sinks.reshape(1, Hk, H // Hk, 1, 1)
    if L > 1:
        rows = (q * scale).reshape(B, Hk, H // Hk, L, D)
        out = _attend_blocks(rows, k, v, mask, sinks, softcap)
        return out.reshape(B, H, L, v.dim).astype(dtype)
    # Without a scale (norms replace it) a product may leave float16's range.
    shrink = FLOAT16_SHRINK if q.dtype == mx.float16 and scale >= 1 else 1.0
    if scale != shrink:
        q = q * (scale / shrink)
    seen = mask if isinstance(mask, mx.array) else None  # the last query sees every key before it
    out = _attend_codes(q.reshape(B, Hk, H // Hk, D), k, v, sinks, softcap, seen, shrink)
    return out.reshape(B, H, 1, v.dim).astype(dtype)


def _attend_codes(
    q: mx.array,
    k: QuantizedRows,
    v: QuantizedRows,
    sinks: mx.array | None,
    softcap: float | None,
    mask: mx.array | None = None,
    shrink: float = 1.0,
) -> mx.array:
    """One query's heads `[B, Hk, H / Hk, D]`, scaled and divided by `shrink`, over the codes.

    Sinks are `[1, Hk, H / Hk, 1, 1]`, a mask broadcasts to `[B, 1, 1, S]`. The softmax sums in
    float32; products, and the result `[B, Hk, H / Hk, v_dim]`, are in the query's dtype.
    """
    n_missing = k.scales.shape[-1] * k.group_size - q.shape[-1]
    if n_missing:
        q = mx.pad(q, [(0, 0), (0, 0), (0, 0), (0, n_missing)])
    scores = mx.quantized_matmul(
        q, k.codes, k.scales, k.biases, transpose=True, group_size=k.group_size, bits=k.bits
    )
    if softcap is not None:
        scores, shrink = mx.tanh(scores / (softcap / shrink)) * softcap, 1.0
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    if sinks is not None:  # takes part in the softmax, and has no value
        sinks = (sinks[..., 0] / shrink if shrink != 1 else sinks[..., 0]).astype(scores.dtype)
        scores = mx.concatenate([scores, mx.broadcast_to(sinks, (*scores.shape[:-1], 1))], axis=-1)
    if shrink != 1:
        # No score is above 0, so one that leaves the range has no weight.
        scores = (scores - scores.max(axis=-1, keepdims=True)) * shrink
    weights = mx.softmax(scores, axis=-1, precise=True)[..., : k.shape[2]]
    out = mx.quantized_matmul(
        weights, v.codes, v.scales, v.biases, transpose=False, group_size=v.group_size, bits=v.bits
    )
    return out[..., : v.dim]


def _attend_blocks(
    q: mx.array,
    k: QuantizedRows,
    v: QuantizedRows,
    mask: Mask,
    sinks: mx.array | None,
    softcap: float | None,
) -> mx.array:
    """A chunk's attention on the CPU backend: each core dequantizes `BLOCK` keys at a time.

    Queries are scaled, float32 `[B, Hk, H / Hk, L, D]`, sinks `[1, Hk, H / Hk, 1, 1]`; the result
    is float32 `[B, Hk, H / Hk, L, v_dim]`.
    """
    L, S = q.shape[3], k.shape[2]
    streams = device.core_streams() if L >= SPLIT_QUERIES else (None,)
    parts = []
    for stream, start, stop in device.shares(L, streams):
        visible = _Visible(mask, L, S, start, stop)
        with mx.stream(stream) if stream is not None else contextlib.nullcontext():
            parts.append(_online(q[:, :, :, start:stop], k, v, visible, sinks, softcap))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=3)


@dataclass(frozen=True, slots=True)
class _Visible:
    """Which of S keys the queries `[start, stop)` of a chunk of L see; the mask is the chunk's."""

    mask: Mask
    L: int
    S: int
    start: int
    stop: int

    @property
    def n_keys(self) -> int:
        """Keys up to the last visible one."""
        if isinstance(self.mask, TwoWayMask):
            return self.S - self.L + self.mask.n_seen(self.stop)
        return self.S if self.mask is None else self.S - self.L + self.stop

    def block(self, first: int, last: int) -> mx.array | None:
        """bool `[..., queries, keys]` for the keys `[first, last)`; None if all are visible."""
        if self.mask is None:
            return None
        mask = self.mask.array if isinstance(self.mask, TwoWayMask) else self.mask
        if isinstance(mask, mx.array):
            return mask[..., self.start : self.stop, first:last]
        n_before = self.S - self.L
        if last <= n_before + self.start + 1:
            return None
        queries = mx.arange(n_before + self.start, n_before + self.stop)[:, None]
        return mx.arange(first, last)[None] <= queries


def _online(
    q: mx.array,
    k: QuantizedRows,
    v: QuantizedRows,
    visible: _Visible,
    sinks: mx.array | None,
    softcap: float | None,
) -> mx.array:
    """`_attend_blocks` on one core: an online softmax (https://arxiv.org/abs/1805.02867)."""
    lowest = mx.array(-1e30, mx.float32)
    shape = (*q.shape[:-1], 1)
    if sinks is None:
        highest, total = mx.broadcast_to(lowest, shape), mx.zeros(shape)
    else:  # takes part in the softmax, and has no value
        highest, total = mx.broadcast_to(sinks.astype(mx.float32), shape), mx.ones(shape)
    out = mx.zeros((*q.shape[:-1], v.dim))
    for first in range(0, visible.n_keys, BLOCK):
        last = min(first + BLOCK, visible.n_keys)
        # After the block before it: else MLX may dequantize many blocks before it sums one.
        block_k, block_v = k.tokens(first, last), v.tokens(first, last)
        if first:
            block_k, block_v = block_k.after(out, total), block_v.after(out, total)
        keys = block_k.dequantized()[:, :, None].astype(mx.float32)
        scores = q @ keys.swapaxes(-1, -2)
        if softcap is not None:
            scores = mx.tanh(scores / softcap) * softcap
        seen = visible.block(first, last)
        if seen is not None:
            scores = mx.where(seen, scores, lowest)
        before, highest = highest, mx.maximum(highest, scores.max(axis=-1, keepdims=True))
        weights, faded = mx.exp(scores - highest), mx.exp(before - highest)
        total = total * faded + weights.sum(axis=-1, keepdims=True)
        values = block_v.dequantized()[:, :, None].astype(mx.float32)
        out = out * faded + weights @ values
    return out / total
