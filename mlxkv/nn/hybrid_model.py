"""Decoders of two kinds of layers: gated delta nets, and full attention under a gate.

Shared by Qwen3-Next and Qwen3.5. Reference: transformers `modeling_qwen3_next.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import MTP_LAYERS, Fields
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.kv.layout import LayerCache, Mask, StateCache
from mlxkv.kv.types import CacheSpec
from mlxkv.nn import kernels
from mlxkv.nn.attention import attend
from mlxkv.nn.decoder_model import (
    FULL,
    DecoderModel,
    GroupedConfig,
    NextToken,
    grouped_fields,
)
from mlxkv.nn.gated_delta import IN_FLOAT32, DeltaConfig, GatedDeltaNet
from mlxkv.nn.grouped_attention import NormedAttention
from mlxkv.nn.layers import GatedMLP, compiled, merge_heads
from mlxkv.nn.linear import Linear
from mlxkv.nn.model import Predictor
from mlxkv.nn.softmax_moe import SoftmaxMoE, SoftmaxMoEConfig

LINEAR = "linear_attention"
DEFAULTS = {"partial_rotary_factor": 0.25, "full_attention_interval": 4, "head_dim": 256}
"""What configs leave out, as transformers documents it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridConfig(GroupedConfig):
    """A decoder of which some layers keep a state.

    Attributes:
        linear: which layers are gated delta nets.
        delta: those.
        sparse: which layers have experts.
        moe: those; None without any.
    """

    linear: tuple[bool, ...]
    delta: DeltaConfig
    sparse: tuple[bool, ...]
    moe: SoftmaxMoEConfig | None


def hybrid_fields(fields: Fields) -> tuple[Fields, dict[str, Any]]:
    """The fields with the family's defaults, and the values of `HybridConfig` but for experts.

    Raises:
        ConfigError: a key is missing, wrong or not understood.
    """
    fields = fields.with_defaults(DEFAULTS)
    if not fields.bool("attn_output_gate", True):
        raise fields.error("attn_output_gate", "must be true: attention without a gate is unknown")
    for key in ("hidden_act", "output_gate_type"):  # of the nets' convolutions, and of their gates
        fields.str(key, "silu", among=("silu", "swish"))
    n, every = fields.n_layers(), fields.int("full_attention_interval")
    types = fields.strings("layer_types", n, (FULL, LINEAR))
    linear = [t == LINEAR for t in types] if types else [(i + 1) % every != 0 for i in range(n)]
    shared = grouped_fields(fields)
    return fields, {
        **shared,
        "linear": tuple(linear),
        "delta": DeltaConfig.read(fields),
        "rope": rope_config(fields, shared["head_dim"], default_theta=None),
        "next_token": _next_token(fields),
    }


def _next_token(fields: Fields) -> NextToken | None:
    """Whether the checkpoint has the layer `mtp`: of one layer, on the model's embedding."""
    n, own = fields.count(MTP_LAYERS, 0), fields.bool("mtp_use_dedicated_embeddings", False)
    return NextToken(own_embedding=False, own_head=False) if n and not own else None


class GatedAttention(NormedAttention):
    """Attention whose result is multiplied by sigmoid(gate); each head's gate lies behind its
    query in the rows of `q_proj`."""

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: GroupedConfig):
        super().__init__(config)
        c = config
        rows = 2 * c.num_attention_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, rows, bias=c.attention_bias)

    def __call__(
        self,
        x: mx.array,
        mask: Mask,
        cache: LayerCache | None,
        norm: nn.Module | None = None,
        plus: mx.array | None = None,
    ) -> mx.array:
        """Attention of x, or of norm(x), plus `plus`."""
        B, L, _ = x.shape
        H, Hk = self.n_heads, self.n_kv_heads
        heads = mx.unflatten(self.project("qkv_proj", x, norm), -1, (2 * H + 2 * Hk, -1))
        queries = heads[:, :, : 2 * H].reshape(B, L, H, 2, -1)
        rows = mx.concatenate([queries[:, :, :, 0], heads[:, :, 2 * H :]], axis=2).flatten(2)
        q, k, v = self.turned(rows, 0 if cache is None else cache.offset)
        if cache is not None:
            k, v = cache.update(k, v)
        how = self.scale, mask, None, None
        out = kernels.attended(q, k, v, *how) if self.uses_kernels else None
        if out is None:
            out = merge_heads(attend(q, k, v, *how))
        return self["o_proj"](_gated(out, queries[:, :, :, 1].flatten(2)), plus=plus)


