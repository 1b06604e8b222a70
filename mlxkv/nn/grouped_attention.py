"""Grouped-query attention with rotary positions, as most families have it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.kv.layout import LayerCache, Mask, Offset, Stepping
from mlxkv.nn import kernels
from mlxkv.nn.attention import attend
from mlxkv.nn.layers import Fusing, NormedHeads, merge_heads, split_heads
from mlxkv.nn.linear import Linear
from mlxkv.nn.rope import RoPE

if TYPE_CHECKING:
    from mlxkv.nn.decoder_model import GroupedConfig


class Attention(kernels.Settled, Fusing):
    """Grouped-query attention with rotary positions."""

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: GroupedConfig, window: int | None = None):
        super().__init__()
        E, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scale, self.softcap = config.scale, config.attn_logit_softcapping
        self.q_proj = Linear(E, self.n_heads * D, bias=bias)
        self.k_proj = Linear(E, self.n_kv_heads * D, bias=bias)
        self.v_proj = Linear(E, self.n_kv_heads * D, bias=bias)
        self.o_proj = Linear(self.n_heads * D, E, bias=bias and config.out_bias)
        self._rope = RoPE(config.rope_of(window), config.rope_traditional, D)
        self._head_dim, self._steps = D, False

    def __call__(
        self,
        x: mx.array,
        mask: Mask,
        cache: LayerCache | None,
        norm: nn.Module | None = None,
        plus: mx.array | None = None,
    ) -> mx.array:
        """Attention of x, or of norm(x), plus `plus`."""
        if self._steps and mask is None and isinstance(cache, Stepping):
            out = self._stepped(x, cache, norm)
            if out is not None:
                return self["o_proj"](out, plus=plus)
        q, k, v = self.heads(x, 0 if cache is None else cache.offset, norm)
        if cache is not None:
            k, v = cache.update(k, v)
        how = self.scale, mask, self.get("sinks"), self.softcap
        out = kernels.attended(q, k, v, *how) if self.uses_kernels else None
        if out is None:
            out = merge_heads(attend(q, k, v, *how))
        return self["o_proj"](out, plus=plus)

    def settle(self, *, is_hollow: bool = False) -> None:
        super().settle(is_hollow=is_hollow)
        D = self._head_dim
        fits = D % 16 == 0 and D <= kernels.LONGEST_HEAD
        fits &= self.n_heads <= kernels.MOST_SHARED * self.n_kv_heads
        self._steps = self.uses_kernels and fits and self["_rope"].turning is not None

    def _stepped(self, x: mx.array, cache: Stepping, norm: nn.Module | None) -> mx.array | None:
        """The heads' result `[B, 1, H D]` of one token; None where that is not one operation."""
        if x.shape[1] != 1 or (place := cache.next_place()) is None:
            return None
        if not kernels.can_step(x, place):
            return None
        qkv = self.project("qkv_proj", x, norm)
        how = self["_rope"].turning, self.n_heads, self.scale, self.norms
        out, keys, values = kernels.stepped(qkv, place, *how, self.get("sinks"), self.softcap)
        cache.stepped(keys, values)
        return out

    @property
    def norms(self) -> tuple[nn.Module, nn.Module] | None:
        """Of the heads of queries and keys."""
        return None

    def heads(
        self, x: mx.array, offset: Offset, norm: nn.Module | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Queries `[B, H, L, D]`, keys and values `[B, Hk, L, D]`, of x or norm(x)."""
        H, Hk = self.n_heads, self.n_kv_heads
        qkv = self.project("qkv_proj", x, norm)
        if self.uses_kernels and (turned := self["_rope"].of_rows(qkv, H, Hk, offset)) is not None:
            return turned
        return self["_rope"].of_qkv(split_heads(qkv, H + 2 * Hk), H, Hk, offset)


class NormedAttention(Attention, NormedHeads):
    """`Attention` with norms on the heads of queries and keys."""

    def __init__(self, config: GroupedConfig, window: int | None = None):
        super().__init__(config, window)
        self._eps = config.rms_norm_eps
        self.q_norm = config.norm(config.head_dim, self._eps)
        self.k_norm = config.norm(config.head_dim, self._eps)

    @property
    def norms(self) -> tuple[nn.Module, nn.Module] | None:
        return self["q_norm"], self["k_norm"]

    def heads(
        self, x: mx.array, offset: Offset, norm: nn.Module | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        return self.turned(self.project("qkv_proj", x, norm), offset)

    def turned(self, qkv: mx.array, offset: Offset) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of the projections' rows `[B, L, (H + 2 Hk) D]`."""
        B, L, _ = qkv.shape
        H, Hk = self.n_heads, self.n_kv_heads
        if self.uses_kernels:
            turned = self["_rope"].of_rows(qkv, H, Hk, offset, self.norms)
            if turned is not None:
                return turned
        qkv = qkv.reshape(B, L, H + 2 * Hk, -1)
        qk, _ = self.normed(qkv, self._eps)
        qk = self["_rope"](qk.transpose(0, 2, 1, 3), offset)
        q, k = mx.split(qk, (H,), axis=1)  # [B, H, L, D], [B, Hk, L, D]
        return q, k, qkv[:, :, H + Hk :].transpose(0, 2, 1, 3)
