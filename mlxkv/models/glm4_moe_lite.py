"""GLM-4.7-Flash: GLM-4.5's mixtures on multi-head latent attention (`nn.latent_attention`).

Reference: transformers `modeling_glm4_moe_lite.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.latent_names import latent_names
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.decoder_model import Layer, NextToken
from mlxkv.nn.latent_attention import LatentConfig, latent_attention, latent_fields
from mlxkv.nn.next_token import NextTokenLayer, NextTokenModel
from mlxkv.nn.sigmoid_moe import CORRECTION_BIAS, MoE, MoEConfig, dense_layers


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
    """Names of all layouts -> ours; see `latent_names`."""
    return latent_names(weights, config)
