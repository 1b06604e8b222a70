"""Gemma 4's assistant: a few layers without KV that guess the next tokens for a larger Gemma 4.

For a token and the hidden state that it was chosen from:

    x = layers(pre_projection [embedding of the token, hidden state])
    logits = head(x), next hidden state = post_projection(x)

The embedding is the larger model's. Its last full layer and its last sliding one give the keys and
values; all guesses of a draft stand at one position, that of the first token. E2B's and E4B's heads
score clusters of the vocabulary first, and the tokens of the best ones. Reference: transformers
`modeling_gemma4_assistant.py` and `SinglePositionMultiTokenCandidateGenerator`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.cache import KVCache, RotatingKVCache
from mlxkv.checkpoint.config import Fields
from mlxkv.kv.layout import Cache
from mlxkv.models.gemma4_config import Config as TextConfig
from mlxkv.nn.linear import Linear
from mlxkv.nn.shared_kv import Heads, KeysValues, PerLayerBackbone

MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")


@dataclass(frozen=True, slots=True)
class AssistantConfig:
    """The numbers of an assistant; the names are those of config.json.

    Attributes:
        text: of its layers, all of which read another's KV.
        backbone_hidden_size: E of the model that it is for.
        num_centroids: clusters of its vocabulary; 0 for a plain head.
        centroid_intermediate_top_k: clusters whose tokens are scored.
    """

    text: TextConfig
    backbone_hidden_size: int
    num_centroids: int
    centroid_intermediate_top_k: int

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str) -> AssistantConfig:
        """Read config.json.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        fields = Fields(raw, source)
        inner = fields.nested("text_config").raw
        # Its layers have no KV: whose they read, the larger model says.
        text = TextConfig.from_dict({**inner, "num_kv_shared_layers": 0}, source)
        heads = tuple(dataclasses.replace(h, donor=0, k_is_v=False) for h in text.heads)
        n_centroids = 0
        if fields.bool("use_ordered_embeddings", False):
            n_centroids = fields.int("num_centroids", 2048)
            if text.vocab_size % n_centroids:
                raise fields.error("num_centroids", f"must divide {text.vocab_size} tokens")
        most = n_centroids or None
        return cls(
            dataclasses.replace(text, heads=heads),
            fields.int("backbone_hidden_size", 1536),
            n_centroids,
            fields.int("centroid_intermediate_top_k", 32, **({"at_most": most} if most else {})),
        )

    def fits(self, config: TextConfig) -> bool:
        """Whether it is for a model of this config."""
        theirs = _givers(config.heads)
        shape = [(h.window, h.head_dim, h.n_kv_heads) for h in config.heads]
        return (
            self.backbone_hidden_size == config.hidden_size
            and self.text.vocab_size == config.vocab_size
            and all(
                (h.window is None) in theirs
                and (h.window, h.head_dim, h.n_kv_heads) == shape[theirs[h.window is None]]
                for h in self.text.heads
            )
        )


class ClusteredHead(nn.Module):
    """The clusters of a vocabulary, the tokens of each one beside each other."""

    def __init__(self, config: AssistantConfig):
        super().__init__()
        self._k = config.centroid_intermediate_top_k
        self.centroids = Linear(config.text.hidden_size, config.num_centroids, bias=False)
        self.token_ordering = mx.zeros((config.text.vocab_size,), mx.int64)

    def logits(self, x: mx.array, embedding: nn.Module) -> mx.array:
        """Logits `[B, L, V]` of x `[B, L, E]`; 1 below the least for tokens of other clusters."""
        clusters = self["centroids"](x)
        best = mx.argpartition(clusters, kth=-self._k, axis=-1)[..., -self._k :]
        tokens = self["token_ordering"].reshape(clusters.shape[-1], -1)[best]
        tokens = tokens.reshape(*x.shape[:-1], -1)  # [B, L, k V / C]
        found = (embedding(tokens) @ x[..., None])[..., 0]
        V = self["token_ordering"].size
        others = mx.broadcast_to(found.min() - 1, (*x.shape[:-1], V))
        return mx.put_along_axis(others, tokens.astype(mx.uint32), found, axis=-1)


class Assistant(nn.Module):
    """An assistant, under the names of its checkpoint."""

    def __init__(self, config: AssistantConfig, layers: Sequence[nn.Module]):
        super().__init__()
        self.config = config
        E, wide = config.text.hidden_size, config.backbone_hidden_size
        self.model = PerLayerBackbone(config.text, layers)
        self.pre_projection = Linear(2 * wide, E, bias=False)
        self.post_projection = Linear(E, wide, bias=False)
        if config.num_centroids:
            self.masked_embedding = ClusteredHead(config)
        if not config.text.tie_word_embeddings:
            self.lm_head = Linear(E, config.text.vocab_size, bias=False)

    def __call__(
        self, embedding: mx.array, hidden: mx.array, kv: Sequence[KeysValues], position: int
    ) -> tuple[mx.array, mx.array]:
        """What stands for the next hidden state, `[1, 1, wide]`, and logits `[1, 1, V]`.

        Args:
            embedding: of the token, `[1, 1, wide]`, the larger model's.
            hidden: that it was chosen from, `[1, 1, wide]`.
            kv: for each layer.
            position: of the draft's first token.
        """
        x = self["pre_projection"](mx.concatenate([embedding, hidden], axis=-1))
        for layer, given in zip(self["model"].layers, kv, strict=True):
            x, _ = layer(x, None, position, None, given, None)
        x = self["model"].norm(x)
        return self["post_projection"](x), self._logits(x)

    def _logits(self, x: mx.array) -> mx.array:
        embedding = self["model"].embed_tokens
        if "masked_embedding" in self:
            return self["masked_embedding"].logits(x, embedding)
        return self["lm_head"](x) if "lm_head" in self else embedding.as_linear(x)


@dataclass(frozen=True, slots=True)
class BorrowedKV:
    """Guesses from the keys and values of the model itself: see `CausalLM.reader`."""

    model: Any

    def keys_values(self, caches: Sequence[Cache]) -> list[KeysValues]:
        """What each of the assistant's layers reads of a sequence's caches."""
        givers = _givers(self.model.config.heads)
        read = {is_full: _read(caches[i]) for is_full, i in givers.items()}
        return [read[heads.window is None] for heads in self.model.assistant.config.text.heads]

    def guess(
        self, token: mx.array, hidden: mx.array, kv: Sequence[Any], position: int
    ) -> tuple[mx.array, mx.array]:
        return self.model.assistant(self.model.embed(token), hidden, kv, position)


def _givers(heads: Sequence[Heads]) -> dict[bool, int]:
    """Whether a layer is a full one -> the last of its kind with KV of its own."""
    return {h.window is None: i for i, h in enumerate(heads) if h.donor is None}


def _read(cache: Cache) -> KeysValues:
    """All that a cache holds, of a window no more than that."""
    assert isinstance(cache, KVCache | RotatingKVCache)
    start = cache.first if cache.max_rows is None else max(0, cache.offset - cache.max_rows)
    held = cache.read(max(start, cache.first), cache.offset)
    return cache.decoded(held.arrays, held.stop - held.start)
