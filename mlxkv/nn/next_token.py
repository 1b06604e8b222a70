"""The layer of a checkpoint that predicts the token after next: drafts are made of it.

For a token and the hidden state that it was chosen from:

    x = layer(W [norm_e(embedding of the token), norm_h(hidden state)])
    logits of what follows the token = head(norm(x))

`layer` is one more layer of the model, behind keys and values of its own, one a pair. norm(x) takes
the place of the hidden state for the token after that. Source: DeepSeek-V3's report
(https://arxiv.org/abs/2412.19437, 2.2), in the order in which GLM-4.5's weights are stored; the
model's hidden states and norm(x) are behind the final norms, as SGLang's `glm4_moe_nextn.py` has
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.kv.layout import LayerCache
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.decoder_model import DecoderConfig, DecoderModel, Layer
from mlxkv.nn.linear import Embedding, Linear
from mlxkv.nn.model import Predictor


class SharedHead(nn.Module):
    """The final norm of a next-token layer, and its head where that is not the model's."""

    def __init__(self, config: DecoderConfig, own_head: bool):
        super().__init__()
        self.norm = config.norm(config.hidden_size, config.rms_norm_eps)
        if own_head:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)


class NextTokenLayer(Layer):
    """A layer with what it needs around it; stored behind the model's layers.

    Args:
        config: of the model; it says what the layer has of its own (`next_token`).
        attention: see `Layer`.
        mlp: see `Layer`.
    """

    def __init__(self, config: DecoderConfig, attention: nn.Module, mlp: nn.Module | None = None):
        super().__init__(config, attention, mlp)
        c, E = config, config.hidden_size
        assert c.next_token is not None
        self.enorm, self.hnorm = c.norm(E, c.rms_norm_eps), c.norm(E, c.rms_norm_eps)
        self.eh_proj = Linear(2 * E, E, bias=False)
        self.shared_head = SharedHead(c, c.next_token.own_head)
        if c.next_token.own_embedding:
            self.embed_tokens = Embedding(c.vocab_size, E)


class NextTokenModel(DecoderModel):
    """A decoder whose checkpoint may hold a next-token layer.

    Args:
        config: its config.
        layers: its own.
        next_layer: the one behind them; None where the checkpoint has none.
    """

    def __init__(self, config: Any, layers: Sequence[nn.Module], next_layer: NextTokenLayer | None):
        super().__init__(config, [*layers, *([] if next_layer is None else [next_layer])])

    def predictor(self) -> Predictor | None:
        return None if self.config.next_token is None else NextTokens(self)


@dataclass(frozen=True, slots=True)
class NextTokens:
    """The `Predictor` of a model with a next-token layer."""

    model: NextTokenModel

    @property
    def spec(self) -> CacheSpec:
        spec = self.model.cache_specs()[0]
        assert spec is not None
        return spec

    def hidden(self, tokens: mx.array, hidden: mx.array, cache: LayerCache | None) -> mx.array:
        layer = self.model.model.layers[-1]
        own = "embed_tokens" in layer
        embedding = layer["embed_tokens"](tokens) if own else self.model.embed(tokens)
        pair = mx.concatenate([layer["enorm"](embedding), layer["hnorm"](hidden)], axis=-1)
        n_new = tokens.shape[1]
        mask = "causal" if cache is None else cache.mask(n_new)
        x = layer(layer["eh_proj"](pair), None if n_new == 1 else mask, cache)
        return layer["shared_head"]["norm"](x)

    def logits(self, hidden: mx.array) -> mx.array:
        head = self.model.model.layers[-1]["shared_head"]
        return head["head"](hidden) if "head" in head else self.model.logits(hidden)
