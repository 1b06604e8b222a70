"""Llama, and Mistral and Ministral, which are Llama with a sliding window on some or all layers.

Reference: transformers `modeling_llama.py`, `modeling_mistral.py`, `modeling_ministral.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.nn.decoder_model import (
    Attention,
    Backbone,
    DecoderModel,
    GroupedConfig,
    Layer,
    grouped_fields,
    layer_windows,
)
from mlxkv.nn.layers import GatedMLP

MISTRAL_WINDOW = 4096
"""transformers' window where a Mistral config leaves the key out (null means none)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(GroupedConfig):
    """The numbers that define a Llama; the names are those of config.json."""

    mlp_bias: bool

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        stretch = self.rope.factor if self.rope.rope_type == "dynamic" else 1.0
        return int(self.max_position_embeddings * stretch)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Read a config of either style.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        is_llama = raw.get("model_type") == "llama"
        fields = Fields(raw if is_llama else {"sliding_window": MISTRAL_WINDOW, **raw}, source)
        if not fields.has("head_dim"):
            hidden_size, n_heads = fields.int("hidden_size"), fields.int("num_attention_heads")
            if hidden_size % n_heads:
                raise fields.error("num_attention_heads", f"{n_heads} must divide {hidden_size}")
            fields = fields.with_defaults({"head_dim": hidden_size // n_heads})
        # Every layer of a Mistral with a window slides; a plain Llama has none.
        slides = not is_llama and fields.has("sliding_window")
        shared = grouped_fields(fields)
        shared["windows"] = layer_windows(fields, lambda _: slides)
        config = cls(
            **shared,
            mlp_bias=fields.bool("mlp_bias", False),
            # The first Llamas' configs name no base: 10000 is their documented one.
            rope=rope_config(fields, shared["head_dim"], default_theta=10000.0),
            rope_traditional=fields.bool("rope_traditional", False),
        )
        fields.finish()
        return config


class Model(DecoderModel):
    """A Llama with its head."""

    def __init__(self, config: Config):
        c = config
        layers = [
            Layer(
                c,
                Attention(c),
                GatedMLP(c.hidden_size, c.intermediate_size, c.hidden_act, c.mlp_bias),
            )
            for _ in range(c.num_hidden_layers)
        ]
        super().__init__(c, Backbone(c, layers))


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are the same; rotary frequencies are left out."""
    return tensor_names.without_rotary(weights)
