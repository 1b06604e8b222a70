"""The one switch to the kernels of the CPU backend (`mlxkv.cpu`).

Blocks ask here when they are loaded (`Settled`). Where there are no kernels (on a GPU, without a
compiler, in another dtype or format), they go on with MLX's own operations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxkv.base import device
from mlxkv.cpu.formats import (
    ACTS,
    KINDS,
    NO_ACT,
    Weight,
    clamped,
    is_known,
    narrowed,
    weight_of,
)
from mlxkv.cpu.library import library, look_again, state
from mlxkv.kv.layout import Mask, Offset, Place, Positions, TwoWayMask
from mlxkv.kv.storage import KV, QuantizedRows, Ragged, in_parts
from mlxkv.nn import stand_ins

__all__ = ["ACTS", "NO_ACT", "Weight", "clamped", "look_again", "narrowed", "state"]

MOST_SHARED, LONGEST_HEAD = 16, 1024
"""Query heads of a KV head, and values of a head, that the kernels take."""

MOST_ROWS = 8
"""Rows that are multiplied with a weight at a time."""

Act = tuple[int, float, float]
Norm = Any
"""A module with `scale` and `eps`."""
Low = tuple[
    mx.array,
    mx.array,
    mx.array | None,
    mx.array | None,
    tuple[int, ...],
    tuple[int, ...],
    mx.array,
]
"""Changes of a product's rows, see `lora_kernel`: `a`, `b`, factor, shift, the change of each row
(one for all, or those of some rows in turn), what each part of them is, and the scale of each rank.
"""

_tracing = False


class Settled:
    """A block that asks once, when its weights are loaded, whether there are kernels.

    Attributes:
        uses_kernels: whether there are: asked in every step it would cost calls in Python.
    """

    uses_kernels = False

    def settle(self, *, is_hollow: bool = False) -> None:
        """Ask.

        Args:
            is_hollow: the block's arrays hold no values to look at.
        """
        del is_hollow
        self.uses_kernels = kernels() is not None


def settle(model: nn.Module, *, is_hollow: bool = False) -> None:
    """Settle all blocks of a loaded model; arguments as for `Settled.settle`.

    Blocks inside others come first, which may ask them.
    """
    look_again()
    for module in reversed(model.modules()):
        if isinstance(module, Settled):
            module.settle(is_hollow=is_hollow)
    if not is_hollow:
        ask_for_huge_pages([array for _, array in tree_flatten(model.parameters())])


def ask_for_huge_pages(arrays: list[Any]) -> None:
    """Have computed arrays that the kernels read in every step lie in large pages, soon."""
    found = kernels()
    if found is not None:
        found.huge_pages(arrays)


def kernels() -> ModuleType | None:
    """The kernels, if this process computes on the CPU backend and they are built."""
    return library() if device.on_cpu() else None


def weight(module: Any, *, is_hollow: bool = False) -> Weight | None:
    """A projection's weight as the kernels take it; None without kernels.

    Args:
        module: with `weight` and, where it is quantized, `scales` and the like.
        is_hollow: its arrays hold no values to look at.
    """
    return None if kernels() is None else weight_of(module, looks=not is_hollow)


def takes(module: Any) -> bool:
    """Whether the kernels take a projection's weight in the format that a file has it in."""
    return kernels() is not None and is_known(module)


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """While a step is traced: operations of MLX stand in for the kernels (`stand_ins`)."""
    global _tracing
    before, _tracing = _tracing, True
    try:
        yield
    finally:
        _tracing = before


def is_traced() -> bool:
    """Whether a step is being traced: nothing may be evaluated then."""
    return _tracing


def linear(
    x: mx.array,
    weight: Weight,
    norm: Norm | None = None,
    plus: mx.array | None = None,
    act: Act = NO_ACT,
    low: Low | None = None,
) -> mx.array:
    """act(norm(x) W^T + b) + plus, `[..., N]` or with an activation `[..., N / 2]`; `low` changes
    what the activation takes."""
    if _tracing:
        return stand_ins.rows(x, _out_dim(weight, act), plus)
    ops = _ops()
    if low is not None:
        scale, eps = (None, -1.0) if norm is None else (norm.scale, norm.eps)
        return ops.changed_linear(x, weight, scale, eps, plus, act, low)
    if norm is None:
        return ops.linear(x, weight, None, -1.0, plus, act)
    return ops.linear(x, weight, norm.scale, norm.eps, plus, act)


