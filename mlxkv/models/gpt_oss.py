"""GPT-OSS: mixtures of experts in MXFP4, attention sinks, every other layer over a short window.

Reference: transformers `modeling_gpt_oss.py`; the layout of the released checkpoints is that of its
`integrations/mxfp4.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields, RopeConfig, rope_config
from mlxkv.errors import WeightsError
from mlxkv.kv.layout import LayerCache
from mlxkv.kv.types import CacheSpec
from mlxkv.models import glm4, llama
from mlxkv.nn.layers import compiled
from mlxkv.nn.linear import Linear
from mlxkv.nn.model import attention_masks
from mlxkv.nn.moe import GatedExperts, weighed

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What a config without positions means, as in the reference; so do the other defaults below."""

ROPE_THETA, WINDOW, HEAD_DIM = 150000.0, 128, 64
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


@dataclass(frozen=True, slots=True)
class Config:
    """The numbers that define a GPT-OSS; the names are those of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float
    swiglu_alpha: float
    swiglu_limit: float
    attention_bias: bool
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    rope: RopeConfig
    rope_traditional: bool = False

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        return self.max_position_embeddings

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> Config:
        """Read a config of either style.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        fields = Fields(raw, source)
        if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
            fields = fields.with_default("rope_parameters", YARN)
        head_dim = fields.int("head_dim", HEAD_DIM)
        n_experts = fields.opt_int("num_experts")
        n_experts = fields.int("num_local_experts", n_experts)
        # Some copies of the released configs hold OpenAI's own name only.
        n_chosen = fields.opt_int("experts_per_token", at_most=n_experts)
        fields.str("hidden_act", "silu", among=("silu",))
        config = cls(
            model_type=fields.str("model_type"),
            vocab_size=fields.int("vocab_size"),
            hidden_size=fields.int("hidden_size"),
            intermediate_size=fields.int("intermediate_size"),
            num_hidden_layers=fields.n_layers(),
            num_attention_heads=fields.int("num_attention_heads"),
            num_key_value_heads=glm4.n_kv_heads(fields),
            head_dim=head_dim,
            num_local_experts=n_experts,
            num_experts_per_tok=fields.int("num_experts_per_tok", n_chosen, at_most=n_experts),
            max_position_embeddings=fields.int("max_position_embeddings"),
            rms_norm_eps=fields.float("rms_norm_eps"),
            swiglu_alpha=fields.float("swiglu_alpha", SWIGLU_ALPHA),
            swiglu_limit=fields.float("swiglu_limit", SWIGLU_LIMIT),
            attention_bias=fields.bool("attention_bias", True),
            tie_word_embeddings=fields.bool("tie_word_embeddings", False),
            windows=_windows(fields),
            rope=rope_config(fields, head_dim, default_theta=ROPE_THETA),
        )
        fields.finish()
        return config


def _windows(fields: Fields) -> tuple[int | None, ...]:
    n_layers, window = fields.n_layers(), fields.opt_int("sliding_window")
    if "sliding_window" not in fields.raw:
        window = WINDOW
    kinds = fields.strings("layer_types", n_layers, llama.LAYER_TYPES)
    if kinds is None:
        kinds = tuple("full_attention" if i % 2 else "sliding_attention" for i in range(n_layers))
    if window is None and "sliding_attention" in kinds:
        raise fields.missing("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class Attention(llama.Attention):
    """Grouped-query attention with a sink for each head: a logit that takes part and says nothing.

    With it a head may attend to nothing at all.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.sinks = mx.zeros((self.n_heads,))


def clamped_swiglu(alpha: float, limit: float):
    """(gate, up) -> (up + 1) * gate * sigmoid(alpha * gate), both held within the limit."""

    def activation(gate: mx.array, up: mx.array) -> mx.array:
        gate, up = mx.minimum(gate, limit), mx.clip(up, -limit, limit)
        return (up + 1) * gate * mx.sigmoid(alpha * gate)

    return compiled(activation)


class MoE(nn.Module):
    """The best experts of each token, weighed by the softmax of their logits alone."""

    def __init__(self, config: Config):
        super().__init__()
        E, self._k = config.hidden_size, config.num_experts_per_tok
        self.router = Linear(E, config.num_local_experts, bias=True)
        self.experts = GatedExperts(
            config.num_local_experts,
            E,
            config.intermediate_size,
            clamped_swiglu(config.swiglu_alpha, config.swiglu_limit),
            bias=True,
        )

    def __call__(self, x: mx.array) -> mx.array:
        logits = self["router"](x)
        experts = mx.argpartition(logits, kth=-self._k, axis=-1)[..., -self._k :]
        chosen = mx.take_along_axis(logits, experts, axis=-1)
        weights = mx.softmax(chosen, axis=-1, precise=True)  # [B, L, k]
        return weighed(self["experts"](x, experts), weights)


class Model(glm4.Model):
    """A GPT-OSS with its head."""

    def make_layers(self) -> list[nn.Module]:
        c = self.config
        return [glm4.Layer(c, Attention(c), MoE(c)) for _ in range(c.num_hidden_layers)]

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


_EXPERTS = re.compile(
    r"^(?P<prefix>.*\.mlp\.experts)\.(?P<part>gate_up_proj|down_proj)(?P<kind>_blocks|_scales|_bias|)$"
)
_SUFFIX = {"_blocks": "weight", "_scales": "scales", "_bias": "bias", "": "weight"}


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are mlx-lm's: gate and up apart, rows before columns.

    MXFP4 stays packed: MLX packs the same bits in the same order, 8 values in a word.

    Returns:
        The weights, and the names left out: rotary frequencies.

    Raises:
        WeightsError: blocks that are none.
    """
    kept, skipped = {}, []
    for name, array in weights.items():
        if name.endswith("rotary_emb.inv_freq"):
            skipped.append(name)
        elif match := _EXPERTS.match(name):
            prefix, part, kind = match.group("prefix", "part", "kind")
            array, suffix = _by_rows(name, array, kind), _SUFFIX[kind]
            if part == "down_proj":
                kept[f"{prefix}.down_proj.{suffix}"] = array
            else:
                # Rows of gate and up take turns.
                kept[f"{prefix}.gate_proj.{suffix}"] = array[:, 0::2]
                kept[f"{prefix}.up_proj.{suffix}"] = array[:, 1::2]
        else:
            kept[name] = array
    return kept, skipped


def _by_rows(name: str, array: mx.array, kind: str) -> mx.array:
    """The experts' array as `[n_experts, rows, ...]`."""
    if kind == "":
        # Dense ones are stored [n_experts, in, out].
        return mx.contiguous(array.swapaxes(-1, -2)) if array.ndim == 3 else array
    if kind != "_blocks":
        return array
    if array.ndim != 4 or array.shape[-1] != 16 or array.dtype != mx.uint8:
        raise WeightsError(
            f"tensor {name} is {array.dtype} {list(array.shape)}; MXFP4 blocks are uint8 of "
            "[experts, rows, groups, 16]"
        )
    return array.view(mx.uint32).flatten(-2)
