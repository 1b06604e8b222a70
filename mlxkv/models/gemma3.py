"""Gemma 3 text: five sliding layers to each full one, norms before and after, norms on q and k.

Reference: transformers `modeling_gemma3.py`. Multimodal checkpoints load as their language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields, refuse_bidirectional
from mlxkv.checkpoint.rope_config import rope_configs
from mlxkv.nn.decoder_model import (
    DecoderModel,
    FourNormLayer,
    GroupedConfig,
    NormedAttention,
    grouped_fields,
    layer_windows,
)
from mlxkv.nn.layers import OffsetRMSNorm

DEFAULTS = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
"""What released configs leave out, as transformers documents it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(GroupedConfig):
    """The numbers that define a Gemma 3; the names are those of config.json."""

    norm = OffsetRMSNorm
    scales_embedding = True

    @classmethod
    def read(cls, fields: Fields) -> Self:
        fields = fields.with_defaults(DEFAULTS)
        refuse_bidirectional(fields)
        # Every Gemma config means the tanh form, also where it says `gelu`.
        activation = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"
        fields.str(activation, "gelu", among=("gelu_pytorch_tanh", "gelu"))
        pattern = fields.int("sliding_window_pattern", 6)
        shared = grouped_fields(fields, activation)
        shared["model_type"], shared["hidden_act"] = "gemma3_text", "gelu_pytorch_tanh"
        # `layer_types` wins: transformers writes a pattern of 6 beside any types.
        shared["windows"] = layer_windows(fields, lambda i: (i + 1) % pattern != 0)
        # Gemma 2's; transformers' Gemma 3 carries it and does not apply it.
        fields.ignore("attn_logit_softcapping")
        return cls(
            **shared,
            query_pre_attn_scalar=fields.float("query_pre_attn_scalar", 256.0),
            final_logit_softcapping=fields.opt_float("final_logit_softcapping"),
            **rope_configs(fields, shared["head_dim"]),
        )


class Model(DecoderModel):
    """A Gemma 3 with its head."""

    def __init__(self, config: Config):
        c = config
        layers = [FourNormLayer(c, NormedAttention(c, window)) for window in c.windows]
        super().__init__(c, layers)


remap = tensor_names.language_model
"""Hugging Face names -> ours: the language model's, without the vision tower."""