def embedded(tokens: mx.array, weight: Weight, dim: int) -> mx.array | None:
    """Rows of an affine weight `[N, dim]`, float32 `[..., dim]`; None for what the kernels do not
    take.
    """
    is_known = tokens.dtype in (mx.int32, mx.uint32) and not _tracing
    return _ops().embed(tokens, weight, dim) if is_known else None


def experts(x: mx.array, weight: Weight, chosen: mx.array, act: Act = NO_ACT) -> mx.array:
    """act(x W_e^T + b_e) of each row's experts, `[..., k, N]`.

    Args:
        x: `[..., K]`, or `[..., k, K]` with a row for each expert.
        weight: of all experts.
        chosen: experts of each row, `[..., k]`.
        act: with it the weight's rows are the gate's, then the up projection's.
    """
    if _tracing:
        return stand_ins.experts(x, chosen, _out_dim(weight, act))
    return _ops().experts(x, weight, chosen, act)


def rms_norm(
    x: mx.array, scale: mx.array | None, eps: float, plus: mx.array | None = None
) -> mx.array:
    """rms_norm(x) + plus of float32 rows."""
    if _tracing:
        return stand_ins.rows(x, x.shape[-1], plus)
    return _ops().rms_norm(x, scale, eps, plus)


def quantized(
    values: mx.array, group_size: int, bits: int, stream: mx.Stream
) -> tuple[mx.array, ...]:
    """`mx.quantize` of rows of finite floats `[..., K]` to an affine format, the same to the bit.

    Returns:
        Codes `[..., K * bits / 32]`, scales and biases `[..., K / group_size]`, being computed on
        the stream.
    """
    found = kernels() if ("affine", bits) in KINDS else None
    if found is None:
        return tuple(mx.quantize(values, group_size, bits, stream=stream))
    with mx.stream(stream):
        return found.quantize(values, group_size, bits)


def largest(logits: mx.array) -> mx.array | None:
    """The largest of each row, NaN where one is; None for what the kernels do not take."""
    found = kernels() if logits.dtype == mx.float32 else None
    return None if found is None else found.largest(logits)


def argmax(logits: mx.array) -> mx.array:
    """`mx.argmax` along the last axis."""
    found = kernels() if logits.dtype == mx.float32 else None
    return mx.argmax(logits, axis=-1) if found is None else found.first_largest(logits)


def rotated(
    qkv: mx.array,
    n_heads: int,
    n_kv_heads: int,
    frequencies: mx.array,
    offset: Offset,
    factor: float,
    norms: tuple[Norm, Norm] | None = None,
) -> mx.array | None:
    """Heads `[B, L, (H + 2 Hk) D]` -> `[B, H + 2 Hk, L, D]`: queries and keys normed and rotated.

    `frequencies` are radians per position of each pair. None for what the kernels do not take.
    """
    n = n_heads + 2 * n_kv_heads
    D = qkv.shape[-1] // n
    if qkv.dtype != mx.float32 or D > LONGEST_HEAD:
        return None
    if _tracing:
        return stand_ins.heads(qkv, n)
    at = offset.of if isinstance(offset, Positions) else (offset,)
    q_norm, k_norm, eps = None, None, 0.0
    if norms is not None:
        q_norm, k_norm, eps = norms[0].scale, norms[1].scale, norms[0].eps
    return _ops().rotate(qkv, frequencies, n_heads, n_kv_heads, at, factor, q_norm, k_norm, eps)


def can_step(x: mx.array, place: Place) -> bool:
    """Whether `stepped` takes the heads of x and a place."""
    dtypes = x.dtype, place.keys.dtype, place.values.dtype
    return not _tracing and dtypes == (mx.float32,) * 3 and x.shape[0] == len(place.columns)


