"""GLM's mixtures of experts: a sigmoid router, and an expert that every token shares.

The first layers are dense. Reference: transformers `modeling_glm4_moe.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields
from mlxkv.nn.decoder_model import DecoderConfig
from mlxkv.nn.layers import GatedMLP, Prepared, compiled, gated
from mlxkv.nn.moe import GatedExperts, weighed

CORRECTION_BIAS = "e_score_correction_bias"
"""A parameter that stays in float32: two experts may differ by less than a 16-bit step."""


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """The numbers of a mixture of experts; the names are those of config.json."""

    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @classmethod
    def read(cls, fields: Fields) -> MoEConfig:
        """Read the keys of a config of either style.

        Raises:
            ConfigError: a key is missing or wrong, or the router is of another kind.
        """
        fields.str("scoring_func", "sigmoid", among=("sigmoid",))
        fields.str("topk_method", "noaux_tc", among=("noaux_tc",))
        n_experts, n_group = fields.int("n_routed_experts"), fields.int("n_group", 1)
        if n_experts % n_group or n_experts // n_group < 2:
            raise fields.error("n_group", f"{n_group} must divide {n_experts} experts")
        topk_group = fields.int("topk_group", 1, at_most=n_group)
        return cls(
            moe_intermediate_size=fields.int("moe_intermediate_size"),
            n_routed_experts=n_experts,
            n_shared_experts=fields.int("n_shared_experts"),
            num_experts_per_tok=fields.int(
                "num_experts_per_tok", at_most=n_experts // n_group * topk_group
            ),
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=fields.bool("norm_topk_prob", True),
            routed_scaling_factor=fields.float("routed_scaling_factor"),
        )


def dense_layers(fields: Fields) -> tuple[bool, ...]:
    """Which layers have a plain MLP: `mlp_layer_types`, else the first few, one by default."""
    n_layers = fields.n_layers()
    if fields.int("moe_layer_freq", 1) != 1:
        raise fields.error("moe_layer_freq", "must be 1: every layer after the dense ones")
    n_dense = fields.count("first_k_dense_replace", 1)
    types = fields.strings("mlp_layer_types", n_layers, ("dense", "sparse"))
    if types is not None:
        return tuple(kind == "dense" for kind in types)
    return tuple(i < n_dense for i in range(n_layers))


class Router(Prepared):
    """The experts of each token: the largest sigmoid(logit) + correction bias, in float32.

    They are chosen within the groups whose two best have the largest sum, and weighted by the
    sigmoid alone.
    """

    def __init__(self, hidden_size: int, config: MoEConfig):
        super().__init__()
        self._config = config
        self.weight = mx.zeros((config.n_routed_experts, hidden_size))
        self.e_score_correction_bias = mx.zeros((config.n_routed_experts,))

    def prepare(self) -> None:
        self.weight = self.weight.astype(mx.float32)
        self.e_score_correction_bias = self.e_score_correction_bias.astype(mx.float32)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Experts `[B, L, k]` of tokens `[B, L, E]`, and their weights in the tokens' dtype."""
        return self.chosen(x.astype(mx.float32) @ self["weight"].T, x.dtype)

    def chosen(self, logits: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Experts `[B, L, k]` by float32 logits of all, and their weights in a dtype."""
        c, k = self._config, self._config.num_experts_per_tok
        scores, choice = _scores(logits, self[CORRECTION_BIAS])
        if c.n_group > 1:
            choice = self._within_best_groups(choice)
        experts = mx.argpartition(choice, kth=-k, axis=-1)[..., -k:]
        weights = mx.take_along_axis(scores, experts, axis=-1)
        total = weights.sum(axis=-1, keepdims=True) if c.norm_topk_prob else None
        return experts, _shares(dtype, c.routed_scaling_factor)(weights, total)

    def _within_best_groups(self, choice: mx.array) -> mx.array:
        c = self._config
        groups = mx.unflatten(choice, -1, (c.n_group, -1))  # [B, L, groups, experts of one]
        best = mx.topk(groups, 2, axis=-1).sum(axis=-1)
        kept = mx.argpartition(-best, kth=c.topk_group - 1, axis=-1)[..., : c.topk_group]
        hidden = mx.put_along_axis(mx.ones_like(best), kept, mx.array(0.0), axis=-1)
        return mx.where(hidden[..., None] > 0, -mx.inf, groups).flatten(-2)


@compiled
def _scores(logits: mx.array, correction: mx.array) -> tuple[mx.array, mx.array]:
    """The scores that weigh experts, and those that choose them."""
    scores = mx.sigmoid(logits)
    return scores, scores + correction


@functools.cache
def _shares(dtype: mx.Dtype, factor: float) -> Callable[[mx.array, mx.array | None], mx.array]:
    """(scores of the chosen, their sum or None) -> the weights, in `dtype`."""

    @compiled
    def shares(scores: mx.array, total: mx.array | None) -> mx.array:
        if total is not None:
            scores = scores / (total + 1e-20)  # as the reference does, against a division by zero
        return (scores * factor).astype(dtype)

    return shares


class MoE(nn.Module):
    """The weighted sum of each token's experts, plus the shared one."""

    def __init__(self, config: DecoderConfig, moe: MoEConfig):
        super().__init__()
        E, hidden, activation = config.hidden_size, moe.moe_intermediate_size, config.hidden_act
        self.gate = Router(E, moe)
        self.switch_mlp = GatedExperts(moe.n_routed_experts, E, hidden, gated(activation))
        self.shared_experts = GatedMLP(E, hidden * moe.n_shared_experts, activation)

    def __call__(
        self, x: mx.array, norm: nn.Module | None = None, plus: mx.array | None = None
    ) -> mx.array:
        x = x if norm is None else norm(x)
        experts, weights = self["gate"](x)
        y = weighed(self["switch_mlp"](x, experts), weights) + self["shared_experts"](x)
        return y if plus is None else plus + y
