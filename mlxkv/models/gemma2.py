"""Gemma 2: every other layer slides, norms before and after, soft caps on scores and logits.

Reference: transformers `modeling_gemma2.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields, refuse_bidirectional
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.nn.decoder_model import (
    DecoderModel,
    FourNormLayer,
    GroupedConfig,
    grouped_fields,
    layer_windows,
)
from mlxkv.nn.grouped_attention import Attention
from mlxkv.nn.layers import OffsetRMSNorm

DEFAULTS = {
    "vocab_size": 256000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
"""What a config leaves out, as transformers documents it."""

CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
"""Where a config leaves them out; one that is null is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(GroupedConfig):
    """The numbers that define a Gemma 2; the names are those of config.json."""

    norm = OffsetRMSNorm
    scales_embedding = True

    @classmethod
    def read(cls, fields: Fields) -> Self:
        fields = fields.with_values({**CAPS, **fields.raw}).with_defaults(DEFAULTS)
        refuse_bidirectional(fields)
        shared = grouped_fields(fields, "hidden_activation")
        shared["windows"] = layer_windows(fields, lambda i: i % 2 == 0)
        return cls(
            **shared,
            query_pre_attn_scalar=fields.float("query_pre_attn_scalar", 256.0),
            attn_logit_softcapping=fields.opt_float("attn_logit_softcapping"),
            final_logit_softcapping=fields.opt_float("final_logit_softcapping"),
            rope=rope_config(fields, shared["head_dim"], default_theta=10000.0),
            rope_traditional=fields.bool("rope_traditional", False),
        )


class Model(DecoderModel):
    """A Gemma 2 with its head."""

    def __init__(self, config: Config):
        layers = [FourNormLayer(config, Attention(config)) for _ in config.windows]
        super().__init__(config, layers)


remap = tensor_names.without_rotary
"""Hugging Face names -> ours, which are the same."""
