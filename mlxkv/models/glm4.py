"""GLM and GLM-4 dense: Llama with half of each head rotated by neighbouring pairs.

GLM-4 adds norms on what attention and MLP give back. Reference: transformers `modeling_glm.py`,
`modeling_glm4.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.kv.layout import LayerCache, Mask
from mlxkv.nn.decoder_model import (
    DecoderModel,
    GroupedConfig,
    Layer,
    grouped_fields,
)
from mlxkv.nn.grouped_attention import Attention
from mlxkv.nn.layers import GatedMLP, RMSNorm, gated
from mlxkv.nn.linear import Linear

DEFAULTS = {"partial_rotary_factor": 0.5, "head_dim": 128, "attention_bias": True}
"""What a config leaves out, as transformers documents it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(GroupedConfig):
    """The numbers that define a GLM; the names are those of config.json."""

    out_bias = False

    @classmethod
    def read(cls, fields: Fields) -> Self:
        fields = fields.with_defaults(DEFAULTS)
        shared = grouped_fields(fields)
        return cls(
            **shared,
            # Early GLM-4 configs name no base: 10000 is the documented one.
            rope=rope_config(fields, shared["head_dim"], default_theta=10000.0),
            rope_traditional=fields.bool("rope_traditional", True),
        )


class MLP(GatedMLP):
    """down(activation(gate) * up), gate and up being one projection in the checkpoint."""

    fusions: ClassVar = {}

    def __init__(self, config: Config):
        nn.Module.__init__(self)
        E, hidden = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(E, 2 * hidden, bias=False)
        self.down_proj = Linear(hidden, E, bias=False)
        self._gated = gated(config.hidden_act)


class PostNormLayer(Layer):
    """x + norm(attention(norm(x))), and the same with an MLP."""

    def __init__(self, config: Config, attention: nn.Module, mlp: nn.Module):
        super().__init__(config, attention, mlp)
        E, eps = config.hidden_size, config.rms_norm_eps
        self.post_self_attn_layernorm = RMSNorm(E, eps)
        self.post_mlp_layernorm = RMSNorm(E, eps)

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        r = self["self_attn"](x, mask, cache, self["input_layernorm"])
        x = x + self["post_self_attn_layernorm"](r)
        r = self["mlp"](x, self["post_attention_layernorm"])
        return x + self["post_mlp_layernorm"](r)


class Model(DecoderModel):
    """A GLM with its head."""

    def __init__(self, config: Config):
        c, kind = config, PostNormLayer if config.model_type == "glm4" else Layer
        layers = [kind(c, Attention(c), MLP(c)) for _ in range(c.num_hidden_layers)]
        super().__init__(c, layers)


remap = tensor_names.without_rotary
"""Hugging Face names -> ours, which are the same."""
