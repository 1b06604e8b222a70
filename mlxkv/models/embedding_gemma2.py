"""EmbeddingGemma 2, its language model: a Gemma 4 whose tokens see each other both ways.

Each layer takes an input of its own, made of the embedding; a projection to the vector's size ends
the model. Its encoders of pictures and sound are left out.

Reference: transformers `modeling_embedding_gemma2.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.sentence import Sentence
from mlxkv.nn.decoder_model import (
    FULL,
    SLIDING,
    DecoderConfig,
    FourNorms,
    decoder_fields,
    grouping,
    layer_types,
)
from mlxkv.nn.embedder import Embedder, Texts, attend_texts, settled
from mlxkv.nn.layers import RMSNorm, gated
from mlxkv.nn.linear import Embedding, Linear
from mlxkv.nn.shared_kv import Heads, OwnAttention, rope_of_kind, sizes_by_layer

DEFAULTS = {
    "model_type": "embedding_gemma2_text",
    "vocab_size": 262144,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 512,
    "embedding_dim": 768,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
}
"""What a config leaves out, as transformers documents it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers that define an EmbeddingGemma 2; the names are those of config.json.

    Attributes:
        heads: the attention of each layer; its window is the radius, which a token sees on both
            sides.
        hidden_size_per_layer_input: size of the input of each layer's own.
        embedding_dim: values of a vector.
        sentence: what follows the hidden states; the loader sets it.
    """

    scales_embedding: ClassVar[bool] = True

    heads: tuple[Heads, ...]
    hidden_size_per_layer_input: int
    embedding_dim: int
    sentence: Sentence = field(default_factory=Sentence)

    @classmethod
    def read(cls, fields: Fields) -> Self:
        fields = fields.with_defaults(DEFAULTS)
        shared = decoder_fields(fields, "hidden_activation")
        shared["tie_word_embeddings"] = True
        pattern = fields.int("sliding_window_pattern", 6)
        types = (*layer_types(fields, lambda i: (i + 1) % pattern != 0)[:-1], FULL)
        # The reference's mask holds |i - j| <= window.
        radius = fields.int("sliding_window")
        heads = tuple(
            Heads(
                window=radius if kind == SLIDING else None,
                head_dim=head_dim,
                n_kv_heads=grouping(fields, n_kv_heads),
                donor=None,
                k_is_v=False,
                rope=rope_of_kind(fields, kind, head_dim),
            )
            for kind, (head_dim, n_kv_heads) in zip(types, _head_sizes(fields, types), strict=True)
        )
        return cls(
            **shared,
            heads=heads,
            hidden_size_per_layer_input=fields.int("hidden_size_per_layer_input"),
            embedding_dim=fields.int("embedding_dim"),
        )


def _head_sizes(fields: Fields, types: Sequence[str]) -> list[tuple[int, int]]:
    """(head_dim, KV heads) of each layer."""
    plain = fields.int("head_dim"), fields.int("num_key_value_heads")
    if fields.has("per_layer_config"):
        return sizes_by_layer(fields, [plain] * len(types))
    full = fields.int("global_head_dim", 512), fields.int("num_global_key_value_heads", 1)
    return [full if kind == FULL else plain for kind in types]


class Attention(OwnAttention):
    """Grouped-query attention of each text to itself, both ways; norms replace the scale."""

    def __init__(self, config: Config, heads: Heads):
        super().__init__(config, heads)
        self._radius = heads.window

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] of texts, without a cache
        self, x: mx.array, texts: Texts, norm: nn.Module
    ) -> mx.array:
        """Attention of norm(x), `[1, T, E]`."""
        qkv = self.project("qkv_proj", x, norm)
        return self["o_proj"](attend_texts(self, qkv, texts, 1.0, self._radius))


class OwnInput(nn.Module):
    """norm(projection(activation(gate(x)) * own)): what a layer's own input adds."""

    def __init__(self, config: Config):
        super().__init__()
        E, P = config.hidden_size, config.hidden_size_per_layer_input
        self.per_layer_input_gate = Linear(E, P, bias=False)
        self.per_layer_projection = Linear(P, E, bias=False)
        self.post_per_layer_input_norm = RMSNorm(E, config.rms_norm_eps)
        self._gated = gated(config.hidden_act)

    def __call__(self, x: mx.array, own: mx.array) -> mx.array:
        """x `[1, T, E]` and the addition; `own` is `[1, T, P]`."""
        r = self["per_layer_projection"](self._gated(self["per_layer_input_gate"](x), own))
        return self["post_per_layer_input_norm"](r, x)


class Layer(FourNorms):
    """Attention and MLP between norms, then the layer's own input, all of it times a scalar."""

    def __init__(self, config: Config, heads: Heads):
        super().__init__(config, Attention(config, heads))
        self.ple_block = OwnInput(config)
        self.layer_scalar = mx.ones((1,))

    def __call__(self, x: mx.array, texts: Texts, own: mx.array) -> mx.array:
        r = self["self_attn"](x, texts, self["input_layernorm"])
        x = self["post_attention_layernorm"](r, x)
        r = self["mlp"](x, self["pre_feedforward_layernorm"])
        x = self["post_feedforward_layernorm"](r, x)
        return self["ple_block"](x, own) * self["layer_scalar"]


class LayerInputs(nn.Module):
    """The embedding projected to an input for each layer, `[1, T, N, P]`."""

    def __init__(self, config: Config):
        super().__init__()
        E, P = config.hidden_size, config.hidden_size_per_layer_input
        self._size = P
        self.per_layer_model_projection = Linear(E, config.num_hidden_layers * P, bias=False)
        self.per_layer_projection_norm = RMSNorm(P, config.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        rows = self["per_layer_model_projection"](x) * x.shape[-1] ** -0.5
        return self["per_layer_projection_norm"](rows.reshape(*x.shape[:-1], -1, self._size))


class Model(Embedder):
    """The language model of an EmbeddingGemma 2, with the checkpoint's names."""

    def __init__(self, config: Config):
        super().__init__(config)
        E = config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, E)
        self.ple = LayerInputs(config)
        self.layers = [Layer(config, heads) for heads in config.heads]
        self.norm = RMSNorm(E, config.rms_norm_eps)
        self.embedding_projection = Linear(E, config.embedding_dim, bias=False)

    @property
    def n_dimensions(self) -> int:
        return self.config.sentence.size(self.config.embedding_dim)

    @property
    def radius(self) -> int | None:
        return next((h.window for h in self.config.heads if h.window is not None), None)

    def through_layers(self, tokens: mx.array, texts: Texts) -> mx.array:
        x = self.embed_tokens(tokens) * self.config.hidden_size**0.5
        inputs = self.ple(x)
        for i, layer in enumerate(self.layers):
            x = settled(layer(x, texts, inputs[:, :, i]))
        return self.embedding_projection(self.norm(x))


def remap(weights: Mapping[str, mx.array], config: Any) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours: those of the language model alone."""
    del config
    kept, skipped = tensor_names.language_model(weights)
    return {name.removeprefix("model."): x for name, x in kept.items()}, skipped
