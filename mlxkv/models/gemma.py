"""Gemma 1: a Llama with norms stored as their difference from 1 and a scaled embedding.

Reference: transformers `modeling_gemma.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields, refuse_bidirectional
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.kv.layout import LayerCache, Mask
from mlxkv.nn import decoder_model
from mlxkv.nn.decoder_model import (
    DecoderModel,
    GroupedConfig,
    grouped_fields,
)
from mlxkv.nn.grouped_attention import Attention
from mlxkv.nn.layers import OffsetRMSNorm, residual

DEFAULTS = {
    "vocab_size": 256000,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
"""What a config leaves out, as transformers documents it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(GroupedConfig):
    """The numbers that define a Gemma 1; the names are those of config.json."""

    norm = OffsetRMSNorm
    scales_embedding = True

    @classmethod
    def read(cls, fields: Fields) -> Self:
        fields = fields.with_defaults(DEFAULTS)
        refuse_bidirectional(fields)
        shared = grouped_fields(fields)
        if shared["hidden_act"] == "gelu":
            # The first releases say so, and were always computed in the tanh form.
            shared["hidden_act"] = "gelu_pytorch_tanh"
        return cls(
            **shared,
            rope=rope_config(fields, shared["head_dim"], default_theta=10000.0),
            rope_traditional=fields.bool("rope_traditional", False),
        )


class Layer(decoder_model.Layer):
    """x + attention(norm(x)), and the same with the MLP, within float16's range."""

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        if x.dtype != mx.float16:
            return super().__call__(x, mask, cache)
        x = residual(x, self["self_attn"](x, mask, cache, self["input_layernorm"]))
        return residual(x, self["mlp"](x, self["post_attention_layernorm"]))


class Model(DecoderModel):
    """A Gemma with its head, which is the embedding unless the config says otherwise."""

    def __init__(self, config: Config):
        layers = [Layer(config, Attention(config)) for _ in config.windows]
        super().__init__(config, layers)


remap = tensor_names.without_rotary
"""Hugging Face names -> ours, which are the same."""
