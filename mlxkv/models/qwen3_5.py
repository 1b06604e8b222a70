"""Qwen3.5 and 3.6, dense and with experts: gated delta nets, and full attention every fourth layer.

Of a multimodal checkpoint this is the text model. Reference: transformers `modeling_qwen3_5.py`,
`modeling_qwen3_5_moe.py`, which leave out the layer that predicts the token after next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx

from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.hybrid_names import hybrid_names
from mlxkv.nn.hybrid_model import HybridConfig, HybridModel, hybrid_fields
from mlxkv.nn.softmax_moe import SoftmaxMoEConfig

_OF_MEDIA = ("mrope_section", "mrope_interleaved")
"""Keys that say how the positions of pictures rotate; those of text are all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(HybridConfig):
    """The numbers that define a Qwen3.5; the names are those of config.json."""

    @classmethod
    def read(cls, fields: Fields) -> Self:
        fields = fields.with_values(
            {
                key: _of_text(value)
                for key in ("rope_parameters", "rope_scaling")
                if isinstance(value := fields.any(key), Mapping)
            }
        )
        is_moe = fields.any("num_experts") not in (None, 0)
        if is_moe:  # all layers are sparse, and such a config names no dense size
            fields = fields.with_values({"intermediate_size": fields.int("moe_intermediate_size")})
        fields, shared = hybrid_fields(fields)
        return cls(
            **{**shared, "model_type": "qwen3_5_moe" if is_moe else "qwen3_5"},
            sparse=(is_moe,) * shared["num_hidden_layers"],
            moe=SoftmaxMoEConfig.read(fields, normed=True, shares=True) if is_moe else None,
        )


def _of_text(rope: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key not in _OF_MEDIA}


class Model(HybridModel):
    """A Qwen3.5 with its head."""


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Names of all layouts -> ours, which are mlx-lm's; see `hybrid_names`.

    Returns:
        The weights, and the names left out: encoders, and the layer that predicts the token after
        next where the config has none.
    """
    return hybrid_names(weights, config.next_token is not None)
