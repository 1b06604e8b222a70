"""GLM-4.7-Flash: GLM-4.5's mixtures on multi-head latent attention (MLA).

A token leaves one latent of kv_lora_rank + qk_rope_head_dim values, which is all that the cache
holds: keys and values of every head are products of it. `embed_q` and `unembed_out`, mlx-lm's
names, are the two halves of the checkpoint's `kv_b_proj`: they either bring the queries to the
latent and the answer back (absorbed), or the latents out to keys and values (expanded).

MLA: https://arxiv.org/abs/2405.04434. Reference: transformers `modeling_glm4_moe_lite.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.base import device
from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.expert_stacks import stack_experts
from mlxkv.checkpoint.rope_config import RopeConfig, rope_config
from mlxkv.errors import WeightsError
from mlxkv.kv.layout import LayerCache, Mask
from mlxkv.kv.storage import KV, Ragged, dense, leading
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.attention import attend
from mlxkv.nn.decoder_model import Backbone, DecoderConfig, DecoderModel, Layer, decoder_fields
from mlxkv.nn.layers import Fusing
from mlxkv.nn.linear import DENSE_ROWS, Linear, product_dtype
from mlxkv.nn.rope import RoPE
from mlxkv.nn.sigmoid_moe import CORRECTION_BIAS, MoEConfig, feed_forward, first_dense

LATENT_NORM_EPS = 1e-6
"""Of the norms inside the low-rank projections, whatever `rms_norm_eps` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers that define a GLM-4.7-Flash; the names are those of config.json."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    dense_layers: tuple[bool, ...]
    moe: MoEConfig
    rope: RopeConfig
    rope_interleave: bool

    @property
    def latent_dim(self) -> int:
        """Values that the cache holds of a token."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Read a config of either style.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        fields = Fields(raw, source)
        rope_dim = fields.int("qk_rope_head_dim")
        rope = rope_config(fields, rope_dim, default_theta=None)
        if rope.dims != rope_dim:
            raise fields.error("partial_rotary_factor", "must be 1 beside qk_rope_head_dim")
        config = cls(
            **decoder_fields(fields),
            q_lora_rank=fields.opt_int("q_lora_rank"),
            kv_lora_rank=fields.int("kv_lora_rank"),
            qk_nope_head_dim=fields.int("qk_nope_head_dim"),
            qk_rope_head_dim=rope_dim,
            v_head_dim=fields.int("v_head_dim"),
            dense_layers=_dense_layers(fields),
            moe=MoEConfig.read(fields),
            rope=rope,
            rope_interleave=fields.bool("rope_interleave", True),
        )
        fields.finish()
        return config


def _dense_layers(fields: Fields) -> tuple[bool, ...]:
    """Which layers have a plain MLP: `mlp_layer_types`, else the first few, one by default."""
    n_layers = fields.n_layers()
    if fields.int("moe_layer_freq", 1) != 1:
        raise fields.error("moe_layer_freq", "must be 1: every layer after the dense ones")
    n_dense = first_dense(fields, 1)
    types = fields.strings("mlp_layer_types", n_layers, ("dense", "sparse"))
    if types is not None:
        return tuple(kind == "dense" for kind in types)
    return tuple(i < n_dense for i in range(n_layers))


class HeadLinear(nn.Module):
    """A matrix for each head, to be used in both directions: `[H, out, in]`."""

    def __init__(self, in_dim: int, out_dim: int, n_heads: int):
        super().__init__()
        self.weight = mx.zeros((n_heads, out_dim, in_dim))

    def __call__(self, x: mx.array) -> mx.array:
        """`[B, H or 1, L, in]` -> `[B, H, L, out]`."""
        return x @ self["weight"].swapaxes(-1, -2)

    def back(self, x: mx.array) -> mx.array:
        """`[B, H or 1, L, out]` -> `[B, H, L, in]`: the product with the transposed matrices."""
        return x @ self["weight"]

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> QuantizedHeadLinear:
        return QuantizedHeadLinear(self.weight, group_size or 64, bits or 4, mode)


class QuantizedHeadLinear(nn.Module):
    """`HeadLinear` on packed matrices."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        self.freeze()

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
        # The packed product would copy latents, which are a part of the cache's rows, for each
        # head; of many that is more than the matrices.
        return x.shape[1] == 1 and n_rows >= self["weight"].shape[1]


class Attention(Fusing):
    """Multi-head latent attention with low-rank queries."""

    fusions: ClassVar = {"qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}

    def __init__(self, config: Config):
        super().__init__()
        c, H, E = config, config.num_attention_heads, config.hidden_size
        self._config, self._scale = c, _scale(c)
        self.make_queries(c)
        self.kv_a_proj_with_mqa = Linear(E, c.latent_dim, bias=c.attention_bias)
        self.kv_a_layernorm = nn.RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS)
        self.embed_q = HeadLinear(c.qk_nope_head_dim, c.kv_lora_rank, H)
        self.unembed_out = HeadLinear(c.kv_lora_rank, c.v_head_dim, H)
        self.o_proj = Linear(H * c.v_head_dim, E, bias=c.attention_bias)
        self._rope = RoPE(c.rope, c.rope_interleave)

    def make_queries(self, config: Config) -> None:
        """The modules that give the queries, and `n_queries`, the size of the first projection."""
        c, rank = config, config.q_lora_rank
        assert rank is not None
        q_dim = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        self.n_queries = rank
        self.q_a_proj = Linear(c.hidden_size, rank, bias=c.attention_bias)
        self.q_a_layernorm = nn.RMSNorm(rank, LATENT_NORM_EPS)
        self.q_b_proj = Linear(rank, q_dim, bias=False)

    def queries(self, x: mx.array) -> mx.array:
        """Queries of all heads, `[B * L, H * (nope + rope)]`, from the first projection."""
        # Flat, because a part of one row has the whole row's stride, for which a product copies.
        return self["q_b_proj"](self["q_a_layernorm"](x.flatten(0, -2)))

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
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
            # The values are part of the keys: the cache gets none of their own.
            kv, _ = cache.update(kv, kv[..., :0])
        if not isinstance(kv, Ragged) and expanding_is_cheaper(c, L, kv.shape[2]):
            out = self._expanded(q, q_rope, dense(kv), mask)
        else:
            out = self._absorbed(q, q_rope, kv, mask)
        return self["o_proj"](out.transpose(0, 2, 1, 3).reshape(B, L, -1))

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


