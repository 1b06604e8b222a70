"""GLM-4.5 and 4.6: grouped-query attention, with norms in some, and mixtures of experts.

Checkpoints hold a layer that predicts the token after next, which is left out here. Reference:
transformers `modeling_glm4_moe.py`.
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
    Attention,
    DecoderModel,
    GroupedConfig,
    Layer,
    NormedAttention,
    grouped_fields,
)
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
        )


class Model(DecoderModel):
    """A GLM-4.5 with its head."""

    def __init__(self, config: Config):
        c, attention = config, NormedAttention if config.use_qk_norm else Attention
        layers = [
            Layer(c, attention(c), MoE(c, c.moe) if i >= c.first_k_dense_replace else None)
            for i in range(c.num_hidden_layers)
        ]
        super().__init__(c, layers)

    def keeps_dtype(self, name: str) -> bool:
        return name.endswith(CORRECTION_BIAS)


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are mlx-lm's: the experts of a layer become one tensor.

    Returns:
        The weights, and the names left out: rotary frequencies and the layer that predicts the
        token after next.
    """
    kept, skipped = tensor_names.without_extra_layers(weights, config.num_hidden_layers)
    return stack_experts(kept), skipped
