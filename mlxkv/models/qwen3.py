"""Qwen 3: grouped-query attention with norms on queries and keys, dense or with experts.

Reference: transformers `modeling_qwen3.py`, `modeling_qwen3_moe.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from mlxkv.checkpoint import tensor_names
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.expert_stacks import stack_experts
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.nn.decoder_model import (
    DecoderModel,
    GroupedConfig,
    Layer,
    grouped_fields,
    layer_windows,
)
from mlxkv.nn.grouped_attention import NormedAttention
from mlxkv.nn.softmax_moe import SoftmaxMoE, SoftmaxMoEConfig, sparse_layers

ROPE_THETA = 10000.0
"""The base where a config names none, as transformers documents it."""
WINDOW = 4096
"""The window where `use_sliding_window` is set and the config names none."""
MAX_WINDOW_LAYERS = 28
"""Layers before the first that slides, where a config with a window leaves the key out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(GroupedConfig):
    """The numbers that define a Qwen 3; the names are those of config.json.

    Attributes:
        sparse: which layers have experts.
        moe: those; None without any.
    """

    sparse: tuple[bool, ...]
    moe: SoftmaxMoEConfig | None

    @classmethod
    def read(cls, fields: Fields) -> Self:
        is_moe = fields.any("model_type") == "qwen3_moe"
        head_dim = max(1, fields.int("hidden_size") // fields.int("num_attention_heads"))
        fields = fields.with_defaults({"head_dim": head_dim if is_moe else 128})
        if not fields.bool("use_sliding_window", False):
            fields = fields.with_values({"sliding_window": None})
        elif "sliding_window" not in fields.raw:  # null, in a config, means none
            fields = fields.with_values({"sliding_window": WINDOW})
        shared = grouped_fields(fields)
        if is_moe:
            sparse = sparse_layers(fields)
            window = fields.opt_int("sliding_window")
            shared["windows"] = (window,) * len(sparse)
        else:
            sparse = (False,) * fields.n_layers()
            n_full = fields.count("max_window_layers", MAX_WINDOW_LAYERS)
            slides = fields.has("sliding_window")
            shared["windows"] = layer_windows(fields, lambda i: slides and i >= n_full)
        return cls(
            **shared,
            sparse=sparse,
            moe=SoftmaxMoEConfig.read(fields, normed=False, shares=False) if is_moe else None,
            rope=rope_config(fields, shared["head_dim"], default_theta=ROPE_THETA),
        )


class Model(DecoderModel):
    """A Qwen 3 with its head."""

    def __init__(self, config: Config):
        c = config
        super().__init__(
            c,
            [
                Layer(
                    c,
                    NormedAttention(c, window),
                    SoftmaxMoE(c.hidden_size, c.hidden_act, c.moe) if c.moe and sparse else None,
                )
                for window, sparse in zip(c.windows, c.sparse, strict=True)
            ],
        )


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are mlx-lm's: the experts of a layer become one tensor."""
    kept, skipped = tensor_names.without_rotary(weights)
    return stack_experts(kept), skipped
