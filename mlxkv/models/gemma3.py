"""Gemma 3: five sliding layers to each full one, norms before and after, norms on q and k.

The tokens of a picture see each other both ways, in layers of both kinds.

Reference: transformers `modeling_gemma3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import mlx.core as mx

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields, refuse_bidirectional
from mlxkv.checkpoint.rope_config import rope_configs
from mlxkv.models.gemma3_vision import Projector, SiglipTower, siglip_names
from mlxkv.models.gemma_vision_config import SiglipConfig
from mlxkv.nn.decoder_model import (
    DecoderModel,
    FourNormLayer,
    GroupedConfig,
    grouped_fields,
    layer_windows,
)
from mlxkv.nn.encoders import IMAGE
from mlxkv.nn.grouped_attention import NormedAttention
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
    """The numbers that define a Gemma 3; the names are those of config.json.

    Attributes:
        vision: the encoder of pictures; None for text alone.
    """

    norm = OffsetRMSNorm
    scales_embedding = True

    vision: SiglipConfig | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Self:
        config = super(Config, cls).from_dict(raw, source)
        return replace(config, vision=SiglipConfig.read(raw, source))

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
    """A Gemma 3 with its head and, if the config has one, its encoder of pictures."""

    def __init__(self, config: Config):
        c = config
        layers = [FourNormLayer(c, NormedAttention(c, window)) for window in c.windows]
        super().__init__(c, layers)
        if c.vision is not None:
            self.vision_tower = SiglipTower(c.vision)
            self.multi_modal_projector = Projector(c.vision, c.hidden_size)

    @property
    def media_kinds(self) -> frozenset[str]:
        return frozenset((IMAGE,) if "vision_tower" in self else ())

    @property
    def two_way_kinds(self) -> frozenset[str]:
        return self.media_kinds

    def media_rows(self, kind: str, data: Mapping[str, mx.array]) -> mx.array:
        """See `CausalLM`; `data` has `pixels`, `[H, W, 3]`, normalised."""
        pixels = data["pixels"].astype(self.compute_dtype)
        return self.multi_modal_projector(self.vision_tower(pixels))


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours; the names left out are those of an encoder without a config."""
    kept, skipped = tensor_names.language_model(weights, config)
    kept, unused = siglip_names(kept)
    return kept, skipped + unused
