"""Llama, and Mistral and Ministral, which are Llama with a sliding window on some or all layers.

Reference: transformers `modeling_llama.py`, `modeling_mistral.py`, `modeling_ministral.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.nn.decoder_model import (
    DecoderModel,
    GroupedConfig,
    Layer,
    grouped_fields,
    layer_windows,
)
from mlxkv.nn.grouped_attention import Attention

MISTRAL_WINDOW = 4096
"""transformers' window where a Mistral config leaves the key out (null means none)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(GroupedConfig):
    """The numbers that define a Llama; the names are those of config.json."""

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        stretch = self.rope.factor if self.rope.rope_type == "dynamic" else 1.0
        return int(self.max_position_embeddings * stretch)

    @classmethod
    def read(cls, fields: Fields) -> Self:
        is_llama = fields.any("model_type") == "llama"
        if not is_llama:
            fields = fields.with_values({"sliding_window": MISTRAL_WINDOW, **fields.raw})
        if not fields.has("head_dim"):
            hidden_size, n_heads = fields.int("hidden_size"), fields.int("num_attention_heads")
            if hidden_size % n_heads:
                raise fields.error("num_attention_heads", f"{n_heads} must divide {hidden_size}")
            fields = fields.with_defaults({"head_dim": hidden_size // n_heads})
        # Every layer of a Mistral with a window slides; a plain Llama has none.
        slides = not is_llama and fields.has("sliding_window")
        shared = grouped_fields(fields)
        shared["windows"] = layer_windows(fields, lambda _: slides)
        return cls(
            **shared,
            mlp_bias=fields.bool("mlp_bias", False),
            # The first Llamas' configs name no base: 10000 is their documented one.
            rope=rope_config(fields, shared["head_dim"], default_theta=10000.0),
            rope_traditional=fields.bool("rope_traditional", False),
        )


class Model(DecoderModel):
    """A Llama with its head."""

    def __init__(self, config: Config):
        layers = [Layer(config, Attention(config)) for _ in config.windows]
        super().__init__(config, layers)


remap = tensor_names.without_rotary
"""Hugging Face names -> ours, which are the same."""
