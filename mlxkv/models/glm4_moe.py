"""GLM-4.5 and 4.6: mixtures of experts behind a sigmoid router, with an expert for every token.

The first layers are dense. Checkpoints hold a layer that predicts the token after next, which is
left out here. Reference: transformers `modeling_glm4_moe.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields, RopeConfig, rope_config
from mlxkv.checkpoint.expert_stacks import stack_experts
from mlxkv.kv.layout import Offset
from mlxkv.models import glm4
from mlxkv.nn.layers import ACTIVATIONS, GatedMLP, NormedHeads, Prepared, compiled, gated
from mlxkv.nn.moe import GatedExperts, weighed

CORRECTION_BIAS = "e_score_correction_bias"


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


@dataclass(frozen=True, slots=True)
class Config:
    """The numbers that define a GLM-4.5; the names are those of config.json."""

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
    hidden_act: str
    attention_bias: bool
    use_qk_norm: bool
    tie_word_embeddings: bool
    first_k_dense_replace: int
    moe: MoEConfig
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
        fields = fields.with_default("partial_rotary_factor", glm4.PARTIAL_ROTARY_FACTOR)
        n_heads = fields.int("num_attention_heads")
        head_dim = fields.int("head_dim", max(1, fields.int("hidden_size") // n_heads))
        config = cls(
            model_type=fields.str("model_type"),
            vocab_size=fields.int("vocab_size"),
            hidden_size=fields.int("hidden_size"),
            intermediate_size=fields.int("intermediate_size"),
            num_hidden_layers=fields.n_layers(),
            num_attention_heads=n_heads,
            num_key_value_heads=glm4.n_kv_heads(fields),
            head_dim=head_dim,
            max_position_embeddings=fields.int("max_position_embeddings"),
            rms_norm_eps=fields.float("rms_norm_eps"),
            hidden_act=fields.str("hidden_act", "silu", among=sorted(ACTIVATIONS)),
            attention_bias=fields.bool("attention_bias", False),
            use_qk_norm=fields.bool("use_qk_norm", False),
            tie_word_embeddings=fields.bool("tie_word_embeddings", False),
            first_k_dense_replace=first_dense(fields, 1),
            moe=MoEConfig.read(fields),
            rope=rope_config(fields, head_dim, default_theta=None),
        )
        fields.finish()
        return config


def first_dense(fields: Fields, default: int) -> int:
    """`first_k_dense_replace`: the layers before the first mixture, which may be none."""
    if fields.any("first_k_dense_replace") == 0:
        return 0
    return fields.int("first_k_dense_replace", default)


class Attention(glm4.Attention, NormedHeads):
    """Grouped-query attention; GLM-4.5 and 4.6 norm each head's queries and keys."""

    def __init__(self, config: Config):
        super().__init__(config)
        if config.use_qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self._eps = config.rms_norm_eps if config.use_qk_norm else None

    def heads(self, x: mx.array, offset: Offset) -> tuple[mx.array, mx.array, mx.array]:
        if self._eps is None:
            return super().heads(x, offset)
        B, L, _ = x.shape
        H, Hk = self.n_heads, self.n_kv_heads
        qkv = self.project("qkv_proj", x).reshape(B, L, H + 2 * Hk, self.head_dim)
        qk, _ = self.normed(qkv, self._eps)
        qk = self._rope(qk.transpose(0, 2, 1, 3), offset)  # [B, H + Hk, L, D]
        return qk[:, :H], qk[:, H:], qkv[:, :, H + Hk :].transpose(0, 2, 1, 3)


class Router(Prepared):
    """Chooses the experts of each token, in float32 as the model was trained.

    The experts are chosen by sigmoid(logit) + correction bias, within the groups whose two best
    add up to most; they are weighed by the sigmoid alone.
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
        c, k = self._config, self._config.num_experts_per_tok
        scores, choice = _scores(x.astype(mx.float32) @ self["weight"].T, self[CORRECTION_BIAS])
        if c.n_group > 1:
            choice = self._within_best_groups(choice)
        experts = mx.argpartition(choice, kth=-k, axis=-1)[..., -k:]
        weights = mx.take_along_axis(scores, experts, axis=-1)
        total = weights.sum(axis=-1, keepdims=True) if c.norm_topk_prob else None
        return experts, _shares(x.dtype, c.routed_scaling_factor)(weights, total)

    def _within_best_groups(self, choice: mx.array) -> mx.array:
        c = self._config
        groups = mx.unflatten(choice, -1, (c.n_group, -1))  # [B, L, groups, experts of one]
        best = mx.topk(groups, 2, axis=-1).sum(axis=-1)
        kept = mx.argpartition(-best, kth=c.topk_group - 1, axis=-1)[..., : c.topk_group]
        hidden = mx.put_along_axis(mx.ones_like(best), kept, mx.array(0.0), axis=-1)
        return mx.where(hidden[..., None] > 0, -mx.inf, groups).flatten(-2)


@compiled
def _scores(logits: mx.array, correction: mx.array) -> tuple[mx.array, mx.array]:
    """What experts are weighed by, and what they are chosen by."""
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
    """The chosen experts of each token, weighed, and the shared one on top."""

    def __init__(self, hidden_size: int, config: MoEConfig, activation: str):
        super().__init__()
        hidden = config.moe_intermediate_size
        self.gate = Router(hidden_size, config)
        self.switch_mlp = GatedExperts(
            config.n_routed_experts, hidden_size, hidden, gated(activation)
        )
        self.shared_experts = GatedMLP(hidden_size, hidden * config.n_shared_experts, activation)

    def __call__(self, x: mx.array) -> mx.array:
        experts, weights = self["gate"](x)
        chosen = weighed(self["switch_mlp"](x, experts), weights)
        return chosen + self["shared_experts"](x)


class Model(glm4.Model):
    """A GLM-4.5 with its head."""

    def make_layers(self) -> list[nn.Module]:
        c = self.config
        return [
            glm4.Layer(c, Attention(c), feed_forward(c, dense=i < c.first_k_dense_replace))
            for i in range(c.num_hidden_layers)
        ]

    def keeps_dtype(self, name: str) -> bool:
        """The correction bias: two experts may differ by less than 16 bits can say."""
        return name.endswith(CORRECTION_BIAS)


def feed_forward(config: Any, *, dense: bool) -> nn.Module:
    """One layer's MLP or mixture."""
    if dense:
        return GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
    return MoE(config.hidden_size, config.moe, config.hidden_act)


_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def without_extra_layers(
    weights: Mapping[str, mx.array], n_layers: int
) -> tuple[dict[str, mx.array], list[str]]:
    """Leaves out rotary frequencies and the layers that predict the token after next."""

    def is_extra(name: str) -> bool:
        layer = _LAYER.match(name)
        return name.endswith("rotary_emb.inv_freq") or (
            layer is not None and int(layer[1]) >= n_layers
        )

    skipped = [name for name in weights if is_extra(name)]
    return {name: array for name, array in weights.items() if not is_extra(name)}, skipped


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours, which are mlx-lm's: the experts of a layer become one tensor.

    Returns:
        The weights, and the names left out: rotary frequencies and the layer that predicts the
        token after next.
    """
    kept, skipped = without_extra_layers(weights, config.num_hidden_layers)
    return stack_experts(kept), skipped
