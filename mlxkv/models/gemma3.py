"""Gemma 3 text: five sliding layers to each full one, norms before and after, norms on q and k.

Reference: transformers `modeling_gemma3.py`. Multimodal checkpoints load as their language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields, RopeConfig, rope_config, text_config
from mlxkv.kv.layout import LayerCache, Mask
from mlxkv.models import gemma, gemma2
from mlxkv.nn.attention import attend
from mlxkv.nn.layers import NormedHeads, OffsetRMSNorm
from mlxkv.nn.linear import Linear
from mlxkv.nn.rope import RoPE

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Config:
    """The numbers that define a Gemma 3; the names are those of config.json."""

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
    final_logit_softcapping: float | None
    windows: tuple[int | None, ...]
    full_rope: RopeConfig
    sliding_rope: RopeConfig

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Read a config of either style, nested or flat.

        Released configs leave out what is the family's default, so the defaults here are those
        that transformers documents for Gemma 3.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        fields = Fields(text_config(raw), source)
        gemma.refuse_bidirectional(fields)
        n_heads, n_kv_heads = gemma.heads(fields, 8, 4)
        head_dim = fields.int("head_dim", 256)
        context = fields.int("max_position_embeddings", 131072)
        fields = fields.with_default("max_position_embeddings", context)
        config = cls(
            model_type="gemma3_text",
            vocab_size=fields.int("vocab_size", 262208),
            hidden_size=fields.int("hidden_size"),
            intermediate_size=fields.int("intermediate_size"),
            num_hidden_layers=fields.n_layers(),
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=fields.float("rms_norm_eps", 1e-6),
            hidden_activation=_activation(fields),
            attention_bias=fields.bool("attention_bias", False),
            tie_word_embeddings=fields.bool("tie_word_embeddings", True),
            query_pre_attn_scalar=fields.float("query_pre_attn_scalar", 256.0),
            final_logit_softcapping=fields.opt_float("final_logit_softcapping"),
            windows=_windows(fields),
            full_rope=rope_config(
                fields, head_dim, default_theta=1_000_000.0, layer_type="full_attention"
            ),
            sliding_rope=rope_config(
                fields,
                head_dim,
                default_theta=10_000.0,
                layer_type="sliding_attention",
                theta_key="rope_local_base_freq",
                scaling_key=None,
            ),
        )
        # Gemma 2's; transformers' Gemma 3 carries it and does not apply it.
        fields.ignore("attn_logit_softcapping")
        fields.finish()
        return config


def _activation(fields: Fields) -> str:
    """`gelu` means the tanh form in every Gemma config."""
    key = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"
    fields.str(key, "gelu_pytorch_tanh", among=("gelu_pytorch_tanh", "gelu"))
    return "gelu_pytorch_tanh"


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """`layer_types` wins over the pattern: transformers writes a pattern of 6 beside any types."""
    n_layers = fields.n_layers()
    pattern = fields.int("sliding_window_pattern", 6)
    types = fields.strings("layer_types", n_layers, LAYER_TYPES) or tuple(
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(n_layers)
    )
    window = fields.int("sliding_window", 4096)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


class Attention(NormedHeads):
    """Grouped-query attention with norms on queries and keys."""

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: Config, window: int | None):
        super().__init__()
        E, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scale = D, config.query_pre_attn_scalar**-0.5
        self._eps = config.rms_norm_eps
        self.q_proj = Linear(E, self.n_heads * D, bias=bias)
        self.k_proj = Linear(E, self.n_kv_heads * D, bias=bias)
        self.v_proj = Linear(E, self.n_kv_heads * D, bias=bias)
        self.o_proj = Linear(self.n_heads * D, E, bias=bias)
        self.q_norm = OffsetRMSNorm(D, self._eps)
        self.k_norm = OffsetRMSNorm(D, self._eps)
        self._rope = RoPE(config.full_rope if window is None else config.sliding_rope)

    def __call__(self, x: mx.array, mask: Mask, cache: LayerCache | None) -> mx.array:
        B, L, _ = x.shape
        H, Hk = self.n_heads, self.n_kv_heads
        qkv = self.project("qkv_proj", x).reshape(B, L, H + 2 * Hk, self.head_dim)
        qk, _ = self.normed(qkv, self._eps)
        qk = self["_rope"](qk.transpose(0, 2, 1, 3), 0 if cache is None else cache.offset)
        q, k = mx.split(qk, (H,), axis=1)  # [B, H, L, D], [B, Hk, L, D]
        v = qkv[:, :, H + Hk :].transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = cache.update(k, v)
        out = attend(q, k, v, self.scale, mask)
        return self["o_proj"](out.transpose(0, 2, 1, 3).reshape(B, L, -1))


class Model(gemma2.Model):
    """A Gemma 3 with its head."""

    def make_layers(self) -> list[nn.Module]:
        c = self.config
        return [gemma2.Layer(c, Attention(c, window)) for window in c.windows]


_SKIPPED = re.compile(r"(^|\.)(vision_tower|multi_modal_projector|vision_model)\.|inv_freq$")


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours: the language model's prefix is taken off.

    Returns:
        The weights, and the names left out: the vision tower and rotary frequencies.
    """
    kept: dict[str, mx.array] = {}
    skipped: list[str] = []
    for name, array in weights.items():
        if _SKIPPED.search(name):
            skipped.append(name)
        elif name.startswith("model.language_model."):
            kept["model." + name.removeprefix("model.language_model.")] = array
        else:
            kept[name.removeprefix("language_model.")] = array
    return kept, skipped
