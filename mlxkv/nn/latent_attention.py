"""Multi-head latent attention (MLA, https://arxiv.org/abs/2405.04434).

The cache holds one latent of kv_lora_rank + qk_rope_head_dim values a token: keys and values of
every head are products of it. `embed_q` and `unembed_out`, mlx-lm's names, are the two halves of
the checkpoint's `kv_b_proj`. They project either the queries into the latent space and the result
out of it (absorbed), or the latents to keys and values (expanded).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.rope_config import RopeConfig, rope_config
from mlxkv.kv.layout import LayerCache, Mask
from mlxkv.kv.storage import KV, Ragged, dense, leading
from mlxkv.nn.attention import attend
from mlxkv.nn.decoder_model import DecoderConfig, decoder_fields
from mlxkv.nn.layers import Fusing, RMSNorm
from mlxkv.nn.linear import DENSE_ROWS, Linear, Quantizable, QuantizedStack, product_dtype
from mlxkv.nn.rope import RoPE, yarn_mscale

LATENT_NORM_EPS = 1e-6
"""Of the norms inside the low-rank projections, which ignore `rms_norm_eps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig(DecoderConfig):
    """A decoder whose layers all have latent attention."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    rope_interleave: bool

    @property
    def q_dim(self) -> int:
        """Values of a head's query, and of its key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values that the cache holds a token."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def latent_fields(fields: Fields) -> dict[str, Any]:
    """The values of `LatentConfig`'s fields.

    Raises:
        ConfigError: a key is missing or wrong.
    """
    rope_dim = fields.int("qk_rope_head_dim")
    rope = rope_config(fields, rope_dim, default_theta=None)
    if rope.dims != rope_dim:
        raise fields.error("partial_rotary_factor", "must be 1 beside qk_rope_head_dim")
    return {
        **decoder_fields(fields),
        "q_lora_rank": fields.opt_int("q_lora_rank"),
        "kv_lora_rank": fields.int("kv_lora_rank"),
        "qk_nope_head_dim": fields.int("qk_nope_head_dim"),
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": fields.int("v_head_dim"),
        "rope": rope,
        "rope_interleave": fields.bool("rope_interleave", True),
    }


class HeadLinear(Quantizable):
    """A matrix `[H, out, in]` for each head, used in both directions."""

    def __init__(self, in_dim: int, out_dim: int, n_heads: int):
        super().__init__()
        self.weight = mx.zeros((n_heads, out_dim, in_dim))

    def __call__(self, x: mx.array) -> mx.array:
        """`[B, H or 1, L, in]` -> `[B, H, L, out]`."""
        return x @ self["weight"].swapaxes(-1, -2)

    def back(self, x: mx.array) -> mx.array:
        """`[B, H or 1, L, out]` -> `[B, H, L, in]`: the product with the transposed matrices."""
        return x @ self["weight"]

    def _quantized(self, group_size: int, bits: int, mode: str) -> nn.Module:
        return QuantizedHeadLinear(self, group_size, bits, mode)


class QuantizedHeadLinear(QuantizedStack):
    """`HeadLinear` on quantized matrices."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._product(x, transpose=True)

    def back(self, x: mx.array) -> mx.array:
        return self._product(x, transpose=False)

    def _product(self, x: mx.array, transpose: bool) -> mx.array:
        packed = {
            "scales": self["scales"],
            "biases": self.get("biases"),
            "group_size": self.group_size,
            "bits": self.bits,
            "mode": self.mode,
        }
        if not self._is_faster_dense(x):
            product = mx.quantized_matmul(x, self["weight"], transpose=transpose, **packed)
            return product.astype(x.dtype)
        dtype = product_dtype(x.dtype, self["scales"])
        weight = mx.dequantize(self["weight"], dtype=dtype, **packed)
        return (x @ (weight.swapaxes(-1, -2) if transpose else weight)).astype(x.dtype)

    def _is_faster_dense(self, x: mx.array) -> bool:
        n_rows = x.shape[-2]
        if device.on_cpu():
            return n_rows >= DENSE_ROWS and device.load_blas() is not None
        # The quantized product would copy latents, a part of the cache's rows, for each head; many
        # of them are larger than the matrices.
        return x.shape[1] == 1 and n_rows >= self["weight"].shape[1]


class LatentAttention(Fusing):
    """Multi-head latent attention with low-rank queries."""

    fusions: ClassVar = {"qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}

    def __init__(self, config: LatentConfig):
        super().__init__()
        c, H, E = config, config.num_attention_heads, config.hidden_size
        self._config, self._scale = c, _scale(c)
        self.make_queries(c)
        self.kv_a_proj_with_mqa = Linear(E, c.latent_dim, bias=c.attention_bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS)
        self.embed_q = HeadLinear(c.qk_nope_head_dim, c.kv_lora_rank, H)
        self.unembed_out = HeadLinear(c.kv_lora_rank, c.v_head_dim, H)
        self.o_proj = Linear(H * c.v_head_dim, E, bias=c.attention_bias)
        self._rope = RoPE(c.rope, c.rope_interleave)

    def make_queries(self, config: LatentConfig) -> None:
        """Make the modules of `queries`, and set `n_queries`, the size of the first projection."""
        c, rank = config, config.q_lora_rank
        assert rank is not None
        self.n_queries = rank
        self.q_a_proj = Linear(c.hidden_size, rank, bias=c.attention_bias)
        self.q_a_layernorm = RMSNorm(rank, LATENT_NORM_EPS)
        self.q_b_proj = Linear(rank, c.num_attention_heads * c.q_dim, bias=False)

    def queries(self, x: mx.array) -> mx.array:
        """Queries of all heads, `[B * L, H * (nope + rope)]`, from the first projection."""
        # Flat: a product copies a part of one row, which has the whole row's stride.
        return self["q_b_proj"](self["q_a_layernorm"](x.flatten(0, -2)))

    def __call__(
        self,
        x: mx.array,
        mask: Mask,
        cache: LayerCache | None,
        norm: nn.Module | None = None,
        plus: mx.array | None = None,
    ) -> mx.array:
        x = x if norm is None else norm(x)
        B, L, _ = x.shape
        c, R = self._config, self._config.kv_lora_rank
        offset = 0 if cache is None else cache.offset
        sizes = self.n_queries, R, c.qk_rope_head_dim
        q, latent, k_rope = self.project_apart("qkv_a_proj", x, sizes)
        q = self.queries(q).reshape(B, L, c.num_attention_heads, -1)
        q, q_rope = mx.split(q.transpose(0, 2, 1, 3), [c.qk_nope_head_dim], axis=-1)
        q_rope = self._rope(q_rope, offset)  # [B, H, L, rope]
        latent, k_rope = self["kv_a_layernorm"](latent), self._rope(k_rope[:, None], offset)
        kv = mx.concatenate([latent[:, None], k_rope], axis=-1)  # [B, 1, L, latent]
        if cache is not None:
            # Values are part of the keys: the cache gets empty ones.
            kv, _ = cache.update(kv, kv[..., :0])
        if not isinstance(kv, Ragged) and expanding_is_cheaper(c, L, kv.shape[2]):
            out = self._expanded(q, q_rope, dense(kv), mask)
        else:
            out = self._absorbed(q, q_rope, kv, mask)
        return self["o_proj"](out.transpose(0, 2, 1, 3).reshape(B, L, -1), plus=plus)

    def _absorbed(self, q: mx.array, q_rope: mx.array, kv: KV, mask: Mask) -> mx.array:
        q = mx.concatenate([self["embed_q"](q), q_rope], axis=-1)  # [B, H, L, latent]
        out = attend(q, kv, leading(kv, self._config.kv_lora_rank), self._scale, mask)
        return self["unembed_out"](out)

    def _expanded(self, q: mx.array, q_rope: mx.array, kv: mx.array, mask: Mask) -> mx.array:
        latent, k_rope = mx.split(kv, [self._config.kv_lora_rank], axis=-1)
        k = self["embed_q"].back(latent)  # [B, H, S, nope]
        k_rope = mx.broadcast_to(k_rope, (*k.shape[:-1], k_rope.shape[-1]))
        q, k = mx.concatenate([q, q_rope], axis=-1), mx.concatenate([k, k_rope], axis=-1)
        return attend(q, k, self["unembed_out"](latent), self._scale, mask)


class PlainQueryAttention(LatentAttention):
    """Multi-head latent attention whose queries are one projection."""

    fusions: ClassVar = {"qkv_a_proj": ("q_proj", "kv_a_proj_with_mqa")}

    def make_queries(self, config: LatentConfig) -> None:
        self.n_queries = config.num_attention_heads * config.q_dim
        self.q_proj = Linear(config.hidden_size, self.n_queries, bias=False)

    def queries(self, x: mx.array) -> mx.array:
        return x


def latent_attention(config: LatentConfig) -> LatentAttention:
    return (PlainQueryAttention if config.q_lora_rank is None else LatentAttention)(config)


def _scale(config: LatentConfig) -> float:
    """1 / sqrt(query size), times YaRN's `mscale_all_dim` squared."""
    mscale = yarn_mscale(config.rope.factor, config.rope.mscale_all_dim or 0.0)
    return config.q_dim**-0.5 * mscale**2


def expanding_is_cheaper(config: LatentConfig, L: int, S: int) -> bool:
    """Whether keys and values of S tokens for L queries cost fewer products than absorbing.

    Per head, projecting one token out of the latent space, or one query into it and back, costs
    rank * (nope + v); a pair costs nope + rope + v expanded and 2 * rank + rope absorbed.
    """
    rank, nope_and_v = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    move, saved = rank * nope_and_v, 2 * rank - nope_and_v
    return S * move < L * move + L * S * saved
