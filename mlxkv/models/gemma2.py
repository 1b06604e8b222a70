"""Gemma 2: every other layer slides, norms before and after, soft caps on scores and logits.

Reference: transformers `modeling_gemma2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields, refuse_bidirectional
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.nn import decoder_model
from mlxkv.nn.decoder_model import (
    Backbone,
    DecoderModel,
    FourNormLayer,
    GroupedConfig,
    grouped_fields,
    layer_windows,
)
from mlxkv.nn.layers import GatedMLP, OffsetRMSNorm

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

    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None

    @property
    def scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Read a config of either style.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        fields = Fields({**CAPS, **raw}, source).with_defaults(DEFAULTS)
        refuse_bidirectional(fields)
        shared = grouped_fields(fields, "hidden_activation")
        shared["windows"] = layer_windows(fields, lambda i: i % 2 == 0)
        config = cls(
            **shared,
            query_pre_attn_scalar=fields.float("query_pre_attn_scalar", 256.0),
            attn_logit_softcapping=fields.opt_float("attn_logit_softcapping"),
            final_logit_softcapping=fields.opt_float("final_logit_softcapping"),
            rope=rope_config(fields, shared["head_dim"], default_theta=10000.0),
            rope_traditional=fields.bool("rope_traditional", False),
        )
        fields.finish()
        return config


class Attention(decoder_model.Attention):
    """Grouped-query attention with capped scores."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.softcap = config.attn_logit_softcapping


class Model(DecoderModel):
    """A Gemma 2 with its head."""

    def __init__(self, config: Config):
        c = config
        layers = [
            FourNormLayer(
                c,
                Attention(c),
                GatedMLP(c.hidden_size, c.intermediate_size, c.hidden_act),
                OffsetRMSNorm,
            )
            for _ in c.windows
        ]
        super().__init__(
            c,
            Backbone(c, layers, OffsetRMSNorm),
            embed_scale=c.hidden_size**0.5,
            logit_cap=c.final_logit_softcapping,
        )


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are the same; rotary frequencies are left out."""
    return tensor_names.without_rotary(weights)