@compiled
def _gated(x: mx.array, gate: mx.array) -> mx.array:
    return x * mx.sigmoid(gate)


class HybridLayer(nn.Module):
    """x + mixer(norm(x)), and the same with an MLP or experts.

    Args:
        config: of the model.
        delta: makes a gated delta net; None for a layer with full attention.
        sparse: whether it has experts, if the model has.
    """

    def __init__(
        self, config: HybridConfig, delta: Callable[..., GatedDeltaNet] | None, sparse: bool
    ):
        super().__init__()
        c, E, eps = config, config.hidden_size, config.rms_norm_eps
        if delta is not None:
            self.linear_attn = delta(E, eps, c.delta)
        else:
            self.self_attn = GatedAttention(c)
        if c.moe is not None and sparse:
            self.mlp = SoftmaxMoE(E, c.hidden_act, c.moe)
        else:
            self.mlp = GatedMLP(E, c.intermediate_size, c.hidden_act)
        self.input_layernorm = c.norm(E, eps)
        self.post_attention_layernorm = c.norm(E, eps)

    def __call__(self, x: mx.array, mask: Mask, cache: Any) -> mx.array:
        norm = self["input_layernorm"]
        if "linear_attn" in self:
            states: StateCache | None = cache
            x = self["linear_attn"](x, states, norm, x)
        else:
            x = self["self_attn"](x, mask, cache, norm, x)
        return self["mlp"](x, self["post_attention_layernorm"], x)


class NextTokenModule(nn.Module):
    """norm(layer(W [norm_e(embedding of a token), norm_h(hidden state it was chosen from)])).

    The layer has full attention, and the model's kind of MLP. As `nn.next_token`, under other
    names. Source: SGLang's `qwen3_next_mtp.py`, as transformers leaves it out.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        c, E = config, config.hidden_size
        self.fc = Linear(2 * E, E, bias=False)
        self.layers = [HybridLayer(c, None, sparse=True)]
        norms = (c.norm(E, c.rms_norm_eps) for _ in range(3))
        self.norm, self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = norms

    def __call__(self, embedding: mx.array, hidden: mx.array, cache: LayerCache | None) -> mx.array:
        """What stands for the hidden states of tokens, of both `[B, L, E]`."""
        x = self["pre_fc_norm_embedding"](embedding)
        x = self["fc"](mx.concatenate([x, self["pre_fc_norm_hidden"](hidden)], axis=-1))
        L = x.shape[1]
        mask: Mask = None if L == 1 else "causal" if cache is None else cache.mask(L)
        return self["norm"](self["layers"][0](x, mask, cache))


class HybridModel(DecoderModel):
    """A decoder of hybrid layers with its head."""

    def __init__(self, config: HybridConfig, delta: Callable[..., GatedDeltaNet] = GatedDeltaNet):
        c = config
        layers = zip(c.linear, c.sparse, strict=True)
        super().__init__(
            c, [HybridLayer(c, delta if linear else None, sparse) for linear, sparse in layers]
        )
        if c.next_token is not None:
            self.mtp = NextTokenModule(c)

    def keeps_dtype(self, name: str) -> bool:
        return name.endswith(IN_FLOAT32)

    def cache_specs(self) -> list[CacheSpec | None]:
        c = self.config
        return [c.delta.spec if linear else _full_spec(c) for linear in c.linear]

    def predictor(self) -> Predictor | None:
        return None if self.config.next_token is None else HybridNextTokens(self)


def _full_spec(config: HybridConfig) -> CacheSpec:
    return CacheSpec(config.num_key_value_heads, config.head_dim, config.head_dim)


@dataclass(frozen=True, slots=True)
class HybridNextTokens:
    """The `Predictor` of a model with the layer `mtp`."""

    model: HybridModel

    @property
    def spec(self) -> CacheSpec:
        return _full_spec(self.model.config)

    def hidden(self, tokens: mx.array, hidden: mx.array, cache: LayerCache | None) -> mx.array:
        return self.model["mtp"](self.model.embed(tokens), hidden, cache)

    def logits(self, hidden: mx.array) -> mx.array:
        return self.model.logits(hidden)
