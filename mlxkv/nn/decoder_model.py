"""The decoder that most families are: embedding, layers of attention and MLP, final norm, head.

A family's file extends the config, chooses or extends the layers, and hands them to `DecoderModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields, text_config
from mlxkv.checkpoint.rope_config import RopeConfig
from mlxkv.kv.layout import Caches, LayerCache, Mask
from mlxkv.kv.types import CacheSpec
from mlxkv.nn.layers import (
    ACTIVATIONS,
    GatedMLP,
    OffsetRMSNorm,
    RMSNorm,
    soft_cap,
)
from mlxkv.nn.linear import Embedding, Linear
from mlxkv.nn.model import (
    CausalLM,
    Embedded,
    Media,
    attention_masks,
    model_windows,
    placed,
)

FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = (FULL, SLIDING)


@dataclass(frozen=True, slots=True)
class NextToken:
    """What a checkpoint's next-token layer (`nn.next_token`) has of its own.

    Args:
        own_embedding: whether its embedding is not the model's.
        own_head: whether its head is not the model's.
    """

    own_embedding: bool = True
    own_head: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The numbers that every decoder has; the names are those of config.json.

    Attributes:
        norm: the kind of all norms.
        scales_embedding: whether embeddings are multiplied by sqrt(hidden_size).
        final_logit_softcapping: the cap on the logits (`soft_cap`); None for none.
        next_token: its next-token layer; None for none.
    """

    norm: ClassVar[type[RMSNorm] | type[OffsetRMSNorm]] = RMSNorm
    scales_embedding: ClassVar[bool] = False

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool
    tie_word_embeddings: bool
    mlp_bias: bool = False
    final_logit_softcapping: float | None = None
    next_token: NextToken | None = None

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Self:
        """Read a config of either style, flat or nested in a multimodal one.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        fields = Fields(text_config(raw), source)
        config = cls.read(fields)
        fields.finish()
        return config

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """The config that these keys describe, with the family's defaults for absent ones."""
        raise NotImplementedError


