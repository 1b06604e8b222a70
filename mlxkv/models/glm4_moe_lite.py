"""GLM-4.7-Flash: GLM-4.5's mixtures on multi-head latent attention (`nn.latent_attention`).

Reference: transformers `modeling_glm4_moe_lite.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.expert_stacks import stack_experts
from mlxkv.errors import WeightsError
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.decoder_model import Layer, NextToken
from mlxkv.nn.latent_attention import LatentConfig, latent_attention, latent_fields
from mlxkv.nn.next_token import NextTokenLayer, NextTokenModel
from mlxkv.nn.sigmoid_moe import CORRECTION_BIAS, MoE, MoEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(LatentConfig):
    """The numbers that define a GLM-4.7-Flash; the names are those of config.json."""

    dense_layers: tuple[bool, ...]
    moe: MoEConfig

    @classmethod
    def read(cls, fields: Fields) -> Self:
        return cls(
            **latent_fields(fields),
            dense_layers=dense_layers(fields),
            moe=MoEConfig.read(fields),
            next_token=NextToken() if fields.count("num_nextn_predict_layers", 0) else None,
        )


def dense_layers(fields: Fields) -> tuple[bool, ...]:
    """Which layers have a plain MLP: `mlp_layer_types`, else the first few, one by default."""
    n_layers = fields.n_layers()
    if fields.int("moe_layer_freq", 1) != 1:
        raise fields.error("moe_layer_freq", "must be 1: every layer after the dense ones")
    n_dense = fields.count("first_k_dense_replace", 1)
    types = fields.strings("mlp_layer_types", n_layers, ("dense", "sparse"))
    if types is not None:
        return tuple(kind == "dense" for kind in types)
    return tuple(i < n_dense for i in range(n_layers))


class Model(NextTokenModel):
    """A GLM-4.7-Flash with its head."""

    def __init__(self, config: Config):
        c = config
        layers = [
            Layer(c, latent_attention(c), None if dense else MoE(c, c.moe))
            for dense in c.dense_layers
        ]
        next_layer = None
        if c.next_token is not None:
            next_layer = NextTokenLayer(c, latent_attention(c), MoE(c, c.moe))
        super().__init__(c, layers, next_layer)

    def keeps_dtype(self, name: str) -> bool:
        return name.endswith(CORRECTION_BIAS)

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer: one latent per token, stored once, as keys without values."""
        return [CacheSpec(1, self.config.latent_dim, 0)] * self.config.num_hidden_layers


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are mlx-lm's: experts stacked, `kv_b_proj` in its halves.

    Returns:
        The weights, and the names left out: rotary frequencies and layers that the config does not
        have.

    Raises:
        WeightsError: a `kv_b_proj` of another shape than the config says.
    """
    n_layers = config.num_hidden_layers + (config.next_token is not None)
    kept, skipped = tensor_names.without_extra_layers(weights, n_layers)
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
