"""Qwen3-Next: gated delta nets, full attention every fourth layer, and mixtures of experts.

Reference: transformers `modeling_qwen3_next.py`, which leaves out the layer that predicts the token
after next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.hybrid_names import hybrid_names
from mlxkv.nn import gated_delta
from mlxkv.nn.hybrid_model import HybridConfig, HybridModel, hybrid_fields
from mlxkv.nn.linear import Linear, with_rows
from mlxkv.nn.softmax_moe import SoftmaxMoEConfig, sparse_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(HybridConfig):
    """The numbers that define a Qwen3-Next; the names are those of config.json."""

    @classmethod
    def read(cls, fields: Fields) -> Self:
        fields, shared = hybrid_fields(fields)
        return cls(
            **shared,
            sparse=sparse_layers(fields),
            moe=SoftmaxMoEConfig.read(fields, normed=True, shares=True),
        )


class GatedDeltaNet(gated_delta.GatedDeltaNet):
    """One whose projections' rows lie in the order of key heads: of each its query, its key, and
    the values and gates of the value heads that it serves."""

    fusions: ClassVar = {"ordered_qkvz": ("in_proj_qkvz",), "ordered_ba": ("in_proj_ba",)}

    def add_projections(self, hidden_size: int) -> None:
        c = self._config
        self.in_proj_qkvz = Linear(hidden_size, c.conv_dim + c.value_dim, bias=False)
        self.in_proj_ba = Linear(hidden_size, 2 * c.num_value_heads, bias=False)

    def prepare(self) -> None:
        for name, order in self._orders().items():
            (part,) = self.fusions[name]
            self._note_places(name, (part,))
            self[name] = with_rows(self[part], order)
            del self[part]

    def project(self, name: str, x: mx.array, norm: nn.Module | None = None) -> mx.array:
        rows = super().project(name, x, norm)
        return rows if name in self else mx.take(rows, self._orders()[name], axis=-1)

    def order_of(self, part: str) -> mx.array | None:
        return next((self._orders()[name] for name, of in self.fusions.items() if part in of), None)

    def _orders(self) -> dict[str, mx.array]:
        c = self._config
        Hk, r = c.num_key_heads, c.num_value_heads // c.num_key_heads
        D, of_values = c.key_head_dim, r * c.value_head_dim
        return {
            "ordered_qkvz": _order(Hk, (D, D, of_values, of_values)),
            "ordered_ba": _order(Hk, (r, r)),
        }


def _order(n_heads: int, sizes: tuple[int, ...]) -> mx.array:
    """The rows that bring `n_heads` groups of parts into the order of the parts."""
    at = mx.arange(n_heads * sum(sizes)).reshape(n_heads, -1)
    bounds = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return mx.concatenate([part.flatten() for part in mx.split(at, bounds, axis=1)])


class Model(HybridModel):
    """A Qwen3-Next with its head."""

    def __init__(self, config: Config):
        super().__init__(config, GatedDeltaNet)


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Names of all layouts -> ours, which are mlx-lm's; see `hybrid_names`.

    Returns:
        The weights, and the names left out: the layer that predicts the token after next where the
        config has none.
    """
    return hybrid_names(weights, config.next_token is not None)
