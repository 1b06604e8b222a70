"""Gemma 2: every other layer slides, norms before and after, soft caps on scores and logits.

Reference: transformers `modeling_gemma2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields, RopeConfig, rope_config
from mlxkv.kv.layout import LayerCache, Mask
from mlxkv.models import gemma, llama
from mlxkv.nn.layers import ACTIVATIONS, GatedMLP, OffsetRMSNorm, residual, soft_cap

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Config:
    """The numbers that define a Gemma 2; the names are those of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_activation: str
    attention_bias: bool
    tie_word_embeddings: bool
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    windows: tuple[int | None, ...]
    rope: RopeConfig
    rope_traditional: bool

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Read a config of either style; the defaults are Gemma 2's in transformers.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        fields = Fields(raw, source)
        gemma.refuse_bidirectional(fields)
        n_heads, n_kv_heads = gemma.heads(fields, 8, 4)
        head_dim = fields.int("head_dim", 256)
        context = fields.int("max_position_embeddings", 8192)
        fields = fields.with_default("max_position_embeddings", context)
        config = cls(
            model_type=fields.str("model_type"),
            vocab_size=fields.int("vocab_size", 256000),
            hidden_size=fields.int("hidden_size"),
            intermediate_size=fields.int("intermediate_size"),
            num_hidden_layers=fields.n_layers(),
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=fields.float("rms_norm_eps", 1e-6),
            hidden_activation=fields.str(
                "hidden_activation", "gelu_pytorch_tanh", among=sorted(ACTIVATIONS)
            ),
            attention_bias=fields.bool("attention_bias", False),
            tie_word_embeddings=fields.bool("tie_word_embeddings", True),
            query_pre_attn_scalar=fields.float("query_pre_attn_scalar", 256.0),
            attn_logit_softcapping=_cap(fields, "attn_logit_softcapping", 50.0),
            final_logit_softcapping=_cap(fields, "final_logit_softcapping", 30.0),
            windows=_windows(fields),
            rope=rope_config(fields, head_dim, default_theta=10000.0),
            rope_traditional=fields.bool("rope_traditional", False),
        )
        fields.finish()
        return config


def _cap(fields: Fields, key: str, default: float) -> float | None:
    """A missing cap is the default; one that is null is none."""
    return fields.opt_float(key) if key in fields.raw else default


def _windows(fields: Fields) -> tuple[int | None, ...]:
    n_layers = fields.n_layers()
    types = fields.strings("layer_types", n_layers, LAYER_TYPES) or tuple(
        "full_attention" if i % 2 else "sliding_attention" for i in range(n_layers)
    )
    window = fields.int("sliding_window", 4096)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


class Attention(llama.Attention):
    """Grouped-query attention with capped scores."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping


class Layer(nn.Module):
    """x + norm(attention(norm(x))), and the same with the MLP.

    Args:
        config: Gemma 2's or 3's.
        attention: of (x, mask, cache).
    """

    def __init__(self, config: Any, attention: nn.Module):
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = attention
        self.mlp = GatedMLP(E, config.intermediate_size, config.hidden_activation)
        self.input_layernorm = OffsetRMSNorm(E, eps)
        self.post_attention_layernorm = OffsetRMSNorm(E, eps)
        self.pre_feedforward_layernorm = OffsetRMSNorm(E, eps)
        self.post_feedforward_layernorm = OffsetRMSNorm(E, eps)

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        r = self["self_attn"](self["input_layernorm"](x), mask, cache)
        x = residual(x, self["post_attention_layernorm"](r))
        r = self["mlp"](self["pre_feedforward_layernorm"](x))
        return residual(x, self["post_feedforward_layernorm"](r))


class Model(gemma.Model):
    """A Gemma 2 with its head."""

    def make_layers(self) -> list[nn.Module]:
        return [Layer(self.config, Attention(self.config)) for _ in self.config.windows]

    def logits(self, hidden: mx.array) -> mx.array:
        return soft_cap(super().logits(hidden), self.config.final_logit_softcapping)


remap = llama.remap
"""Hugging Face names -> ours, which are the same."""
