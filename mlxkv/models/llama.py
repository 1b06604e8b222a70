"""Llama, and Mistral and Ministral, which are Llama with a sliding window on some or all layers.

Reference: transformers `modeling_llama.py`, `modeling_mistral.py`, `modeling_ministral.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields, RopeConfig, rope_config
from mlxkv.kv.layout import LayerCache, Mask, Offset
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.attention import attend
from mlxkv.nn.layers import ACTIVATIONS, Fusing, GatedMLP, merge_heads, split_heads
from mlxkv.nn.linear import Embedding, Linear
from mlxkv.nn.model import CausalLM, attention_masks, model_windows
from mlxkv.nn.rope import RoPE

LAYER_TYPES = ("full_attention", "sliding_attention")
MISTRAL_WINDOW = 4096
"""transformers' window where a Mistral config leaves the key out (null means none)."""


@dataclass(frozen=True, slots=True)
class Config:
    """The numbers that define a Llama; the names are those of config.json."""

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
    mlp_bias: bool
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    rope: RopeConfig
    rope_traditional: bool

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
        fields = Fields(raw, source)
        model_type = fields.str("model_type")
        hidden_size, n_heads = fields.int("hidden_size"), fields.int("num_attention_heads")
        n_kv_heads = fields.int("num_key_value_heads", n_heads)
        if n_heads % n_kv_heads:
            raise fields.error("num_key_value_heads", f"{n_kv_heads} must divide {n_heads}")
        head_dim = fields.opt_int("head_dim")
        if head_dim is None:
            if hidden_size % n_heads:
                raise fields.error("num_attention_heads", f"{n_heads} must divide {hidden_size}")
            head_dim = hidden_size // n_heads
        config = cls(
            model_type=model_type,
            vocab_size=fields.int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.int("intermediate_size"),
            num_hidden_layers=fields.n_layers(),
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.int("max_position_embeddings"),
            rms_norm_eps=fields.float("rms_norm_eps"),
            hidden_act=fields.str("hidden_act", "silu", among=sorted(ACTIVATIONS)),
            attention_bias=fields.bool("attention_bias", False),
            mlp_bias=fields.bool("mlp_bias", False),
            tie_word_embeddings=fields.bool("tie_word_embeddings", False),
            windows=_windows(fields, model_type),
            # The first Llamas' configs name no base: 10000 is their documented one.
            rope=rope_config(fields, head_dim, default_theta=10000.0),
            rope_traditional=fields.bool("rope_traditional", False),
        )
        fields.finish()
        return config


def _windows(fields: Fields, model_type: str) -> tuple[int | None, ...]:
    n_layers = fields.n_layers()
    window = fields.opt_int("sliding_window")
    if model_type != "llama" and "sliding_window" not in fields.raw:
        window = MISTRAL_WINDOW
    layer_types = fields.strings("layer_types", n_layers, LAYER_TYPES)
    if layer_types is None:
        # Every layer of a Mistral with a window slides; a plain Llama has none.
        return (None if model_type == "llama" else window,) * n_layers
    if window is None and "sliding_attention" in layer_types:
        raise fields.missing("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


class Attention(Fusing):
    """Grouped-query attention with rotary positions."""

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: Config):
        super().__init__()
        E, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scale = D, D**-0.5
        self.softcap: float | None = None
        self.q_proj = Linear(E, self.n_heads * D, bias=bias)
        self.k_proj = Linear(E, self.n_kv_heads * D, bias=bias)
        self.v_proj = Linear(E, self.n_kv_heads * D, bias=bias)
        self.o_proj = Linear(self.n_heads * D, E, bias=bias)
        self._rope = RoPE(config.rope, config.rope_traditional, D)

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        q, k, v = self.heads(x, 0 if cache is None else cache.offset)
        if cache is not None:
            k, v = cache.update(k, v)
        out = attend(q, k, v, self.scale, mask, self.get("sinks"), self.softcap)
        return self["o_proj"](merge_heads(out))

    def heads(self, x: mx.array, offset: Offset) -> tuple[mx.array, mx.array, mx.array]:
        """Queries `[B, H, L, D]`, keys and values `[B, Hk, L, D]`."""
        H, Hk = self.n_heads, self.n_kv_heads
        qkv = split_heads(self.project("qkv_proj", x), H + 2 * Hk)
        return self["_rope"].of_qkv(qkv, H, Hk, offset)


class Layer(nn.Module):
    """x + attention, + MLP, each on a norm of its input."""

    def __init__(self, config: Config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias
        )
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        x = x + self["self_attn"](self["input_layernorm"](x), mask, cache)
        return x + self["mlp"](self["post_attention_layernorm"](x))


class Backbone(nn.Module):
    """Embedding, layers and final norm: what the checkpoint calls `model`."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Model(CausalLM):
    """A Llama with its head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._windows = tuple(model_windows(self.cache_specs()))

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer."""
        c = self.config
        return [
            CacheSpec(c.num_key_value_heads, c.head_dim, c.head_dim, window) for window in c.windows
        ]

    def hidden(self, tokens: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        masks = attention_masks(self._windows, caches, tokens.shape[1])
        h = self.model.embed_tokens(tokens)
        for i, (layer, window) in enumerate(zip(self.model.layers, self._windows, strict=True)):
            h = layer(h, masks[window], None if caches is None else caches[i])
        return self.model.norm(h)

    def logits(self, hidden: mx.array) -> mx.array:
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are the same.

    Returns:
        The weights, and the names left out: rotary frequencies, which `rope.py` computes.
    """
    skipped = [name for name in weights if name.endswith("rotary_emb.inv_freq")]
    return {name: array for name, array in weights.items() if name not in set(skipped)}, skipped
