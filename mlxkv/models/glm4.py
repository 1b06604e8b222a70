"""GLM and GLM-4 dense: Llama with half of each head rotated by neighbouring pairs.

GLM-4 adds norms on what attention and MLP give back. Reference: transformers `modeling_glm.py`,
`modeling_glm4.py`.
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
from mlxkv.nn.layers import ACTIVATIONS, gated, on_halves
from mlxkv.nn.linear import Embedding, Linear
from mlxkv.nn.model import CausalLM, attention_masks, model_windows

PARTIAL_ROTARY_FACTOR = 0.5
"""transformers' share of each head that turns, where a GLM config names none."""


@dataclass(frozen=True, slots=True)
class Config:
    """The numbers that define a GLM; the names are those of config.json."""

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
    def post_norms(self) -> bool:
        """Whether what attention and MLP give back is normed as well."""
        return self.model_type == "glm4"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Read a config of either style.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        fields = Fields(raw, source).with_default("partial_rotary_factor", PARTIAL_ROTARY_FACTOR)
        head_dim = fields.int("head_dim", 128)
        config = cls(
            model_type=fields.str("model_type"),
            vocab_size=fields.int("vocab_size"),
            hidden_size=fields.int("hidden_size"),
            intermediate_size=fields.int("intermediate_size"),
            num_hidden_layers=fields.n_layers(),
            num_attention_heads=fields.int("num_attention_heads"),
            num_key_value_heads=n_kv_heads(fields),
            head_dim=head_dim,
            max_position_embeddings=fields.int("max_position_embeddings"),
            rms_norm_eps=fields.float("rms_norm_eps"),
            hidden_act=fields.str("hidden_act", "silu", among=sorted(ACTIVATIONS)),
            attention_bias=fields.bool("attention_bias", True),
            tie_word_embeddings=fields.bool("tie_word_embeddings", False),
            # Early GLM-4 configs name no base: 10000 is the documented one.
            rope=rope_config(fields, head_dim, default_theta=10000.0),
            rope_traditional=fields.bool("rope_traditional", True),
        )
        fields.finish()
        return config


def n_kv_heads(fields: Fields) -> int:
    """`num_key_value_heads`, which must divide the query heads."""
    n_heads = fields.int("num_attention_heads")
    n = fields.int("num_key_value_heads", n_heads)
    if n_heads % n:
        raise fields.error("num_key_value_heads", f"{n} must divide {n_heads}")
    return n


class Attention(llama.Attention):
    """Llama's, without a bias on the way out."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.o_proj = Linear(self.n_heads * self.head_dim, config.hidden_size, bias=False)


class MLP(nn.Module):
    """down(activation(gate) * up), gate and up being one projection in the checkpoint."""

    def __init__(self, config: Config):
        super().__init__()
        E, hidden = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(E, 2 * hidden, bias=False)
        self.down_proj = Linear(hidden, E, bias=False)
        self._gated = gated(config.hidden_act)

    def __call__(self, x: mx.array) -> mx.array:
        return self["down_proj"](on_halves(self._gated, self["gate_up_proj"](x)))


class Layer(nn.Module):
    """x + attention(norm(x)), and the same with an MLP."""

    def __init__(self, config: Any, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = nn.RMSNorm(E, eps)
        self.post_attention_layernorm = nn.RMSNorm(E, eps)

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        x = x + self["self_attn"](self["input_layernorm"](x), mask, cache)
        return x + self["mlp"](self["post_attention_layernorm"](x))


class PostNormLayer(Layer):
    """x + norm(attention(norm(x))), and the same with an MLP."""

    def __init__(self, config: Config, attention: nn.Module, mlp: nn.Module):
        super().__init__(config, attention, mlp)
        E, eps = config.hidden_size, config.rms_norm_eps
        self.post_self_attn_layernorm = nn.RMSNorm(E, eps)
        self.post_mlp_layernorm = nn.RMSNorm(E, eps)

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        r = self["self_attn"](self["input_layernorm"](x), mask, cache)
        x = x + self["post_self_attn_layernorm"](r)
        r = self["mlp"](self["post_attention_layernorm"](x))
        return x + self["post_mlp_layernorm"](r)


class Backbone(nn.Module):
    """Embedding, layers and final norm: what the checkpoint calls `model`."""

    def __init__(self, config: Any, layers: list[nn.Module]):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = layers
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Model(CausalLM):
    """A GLM with its head; the families built on it bring their own layers."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.model = Backbone(config, self.make_layers())
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._windows = tuple(model_windows(self.cache_specs()))

    def make_layers(self) -> list[nn.Module]:
        """The layers, in order."""
        c = self.config
        kind = PostNormLayer if c.post_norms else Layer
        return [kind(c, Attention(c), MLP(c)) for _ in range(c.num_hidden_layers)]

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer."""
        c = self.config
        spec = CacheSpec(c.num_key_value_heads, c.head_dim, c.head_dim)
        return [spec] * c.num_hidden_layers

    def hidden(self, tokens: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        masks = attention_masks(self._windows, caches, tokens.shape[1])
        h = self.model.embed_tokens(tokens)
        for i, layer in enumerate(self.model.layers):
            h = layer(h, masks[None], None if caches is None else caches[i])
        return self.model.norm(h)

    def logits(self, hidden: mx.array) -> mx.array:
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)


remap = llama.remap
"""Hugging Face names -> ours, which are the same."""
