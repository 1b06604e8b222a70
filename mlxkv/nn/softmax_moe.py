"""Qwen's mixtures of experts: a softmax router, and perhaps an expert that every token shares.

Reference: transformers `modeling_qwen3_moe.py`, `modeling_qwen3_next.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import MAX_LAYERS, Fields
from mlxkv.nn.layers import GatedMLP, compiled, gated
from mlxkv.nn.linear import Linear
from mlxkv.nn.moe import GatedExperts, weighed


@dataclass(frozen=True, slots=True)
class SoftmaxMoEConfig:
    """The numbers of a mixture of experts; the names are those of config.json.

    Attributes:
        shared_expert_intermediate_size: of the expert that every token shares; None for none.
        norm_topk_prob: whether the chosen experts' weights are made to sum to 1.
    """

    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    shared_expert_intermediate_size: int | None = None

    @classmethod
    def read(cls, fields: Fields, *, normed: bool, shares: bool) -> SoftmaxMoEConfig:
        """Read the keys of a config.

        Args:
            fields: the config.
            normed: the family's `norm_topk_prob` where the config names none.
            shares: whether the family has a shared expert.
        """
        # transformers 5 writes another key for Qwen 3.
        n_experts = fields.int("num_experts", fields.opt_int("num_local_experts"))
        shared = fields.int("shared_expert_intermediate_size") if shares else None
        return cls(
            moe_intermediate_size=fields.int("moe_intermediate_size"),
            num_experts=n_experts,
            num_experts_per_tok=fields.int("num_experts_per_tok", at_most=n_experts),
            norm_topk_prob=fields.bool("norm_topk_prob", normed),
            shared_expert_intermediate_size=shared,
        )


def sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """Which layers have experts: each `decoder_sparse_step`th that `mlp_only_layers` leaves.

    Raises:
        ConfigError: a key is wrong.
    """
    every, dense = fields.int("decoder_sparse_step", 1), fields.any("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(
        isinstance(i, int) and 0 <= i < MAX_LAYERS for i in dense
    ):
        raise fields.error("mlp_only_layers", f"must be a list of layers; got {dense!r}")
    return tuple((i + 1) % every == 0 and i not in dense for i in range(fields.n_layers()))


class SoftmaxMoE(nn.Module):
    """The sum of each token's best experts, weighed by the softmax of their logits, plus the shared
    one under its gate."""

    def __init__(self, hidden_size: int, activation: str, config: SoftmaxMoEConfig):
        super().__init__()
        E, n, size = hidden_size, config.num_experts, config.moe_intermediate_size
        self._k, self._normed = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(E, n, bias=False)
        self.switch_mlp = GatedExperts(n, E, size, gated(activation))
        if (shared := config.shared_expert_intermediate_size) is not None:
            self.shared_expert = GatedMLP(E, shared, activation)
            self.shared_expert_gate = Linear(E, 1, bias=False)

    def __call__(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        x = x if norm is None else norm(x)
        experts, weights = self.chosen(self["gate"](x))
        y = weighed(self["switch_mlp"](x, experts), weights.astype(x.dtype))
        if "shared_expert" in self:
            y = _with_shared(y, self["shared_expert_gate"](x), self["shared_expert"](x))
        return y if plus is None else plus + y

    def chosen(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Experts `[B, L, k]` by logits of all, and their weights."""
        experts = mx.argpartition(logits, kth=-self._k, axis=-1)[..., -self._k :]
        best = mx.take_along_axis(logits, experts, axis=-1).astype(mx.float32)
        if self._normed:  # the softmax over all, divided by its sum over these
            return experts, mx.softmax(best, axis=-1)
        total = mx.logsumexp(logits.astype(mx.float32), axis=-1, keepdims=True)
        return experts, mx.exp(best - total)


@compiled
def _with_shared(y: mx.array, gate: mx.array, shared: mx.array) -> mx.array:
    return y + mx.sigmoid(gate) * shared
