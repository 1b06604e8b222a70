"""Gemma 1: a Llama with norms stored as their difference from 1 and a scaled embedding.

Reference: transformers `modeling_gemma.py`. Gemma 2 and 3 build on `Model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields, RopeConfig, rope_config
from mlxkv.kv.layout import LayerCache, Mask
from mlxkv.kv.types import CacheSpec
from mlxkv.models import llama
from mlxkv.nn.layers import ACTIVATIONS, GatedMLP, OffsetRMSNorm, residual
from mlxkv.nn.linear import Embedding, Linear
from mlxkv.nn.model import CausalLM, attention_masks, model_windows


@dataclass(frozen=True, slots=True)
class Config:
    """The numbers that define a Gemma 1; the names are those of config.json."""

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
    hidden_act: str
    attention_bias: bool
    tie_word_embeddings: bool
    rope: RopeConfig
    rope_traditional: bool

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        return self.max_position_embeddings

    @property
    def windows(self) -> tuple[int | None, ...]:
        """No layer slides."""
        return (None,) * self.num_hidden_layers

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Read a config of either style; the defaults are Gemma's in transformers.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        fields = Fields(raw, source)
        refuse_bidirectional(fields)
        n_heads, n_kv_heads = heads(fields, 16, 16)
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
            hidden_act=_activation(fields),
            attention_bias=fields.bool("attention_bias", False),
            tie_word_embeddings=fields.bool("tie_word_embeddings", True),
            rope=rope_config(fields, head_dim, default_theta=10000.0),
            rope_traditional=fields.bool("rope_traditional", False),
        )
        fields.finish()
        return config


def refuse_bidirectional(fields: Fields) -> None:
    """Gemmas that look ahead make embeddings, not text.

    Raises:
        ConfigError: this is one.
    """
    if fields.bool("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "is for embeddings; not supported")


def heads(fields: Fields, n_heads: int, n_kv_heads: int) -> tuple[int, int]:
    """Heads of queries and of keys and values, with the family's defaults.

    Raises:
        ConfigError: query heads cannot be shared out among the others.
    """
    n_heads = fields.int("num_attention_heads", n_heads)
    n_kv_heads = fields.int("num_key_value_heads", n_kv_heads)
    if n_heads % n_kv_heads:
        raise fields.error("num_key_value_heads", f"{n_kv_heads} must divide {n_heads}")
    return n_heads, n_kv_heads


def _activation(fields: Fields) -> str:
    """`gelu`, which the first releases say, was always computed in the tanh form."""
    name = fields.str("hidden_act", "gelu_pytorch_tanh", among=sorted(ACTIVATIONS))
    return "gelu_pytorch_tanh" if name == "gelu" else name


class Layer(nn.Module):
    """x + attention, + MLP, each on a norm of its input."""

    def __init__(self, config: Any):
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = llama.Attention(config)
        self.mlp = GatedMLP(E, config.intermediate_size, config.hidden_act)
        self.input_layernorm = OffsetRMSNorm(E, eps)
        self.post_attention_layernorm = OffsetRMSNorm(E, eps)

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        x = residual(x, self["self_attn"](self["input_layernorm"](x), mask, cache))
        return residual(x, self["mlp"](self["post_attention_layernorm"](x)))


class Backbone(nn.Module):
    """Embedding, layers and final norm: what the checkpoint calls `model`."""

    def __init__(self, config: Any, layers: list[nn.Module]):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = layers
        self.norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)


class Model(CausalLM):
    """A Gemma with its head, which is the embedding unless the config says otherwise."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.model = Backbone(config, self.make_layers())
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._windows = tuple(model_windows(self.cache_specs()))

    def make_layers(self) -> list[nn.Module]:
        """The layers: callables of (x, mask, cache)."""
        return [Layer(self.config) for _ in range(self.config.num_hidden_layers)]

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer."""
        c = self.config
        return [
            CacheSpec(c.num_key_value_heads, c.head_dim, c.head_dim, window) for window in c.windows
        ]

    def hidden(self, tokens: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        masks = attention_masks(self._windows, caches, tokens.shape[1])
        # A Python number takes the dtype of h: rounded to bfloat16 only when computing in it.
        h = self.model.embed_tokens(tokens) * self.config.hidden_size**0.5
        for i, (layer, window) in enumerate(zip(self.model.layers, self._windows, strict=True)):
            h = layer(h, masks[window], None if caches is None else caches[i])
        return self.model.norm(h)

    def logits(self, hidden: mx.array) -> mx.array:
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)


remap = llama.remap
"""Hugging Face names -> ours, which are the same."""
