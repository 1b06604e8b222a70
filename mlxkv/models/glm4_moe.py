"""GLM-4.5, 4.6 and 4.7: grouped-query attention, with norms in some, and mixtures of experts.

Checkpoints may hold a layer that predicts the token after next (`nn.next_token`). Reference:
transformers `modeling_glm4_moe.py`, which leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.expert_stacks import stack_experts
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.nn.decoder_model import (
    GroupedConfig,
    Layer,
    NextToken,
    grouped_fields,
)
from mlxkv.nn.grouped_attention import Attention, NormedAttention
from mlxkv.nn.next_token import NextTokenLayer, NextTokenModel
from mlxkv.nn.sigmoid_moe import CORRECTION_BIAS, MoE, MoEConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(GroupedConfig):
    """The numbers that define a GLM-4.5; the names are those of config.json."""

    out_bias = False

    use_qk_norm: bool
    first_k_dense_replace: int
    moe: MoEConfig

    @classmethod
    def read(cls, fields: Fields) -> Self:
        head_dim = max(1, fields.int("hidden_size") // fields.int("num_attention_heads"))
        # Half of each head turns, where a config does not say what transformers' default is.
        fields = fields.with_defaults({"head_dim": head_dim, "partial_rotary_factor": 0.5})
        shared = grouped_fields(fields)
        return cls(
            **shared,
            use_qk_norm=fields.bool("use_qk_norm", False),
            first_k_dense_replace=fields.count("first_k_dense_replace", 1),
            moe=MoEConfig.read(fields),
            rope=rope_config(fields, shared["head_dim"], default_theta=None),
            next_token=NextToken() if fields.count("num_nextn_predict_layers", 0) else None,
        )


class Model(NextTokenModel):
    """A GLM-4.5 with its head."""

    def __init__(self, config: Config):
        c, attention = config, NormedAttention if config.use_qk_norm else Attention
        layers = [
            Layer(c, attention(c), MoE(c, c.moe) if i >= c.first_k_dense_replace else None)
            for i in range(c.num_hidden_layers)
        ]
        next_layer = None
        if c.next_token is not None:
            next_layer = NextTokenLayer(c, attention(c), MoE(c, c.moe))
        super().__init__(c, layers, next_layer)

    def keeps_dtype(self, name: str) -> bool:
        return name.endswith(CORRECTION_BIAS)


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are mlx-lm's: the experts of a layer become one tensor.

    Returns:
        The weights, and the names left out: rotary frequencies and layers that the config does not
        have.
    """
    n_layers = config.num_hidden_layers + (config.next_token is not None)
    kept, skipped = tensor_names.without_extra_layers(weights, n_layers)
    return stack_experts(kept), skipped
