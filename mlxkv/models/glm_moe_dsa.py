"""GLM-5: GLM-4.5's mixtures on latent attention that sees what an indexer chooses.

The layer that predicts the token after next is left out. Reference: transformers
`modeling_glm_moe_dsa.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.latent_names import latent_names
from mlxkv.kv.layout import Caches, LayerCache, Mask
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.decoder_model import DecoderModel, TwoNorms
from mlxkv.nn.latent_attention import LatentConfig, latent_fields
from mlxkv.nn.model import Embedded, attention_masks
from mlxkv.nn.sigmoid_moe import CORRECTION_BIAS, MoE, MoEConfig, dense_layers
from mlxkv.nn.sparse_attention import Chosen, IndexerConfig, SparseAttention, indexer_types

INDEXED = "indexed_attention"
"""Every layer's type, also of those that see what an earlier one chose."""
DEFAULTS = {
    "first_k_dense_replace": 3,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 32,
}
"""What configs leave out, as transformers documents it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(LatentConfig):
    """The numbers that define a GLM-5; the names are those of config.json.

    Attributes:
        has_indexer: which layers have one.
    """

    dense_layers: tuple[bool, ...]
    has_indexer: tuple[bool, ...]
    indexer: IndexerConfig
    moe: MoEConfig

    @classmethod
    def read(cls, fields: Fields) -> Self:
        fields = fields.with_defaults(DEFAULTS)
        if fields.opt_int("q_lora_rank") is None:
            raise fields.missing("q_lora_rank")
        fields.strings("layer_types", fields.n_layers(), (INDEXED,))
        return cls(
            **latent_fields(fields),
            dense_layers=dense_layers(fields),
            has_indexer=indexer_types(fields),
            indexer=IndexerConfig.read(fields),
            moe=MoEConfig.read(fields),
        )


class Layer(TwoNorms):
    """x + attention(norm(x)), and the same with an MLP; with what its queries saw."""

    def __call__(
        self, x: mx.array, mask: Mask, cache: LayerCache | None, chosen: Chosen
    ) -> tuple[mx.array, Chosen]:
        normed = self["input_layernorm"](x)
        r, chosen = self["self_attn"].chosen_of(normed, mask, cache, chosen)
        x = x + r
        return self["mlp"](x, self["post_attention_layernorm"], x), chosen


class Model(DecoderModel):
    """A GLM-5 with its head."""

    def __init__(self, config: Config):
        c = config
        layers = [
            Layer(
                c,
                SparseAttention(c, c.indexer if own else None),
                None if dense else MoE(c, c.moe),
            )
            for dense, own in zip(c.dense_layers, c.has_indexer, strict=True)
        ]
        super().__init__(c, layers)

    def keeps_dtype(self, name: str) -> bool:
        return name.endswith(CORRECTION_BIAS)

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer: a latent per token, and as its values the key of an indexer."""
        c = self.config
        return [
            CacheSpec(1, c.latent_dim, c.indexer.head_dim if own else 0) for own in c.has_indexer
        ]

    def forward(self, inputs: Embedded, caches: Caches, last_only: bool = False) -> mx.array:
        x, chosen = inputs.x, None
        mask = attention_masks(self._windows, caches, x.shape[1])[None]
        for i, layer in enumerate(self.model.layers):
            x, chosen = layer(x, mask, None if caches is None else caches[i], chosen)
        return self.model.norm(x)


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Names of all layouts -> ours; see `latent_names`."""
    return latent_names(weights, config)
