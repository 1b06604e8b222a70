"""EmbeddingGemma: a Gemma 3 whose tokens see each other both ways, and the mean of what it makes.

References: transformers `modeling_gemma3.py` with `use_bidirectional_attention`, and
sentence-transformers for what follows (`checkpoint.sentence`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.sentence import Sentence
from mlxkv.models import gemma3
from mlxkv.nn.decoder_model import (
    FourNormLayer,
)
from mlxkv.nn.embedder import Embedder, Texts, attend_texts, settled
from mlxkv.nn.grouped_attention import NormedAttention
from mlxkv.nn.linear import Embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(gemma3.Config):
    """The numbers that define an EmbeddingGemma.

    Attributes:
        windows: radius of each layer, None for all tokens: how far a token sees on both sides.
        sentence: what follows the hidden states; the loader sets it.
    """

    sentence: Sentence = field(default_factory=Sentence)

    @classmethod
    def read(cls, fields: Fields) -> Self:
        if fields.any("use_bidirectional_attention") is not True:
            raise fields.error("use_bidirectional_attention", "must be true for embeddings")
        window = fields.int("sliding_window", gemma3.DEFAULTS["sliding_window"])
        # 512 means |i - j| < 257. transformers before 5 wrote the 257, and then halved it again;
        # later ones write an even number.
        radius = (window if window % 2 else window // 2 + 1) - 1
        config = super(Config, cls).read(fields.with_values({"use_bidirectional_attention": False}))
        return replace(config, windows=tuple(w and radius for w in config.windows))


class Attention(NormedAttention):
    """Grouped-query attention of each text to itself, both ways."""

    def __init__(self, config: Config, radius: int | None):
        super().__init__(config, radius)
        self._radius = radius

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] of texts, without a cache
        self,
        x: mx.array,
        mask: Texts,
        cache: None = None,
        norm: nn.Module | None = None,
        plus: mx.array | None = None,
    ) -> mx.array:
        """Attention of x `[1, T, E]`, or of norm(x), plus `plus`."""
        qkv = self.project("qkv_proj", x, norm)
        return self["o_proj"](attend_texts(self, qkv, mask, self.scale, self._radius), plus=plus)


class Model(Embedder):
    """An EmbeddingGemma, with the checkpoint's names."""

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = [FourNormLayer(c, Attention(c, radius)) for radius in c.windows]
        self.norm = c.norm(c.hidden_size, c.rms_norm_eps)

    @property
    def radius(self) -> int | None:
        return next((w for w in self.config.windows if w is not None), None)

    def through_layers(self, tokens: mx.array, texts: Texts) -> mx.array:
        x = self.embed_tokens(tokens) * self.config.hidden_size**0.5
        for layer in self.layers:
            x = settled(layer(x, texts, None))  # pyright: ignore[reportArgumentType] `Attention`
        return self.norm(x)


def remap(weights: Mapping[str, mx.array], config: Any) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours: without `model.`, and without a head."""
    del config
    kept, skipped = tensor_names.language_model(weights)
    heads = [name for name in kept if name.startswith("lm_head.")]
    return (
        {name.removeprefix("model."): x for name, x in kept.items() if name not in heads},
        skipped + heads,
    )