def stepped(
    qkv: mx.array,
    place: Place,
    turning: tuple[mx.array, float],
    n_heads: int,
    scale: float,
    norms: tuple[Norm, Norm] | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """One token's heads `[B, 1, (H + 2 Hk) D]` turned, written to their place, and attended.

    `turning` is `rotated`'s frequencies and factor.

    Returns:
        `[B, 1, H D]`, and the place's buffers of keys and values with the token in them.
    """
    frequencies, factor = turning
    q_norm, k_norm, eps = None, None, 0.0
    if norms is not None:
        q_norm, k_norm, eps = norms[0].scale, norms[1].scale, norms[0].eps
    keys, values, positions, columns, lengths, starts = place
    return _ops().attend_step(
        qkv, frequencies, keys, values, n_heads, keys.shape[1], positions, factor, q_norm, k_norm,
        eps, columns, lengths, starts, scale, softcap or 0.0, sinks,
    )  # fmt: skip


def gated_mlp(
    x: mx.array,
    up: Weight,
    norm: Norm | None,
    down: Weight,
    plus: mx.array | None,
    act: Act,
    lows: tuple[Low | None, Low | None] = (None, None),
) -> mx.array:
    """`linear(linear(x, up, norm, act=act), down, plus=plus)`, changed by `lows`; one operation of
    a few rows."""
    if _tracing or x.size > MOST_ROWS * x.shape[-1]:
        return linear(linear(x, up, norm, act=act, low=lows[0]), down, plus=plus, low=lows[1])
    scale, eps = (None, -1.0) if norm is None else (norm.scale, norm.eps)
    if lows != (None, None):
        return _ops().changed_mlp(x, up, scale, eps, down, plus, act, *lows)
    return _ops().gated_mlp(x, up, scale, eps, down, plus, act)


def attended(
    q: mx.array,
    k: KV,
    v: KV,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array | None:
    """`attention.attend` with the heads side by side, `[B, L, H v_dim]`; None for what the kernels
    do not take.
    """
    if not can_attend(q, k, v):
        return None
    if isinstance(k, Ragged):
        assert isinstance(v, Ragged)
        return in_parts(attended, q, k, v, scale, sinks, softcap)
    if isinstance(mask, TwoWayMask):
        mask = mask.array
    causal = isinstance(mask, str)
    seen = None if isinstance(mask, str) else mask
    cap = softcap or 0.0
    if isinstance(k, QuantizedRows):
        assert isinstance(v, QuantizedRows)
        if _tracing:
            return stand_ins.attended(q, k.codes, v.codes, v.dim)
        parts = [
            (rows.codes, rows.scales, rows.biases, rows.bits, rows.group_size, rows.dim)
            for rows in (k, v)
        ]
        return _ops().attend_codes(q, *parts, scale, cap, causal, seen, sinks)
    assert isinstance(k, mx.array) and isinstance(v, mx.array)
    if _tracing:
        return stand_ins.attended(q, k, v, v.shape[-1])
    return _ops().attend(q, k, v, scale, cap, causal, seen, sinks)


def can_attend(q: mx.array, k: KV, v: KV) -> bool:
    """Whether `attended` takes these."""
    return q.dtype == mx.float32 and _are_known(q, k, v)


def _are_known(q: mx.array, k: KV, v: KV) -> bool:
    if isinstance(k, Ragged):
        assert isinstance(v, Ragged)
        return all(_are_known(q, *pair) for pair in zip(k.parts, v.parts, strict=True))
    D = q.shape[-1]
    if q.shape[1] > MOST_SHARED * k.shape[1] or max(D, v.shape[-1]) > LONGEST_HEAD:
        return False
    if isinstance(k, QuantizedRows):
        assert isinstance(v, QuantizedRows)
        return k.dim == D and D % 16 == 0 and v.dim % 16 == 0
    assert isinstance(v, mx.array)
    return k.dtype == v.dtype == mx.float32 and D % 16 == 0 and v.shape[-1] % 16 == 0


def _out_dim(weight: Weight, act: Act) -> int:
    """Values of a row of the product; with an activation the weight has the gate's rows too."""
    return weight[0].shape[-2] // (2 if act[0] else 1)


@functools.cache  # a call in C: a step has some hundred of them
def _ops() -> ModuleType:
    found = library()
    assert found is not None
    return found