class PlainQueryAttention(Attention):
    """Multi-head latent attention whose queries are one projection."""

    fusions: ClassVar = {"qkv_a_proj": ("q_proj", "kv_a_proj_with_mqa")}

    def make_queries(self, config: Config) -> None:
        c = config
        q_dim = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        self.n_queries = q_dim
        self.q_proj = Linear(c.hidden_size, q_dim, bias=False)

    def queries(self, x: mx.array) -> mx.array:
        return x


def _scale(config: Config) -> float:
    """1 / sqrt(query size), times YaRN's `mscale_all_dim` squared."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope
    if rope.mscale_all_dim and rope.factor > 1:
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
    return scale


def expanding_is_cheaper(config: Config, L: int, S: int) -> bool:
    """Whether keys and values of S tokens for L queries cost fewer products than absorbing.

    Per head, bringing one token out of the latent space, or one query into it and back, costs
    rank * (nope + v); a pair costs nope + rope + v expanded and 2 * rank + rope absorbed.
    """
    c = config
    move = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
    saved = 2 * c.kv_lora_rank - c.qk_nope_head_dim - c.v_head_dim
    return S * move < L * move + L * S * saved


class Model(DecoderModel):
    """A GLM-4.7-Flash with its head."""

    def __init__(self, config: Config):
        c, attention = config, PlainQueryAttention if config.q_lora_rank is None else Attention
        layers = [
            Layer(c, attention(c), feed_forward(c, c.moe, dense=dense)) for dense in c.dense_layers
        ]
        super().__init__(c, Backbone(c, layers))

    def keeps_dtype(self, name: str) -> bool:
        return name.endswith(CORRECTION_BIAS)

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer: one latent per token, stored once, as keys without values."""
        return [CacheSpec(1, self.config.latent_dim, 0)] * self.config.num_hidden_layers


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are mlx-lm's: experts stacked, `kv_b_proj` in its halves.

    Returns:
        The weights, and the names left out: rotary frequencies and the layer that predicts the
        token after next.

    Raises:
        WeightsError: a `kv_b_proj` of another shape than the config says.
    """
    kept, skipped = tensor_names.without_extra_layers(weights, config.num_hidden_layers)
    kept = stack_experts(kept)
    for name in [name for name in kept if name.endswith(".self_attn.kv_b_proj.weight")]:
        module = name.removesuffix(".weight")
        kinds = [kind for kind in _KINDS if f"{module}.{kind}" in kept]
        parts = {kind: kept.pop(f"{module}.{kind}") for kind in kinds}
        attention = module.removesuffix("kv_b_proj")
        for part, array in _halves(parts, config, module).items():
            kept[attention + part] = array
    return kept, skipped


_KINDS = ("weight", "scales", "biases")


def _halves(parts: dict[str, mx.array], config: Config, module: str) -> dict[str, mx.array]:
    """`kv_b_proj`, whose rows are each head's keys and then values, as two modules.

    The values' rows stay packed as they are. The keys' part is transposed, which packed groups
    cannot be: it is unpacked, without another rounding.
    """
    H, D = config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim
    for kind, array in parts.items():
        if array.ndim != 2 or array.shape[0] != H * D:
            raise WeightsError(f"{module}.{kind} is {list(array.shape)}; it must have {H * D} rows")
    heads = {kind: array.reshape(H, D, -1) for kind, array in parts.items()}
    keys = {kind: array[:, : config.qk_nope_head_dim] for kind, array in heads.items()}
    values = {kind: array[:, config.qk_nope_head_dim :] for kind, array in heads.items()}
    found = {f"unembed_out.{kind}": mx.contiguous(array) for kind, array in values.items()}
    dense = _unpacked(keys, config.kv_lora_rank, module) if "scales" in keys else keys["weight"]
    return {**found, "embed_q.weight": mx.contiguous(dense.swapaxes(-1, -2))}


def _unpacked(parts: dict[str, mx.array], columns: int, module: str) -> mx.array:
    """The values of packed rows of `columns`; how they are packed follows from the shapes."""
    weight, scales, biases = parts["weight"], parts["scales"], parts.get("biases")
    bits, group_size = weight.shape[-1] * 32 // columns, columns // scales.shape[-1]
    modes = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}
    mode = "affine" if biases is not None else modes.get((bits, group_size))
    if mode is None:
        raise WeightsError(f"{module} is packed in a way that is not known")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, group_size, bits, mode=mode, dtype=mx.float32)
