"""GPT-OSS: mixtures of experts in MXFP4, attention sinks, every other layer over a short window.

Reference: transformers `modeling_gpt_oss.py`; the layout of the released checkpoints is that of its
`integrations/mxfp4.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.errors import WeightsError
from mlxkv.nn import grouped_attention, kernels
from mlxkv.nn.decoder_model import DecoderModel, GroupedConfig, Layer, grouped_fields, layer_windows
from mlxkv.nn.layers import Gate, compiled
from mlxkv.nn.linear import Linear
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

DEFAULTS = {"head_dim": 64, "attention_bias": True}
ROPE_THETA, WINDOW = 150000.0, 128
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(GroupedConfig):
    """The numbers that define a GPT-OSS; the names are those of config.json."""

    num_local_experts: int
    num_experts_per_tok: int
    swiglu_alpha: float
    swiglu_limit: float

    @classmethod
    def read(cls, fields: Fields) -> Self:
        fields = fields.with_values({"sliding_window": WINDOW, **fields.raw})
        fields = fields.with_defaults(DEFAULTS)
        if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
            fields = fields.with_defaults({"rope_parameters": YARN})
        n_experts = fields.opt_int("num_experts")
        n_experts = fields.int("num_local_experts", n_experts)
        # Some copies of the released configs hold OpenAI's own name only.
        n_chosen = fields.opt_int("experts_per_token", at_most=n_experts)
        fields.str("hidden_act", "silu", among=("silu",))
        shared = grouped_fields(fields)
        shared["windows"] = layer_windows(fields, lambda i: i % 2 == 0)
        return cls(
            **shared,
            num_local_experts=n_experts,
            num_experts_per_tok=fields.int("num_experts_per_tok", n_chosen, at_most=n_experts),
            swiglu_alpha=fields.float("swiglu_alpha", SWIGLU_ALPHA),
            swiglu_limit=fields.float("swiglu_limit", SWIGLU_LIMIT),
            rope=rope_config(fields, shared["head_dim"], default_theta=ROPE_THETA),
        )


class Attention(grouped_attention.Attention):
    """Grouped-query attention with a sink for each head: a logit that takes part and says nothing.

    With it a head may attend to nothing at all.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self.sinks = mx.zeros((self.n_heads,))


def clamped_swiglu(alpha: float, limit: float) -> Gate:
    """(gate, up) -> (up + 1) * gate * sigmoid(alpha * gate), both held within the limit."""

    def activation(gate: mx.array, up: mx.array) -> mx.array:
        gate, up = mx.minimum(gate, limit), mx.clip(up, -limit, limit)
        return (up + 1) * gate * mx.sigmoid(alpha * gate)

    return Gate(compiled(activation), kernels.clamped(alpha, limit))


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

    def __call__(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        x = x if norm is None else norm(x)
        logits = self["router"](x)
        experts = mx.argpartition(logits, kth=-self._k, axis=-1)[..., -self._k :]
        chosen = mx.take_along_axis(logits, experts, axis=-1)
        weights = mx.softmax(chosen, axis=-1, precise=True)  # [B, L, k]
        y = weighed(self["experts"](x, experts), weights)
        return y if plus is None else plus + y


class Model(DecoderModel):
    """A GPT-OSS with its head."""

    def __init__(self, config: Config):
        layers = [Layer(config, Attention(config), MoE(config)) for _ in config.windows]
        super().__init__(config, layers)


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
    kept, (weights, skipped) = {}, tensor_names.without_rotary(weights)
    for name, array in weights.items():
        if match := _EXPERTS.match(name):
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