def decoder_fields(fields: Fields, activation: str = "hidden_act") -> dict[str, Any]:
    """The values of `DecoderConfig`'s fields.

    Args:
        fields: the config, with the family's defaults put in (`Fields.with_defaults`).
        activation: the key that names the activation.

    Raises:
        ConfigError: a key is missing or wrong.
    """
    return {
        "model_type": fields.str("model_type"),
        "vocab_size": fields.int("vocab_size"),
        "hidden_size": fields.int("hidden_size"),
        "intermediate_size": fields.int("intermediate_size"),
        "num_hidden_layers": fields.n_layers(),
        "num_attention_heads": fields.int("num_attention_heads"),
        "max_position_embeddings": fields.int("max_position_embeddings"),
        "rms_norm_eps": fields.float("rms_norm_eps"),
        "hidden_act": fields.str(activation, "silu", among=sorted(ACTIVATIONS)),
        "attention_bias": fields.bool("attention_bias", False),
        "tie_word_embeddings": fields.bool("tie_word_embeddings", False),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedConfig(DecoderConfig):
    """A decoder whose layers all have grouped-query attention with heads of one size.

    Attributes:
        out_bias: whether `attention_bias` holds for the output projection.
        windows: of each layer, None for all tokens.
        rope: of all layers, or of the full ones.
        sliding_rope: of the sliding layers, where they have their own.
        query_pre_attn_scalar: scores are divided by its root; None for `head_dim`.
        attn_logit_softcapping: the cap on the scores; None for none.
    """

    out_bias: ClassVar[bool] = True

    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rope: RopeConfig
    rope_traditional: bool = False
    sliding_rope: RopeConfig | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None

    @property
    def scale(self) -> float:
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    def rope_of(self, window: int | None) -> RopeConfig:
        return self.rope if window is None or self.sliding_rope is None else self.sliding_rope


def grouped_fields(fields: Fields, activation: str = "hidden_act") -> dict[str, Any]:
    """The values of `GroupedConfig`'s fields but for the rotary embeddings, as `decoder_fields`.

    No layer slides unless the family says so (`layer_windows`).
    """
    n_kv_heads = fields.int("num_key_value_heads", fields.int("num_attention_heads"))
    return {
        **decoder_fields(fields, activation),
        "num_key_value_heads": grouping(fields, n_kv_heads),
        "head_dim": fields.int("head_dim"),
        "windows": (None,) * fields.n_layers(),
    }


def grouping(fields: Fields, n_kv_heads: int) -> int:
    """Check that KV heads divide `num_attention_heads`, and return their number.

    Raises:
        ConfigError: they do not.
    """
    n_heads = fields.int("num_attention_heads")
    if n_heads % n_kv_heads:
        raise fields.error("num_key_value_heads", f"{n_kv_heads} must divide {n_heads}")
    return n_kv_heads


def layer_types(fields: Fields, slides: Callable[[int], bool]) -> tuple[str, ...]:
    """`layer_types`, or what `slides` says of each layer where the config has none."""
    n = fields.n_layers()
    return fields.strings("layer_types", n, LAYER_TYPES) or tuple(
        SLIDING if slides(i) else FULL for i in range(n)
    )


def layer_windows(fields: Fields, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types` (or `slides`) and `sliding_window`.

    Raises:
        ConfigError: `layer_types` is wrong, or a layer slides and there is no window.
    """
    types, window = layer_types(fields, slides), fields.opt_int("sliding_window")
    if window is None and SLIDING in types:
        raise fields.missing("sliding_window")
    return tuple(window if kind == SLIDING else None for kind in types)


class TwoNorms(nn.Module):
    """The modules of a layer with a norm before attention and MLP.

    Args:
        attention: a callable of (x, mask, cache), with a norm of x and what is added to the result
            as optional arguments.
        mlp: a callable of x, with the same; None for a `GatedMLP` of the config's sizes.
    """

    def __init__(self, config: DecoderConfig, attention: nn.Module, mlp: nn.Module | None = None):
        super().__init__()
        c, E, eps = config, config.hidden_size, config.rms_norm_eps
        if mlp is None:
            mlp = GatedMLP(E, c.intermediate_size, c.hidden_act, c.mlp_bias)
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm = c.norm(E, eps)
        self.post_attention_layernorm = c.norm(E, eps)


class Layer(TwoNorms):
    """x + attention(norm(x)), and the same with an MLP."""

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        x = self["self_attn"](x, mask, cache, self["input_layernorm"], x)
        return self["mlp"](x, self["post_attention_layernorm"], x)


class FourNorms(TwoNorms):
    """The modules of a layer with a norm before and after both attention and MLP."""

    def __init__(self, config: DecoderConfig, attention: nn.Module, mlp: nn.Module | None = None):
        super().__init__(config, attention, mlp)
        E, eps = config.hidden_size, config.rms_norm_eps
        self.pre_feedforward_layernorm = config.norm(E, eps)
        self.post_feedforward_layernorm = config.norm(E, eps)


class FourNormLayer(FourNorms):
    """x + norm(attention(norm(x))), and the same with the MLP, within float16's range."""

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        r = self["self_attn"](x, mask, cache, self["input_layernorm"])
        x = self["post_attention_layernorm"](r, x)
        r = self["mlp"](x, self["pre_feedforward_layernorm"])
        return self["post_feedforward_layernorm"](r, x)


class Backbone(nn.Module):
    """Embedding, layers and final norm: what the checkpoint calls `model`."""

    def __init__(self, config: DecoderConfig, layers: Sequence[nn.Module]):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = list(layers)
        self.norm = config.norm(config.hidden_size, config.rms_norm_eps)


class DecoderModel(CausalLM):
    """A backbone with its head, which may be the embedding.

    `layers` are callables of (x, mask, cache), unless `forward` is overridden. Those behind the
    ones that `cache_specs` has are not the model's own.
    """

    model: Any

    def __init__(
        self,
        config: DecoderConfig,
        layers: Sequence[nn.Module],
        backbone: Callable[[Any, Sequence[nn.Module]], Backbone] = Backbone,
    ):
        super().__init__()
        self.config = config
        self.model = backbone(config, layers)
        self._embed_scale = config.hidden_size**0.5 if config.scales_embedding else None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._windows = tuple(model_windows(self.cache_specs()))

    def cache_specs(self) -> list[CacheSpec | None]:
        c = self.config
        return [
            CacheSpec(c.num_key_value_heads, c.head_dim, c.head_dim, window) for window in c.windows
        ]

    def embed(self, tokens: mx.array, media: Media = ()) -> mx.array:
        x = self.model.embed_tokens(tokens)
        # A Python number takes the dtype of x: rounded to bfloat16 only when computing in it.
        x = x if self._embed_scale is None else x * self._embed_scale
        return placed(x, media) if media else x

    @property
    def cuts_layers(self) -> bool:
        return type(self).forward is DecoderModel.forward

    def forward(self, inputs: Embedded, caches: Caches, last_only: bool = False) -> mx.array:
        x, _, media = inputs
        runs = self.two_way_runs(media) if media else ()
        # A next-token layer may lie behind the model's own.
        return self.model.norm(self._through(x, caches, range(len(self._windows)), runs))

    def below(self, x: mx.array, caches: Caches, border: int) -> mx.array:
        return self._through(x, caches, range(border))

    def above(self, x: mx.array, caches: Caches, border: int) -> mx.array:
        return self.model.norm(self._through(x, caches, range(border, len(self._windows))))

    def _through(
        self, x: mx.array, caches: Caches, layers: range, runs: Sequence[tuple[int, int]] = ()
    ) -> mx.array:
        windows = self._windows[layers.start : layers.stop]
        own = None if caches is None else [caches[i] for i in layers]
        masks = attention_masks(windows, own, x.shape[1], runs)
        blocks = self.model.layers[layers.start : layers.stop]
        for i, (block, window) in enumerate(zip(blocks, windows, strict=True)):
            x = block(x, masks[window], None if own is None else own[i])
        return x

    def logits(self, hidden: mx.array) -> mx.array:
        tied = self.config.tie_word_embeddings
        logits = self.model.embed_tokens.as_linear(hidden) if tied else self.lm_head(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else soft_cap(logits, cap)
