"""Gemma 4 text: dense (12B, 31B), mixture of experts (26B-A4B), per-layer embeddings (E2B, E4B).

Sliding layers and full ones have their own head sizes and KV heads; a full layer may use its keys
as values; the last layers may read the KV of the last layer of their kind that has its own.

Reference: transformers `modeling_gemma4.py` and `modeling_gemma4_unified.py`. Multimodal
checkpoints load as their language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.kv.layout import LayerCache, Mask, Offset
from mlxkv.kv.storage import KV
from mlxkv.kv.types import CacheSpec
from mlxkv.models.gemma4_config import Config, Heads
from mlxkv.nn.attention import attend
from mlxkv.nn.layers import Fusing, GatedMLP, NormedHeads, Prepared, compiled, gated, soft_cap
from mlxkv.nn.linear import Embedding, Linear
from mlxkv.nn.model import CausalLM, attention_masks, model_windows
from mlxkv.nn.moe import GatedExperts, weighed
from mlxkv.nn.rope import RoPE

__all__ = ["Config", "Model", "remap"]

KeysValues = tuple[KV, KV]
"""Keys `[B, Hk, S, D]` and values that a layer used, for the layers that share them."""


class SharedAttention(Fusing):
    """Queries of this layer on the keys and values of an earlier one."""

    def __init__(self, config: Config, heads: Heads):
        super().__init__()
        E, D, H = config.hidden_size, heads.head_dim, config.num_attention_heads
        self.n_heads, self.n_kv_heads, self.head_dim = H, heads.n_kv_heads, D
        self.q_proj = Linear(E, H * D, bias=config.attention_bias)
        self.o_proj = Linear(H * D, E, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(D, config.rms_norm_eps)
        self._rope = RoPE(heads.rope)

    def __call__(
        self,
        x: mx.array,
        mask: Mask,
        offset: Offset,
        cache: LayerCache | None,
        kv: KeysValues | None,
    ) -> tuple[mx.array, KeysValues]:
        """The layer's output, and the keys and values that it used."""
        B, L, _ = x.shape
        q, k, v = self._heads(x, offset, kv)
        if cache is not None:
            assert isinstance(k, mx.array) and isinstance(v, mx.array), "another layer's KV"
            k, v = cache.update(k, v)
        out = attend(q, k, v, 1.0, mask)  # the norms on q and k stand in for a scale
        return self["o_proj"](out.transpose(0, 2, 1, 3).reshape(B, L, -1)), (k, v)

    def _heads(self, x: mx.array, offset: Offset, kv: KeysValues | None) -> tuple[mx.array, KV, KV]:
        """Queries `[B, H, L, D]`, keys and values."""
        assert kv is not None, "a layer without KV needs its donor's"
        q = self["q_norm"](self._split(self["q_proj"](x)))
        return self._rope(q.transpose(0, 2, 1, 3), offset), *kv

    def _split(self, x: mx.array) -> mx.array:
        """`[B, L, N, D]`; norms come before the axes change places, else they copy."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


class OwnAttention(SharedAttention, NormedHeads):
    """Grouped-query attention with norms on queries, keys and values."""

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: Config, heads: Heads):
        super().__init__(config, heads)
        self._eps = config.rms_norm_eps
        rows = self.n_kv_heads * self.head_dim
        self.k_norm = nn.RMSNorm(self.head_dim, self._eps)
        for name in self.fusions["qkv_proj"][1:]:
            self[name] = Linear(config.hidden_size, rows, bias=config.attention_bias)

    def _heads(self, x: mx.array, offset: Offset, kv: KeysValues | None) -> tuple[mx.array, KV, KV]:
        H, Hk = self.n_heads, self.n_kv_heads
        # Without a v_proj the last heads are the keys' once more, before their norm and rotation.
        heads = self._split(self.project("qkv_proj", x))  # [B, L, H + Hk or H + 2 Hk, D]
        qk, plain = self.normed(heads, self._eps)
        qk = self._rope(qk.transpose(0, 2, 1, 3), offset)  # [B, H + Hk, L, D]
        return qk[:, :H], qk[:, H:], plain[:, :, -Hk:].transpose(0, 2, 1, 3)


class KeyIsValueAttention(OwnAttention):
    """Attention whose values are its keys' projection under a norm of their own."""

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj")}


def attention(config: Config, heads: Heads) -> SharedAttention:
    """The kind of attention that a layer has."""
    if heads.donor is not None:
        return SharedAttention(config, heads)
    return (KeyIsValueAttention if heads.k_is_v else OwnAttention)(config, heads)


class Layer(nn.Module):
    """Attention and MLP between norms, then the per-layer input, all of it times a scalar."""

    def __init__(self, config: Config, heads: Heads):
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        wide = config.use_double_wide_mlp and heads.donor is not None
        self.self_attn = attention(config, heads)
        self.mlp = GatedMLP(E, config.intermediate_size * (1 + wide), config.hidden_activation)
        self.input_layernorm = nn.RMSNorm(E, eps)
        self.post_attention_layernorm = nn.RMSNorm(E, eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(E, eps)
        self.post_feedforward_layernorm = nn.RMSNorm(E, eps)
        self.layer_scalar = mx.ones((1,))
        if P := config.hidden_size_per_layer_input:
            self.per_layer_input_gate = Linear(E, P, bias=False)
            self.per_layer_projection = Linear(P, E, bias=False)
            self.post_per_layer_input_norm = nn.RMSNorm(E, eps)
            self._gated = gated(config.hidden_activation)

    def __call__(
        self,
        x: mx.array,
        mask: Mask,
        offset: Offset,
        cache: LayerCache | None,
        kv: KeysValues | None,
        per_layer_input: mx.array | None,
    ) -> tuple[mx.array, KeysValues]:
        r, used = self["self_attn"](self["input_layernorm"](x), mask, offset, cache, kv)
        x = x + self["post_attention_layernorm"](r)
        r = self["post_feedforward_layernorm"](self._feed_forward(x))
        if per_layer_input is not None:
            x = x + r
            r = self._gated(self["per_layer_input_gate"](x), per_layer_input)
            r = self["post_per_layer_input_norm"](self["per_layer_projection"](r))
        return _scaled_sum(x, r, self["layer_scalar"]), used

    def _feed_forward(self, x: mx.array) -> mx.array:
        return self["mlp"](self["pre_feedforward_layernorm"](x))


@compiled
def _scaled_sum(x: mx.array, r: mx.array, factor: mx.array) -> mx.array:
    return (x + r) * factor


class Router(Prepared):
    """Which experts a token goes to, and how much each one's answer counts."""

    def __init__(self, config: Config):
        super().__init__()
        E, self._eps = config.hidden_size, config.rms_norm_eps
        self._k, self._root = config.top_k_experts, E**-0.5
        self.proj = Linear(E, config.num_experts, bias=False)
        self.scale = mx.ones((E,))
        self.per_expert_scale = mx.ones((config.num_experts,))

    def prepare(self) -> None:
        # Multiplied once instead of on every call.
        self.scale, self._root = self.scale * self._root, 1.0

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Experts `[B, L, k]` of x `[B, L, E]`, and their weights."""
        scale = self["scale"] if self._root == 1.0 else self["scale"] * self._root
        scores = self["proj"](mx.fast.rms_norm(x, scale, self._eps))
        experts = mx.argpartition(scores, kth=-self._k, axis=-1)[..., -self._k :]
        # The share among the chosen is their softmax: what the others had falls out of the sum.
        weights = mx.softmax(mx.take_along_axis(scores, experts, axis=-1), axis=-1, precise=True)
        return experts, weights * self["per_expert_scale"][experts]


class Experts(nn.Module):
    """The experts' answers, weighed."""

    def __init__(self, config: Config):
        super().__init__()
        self.switch_glu = GatedExperts(
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            gated(config.hidden_activation),
        )

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        return weighed(self["switch_glu"](x, experts), weights)


class ExpertsLayer(Layer):
    """A layer whose MLP has experts beside it, which take the same input."""

    def __init__(self, config: Config, heads: Heads):
        super().__init__(config, heads)
        E, eps = config.hidden_size, config.rms_norm_eps
        self.router = Router(config)
        self.experts = Experts(config)
        self.post_feedforward_layernorm_1 = nn.RMSNorm(E, eps)
        self.post_feedforward_layernorm_2 = nn.RMSNorm(E, eps)
        self.pre_feedforward_layernorm_2 = nn.RMSNorm(E, eps)

    def _feed_forward(self, x: mx.array) -> mx.array:
        shared = self["post_feedforward_layernorm_1"](super()._feed_forward(x))
        chosen = self["experts"](self["pre_feedforward_layernorm_2"](x), *self["router"](x))
        return shared + self["post_feedforward_layernorm_2"](chosen)


class Backbone(nn.Module):
    """Embeddings, layers and final norm: what the checkpoint calls `model`."""

    def __init__(self, config: Config):
        super().__init__()
        E, n, P = config.hidden_size, config.num_hidden_layers, config.hidden_size_per_layer_input
        self._sizes = E, n, P
        self.embed_tokens = Embedding(config.vocab_size, E)
        kind = ExpertsLayer if config.num_experts else Layer
        self.layers = [kind(config, heads) for heads in config.heads]
        self.norm = nn.RMSNorm(E, config.rms_norm_eps)
        if P:
            self.embed_tokens_per_layer = Embedding(config.vocab_size_per_layer_input, n * P)
            self.per_layer_model_projection = Linear(E, n * P, bias=False)
            self.per_layer_projection_norm = nn.RMSNorm(P, config.rms_norm_eps)

    def per_layer_inputs(self, tokens: mx.array, h: mx.array) -> mx.array | None:
        """What each layer adds of the tokens themselves, `[B, L, layers, P]`; None: nothing."""
        E, n, P = self._sizes
        if not P:
            return None
        shape = (*tokens.shape, n, P)
        own = self.embed_tokens_per_layer(tokens).reshape(shape) * P**0.5
        projected = (self.per_layer_model_projection(h) * E**-0.5).reshape(shape)
        return (self.per_layer_projection_norm(projected) + own) * 2**-0.5


class Model(CausalLM):
    """A Gemma 4 with its head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._windows = tuple(model_windows(self.cache_specs()))

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer; None for the layers that read another's KV."""
        return [
            CacheSpec(h.n_kv_heads, h.head_dim, h.head_dim, h.window) if h.donor is None else None
            for h in self.config.heads
        ]

    def hidden(self, tokens: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        return self.model.norm(self._layers(tokens, caches, last_only=False))

    def last_logits(self, tokens: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        """As every model's; the layers without KV are computed for the last token alone."""
        h = self._layers(tokens, caches, last_only=True)
        return self.logits(self.model.norm(h[:, -1:]))[:, 0]

    def _layers(
        self, tokens: mx.array, caches: Sequence[LayerCache] | None, last_only: bool
    ) -> mx.array:
        L, n_own = tokens.shape[1], len(self._windows)
        masks = attention_masks(self._windows, caches, L)
        offset = caches[0].offset if caches else 0
        # A Python number takes the dtype of h: rounded to bfloat16 only when computing in it.
        h = self.model.embed_tokens(tokens) * self.config.hidden_size**0.5
        inputs = self.model.per_layer_inputs(tokens, h)
        used: list[KeysValues] = []
        for i, (layer, heads) in enumerate(zip(self.model.layers, self.config.heads, strict=True)):
            if last_only and i == n_own:
                h, offset = h[:, -1:], offset + (L - 1)
                inputs = None if inputs is None else inputs[:, -1:]
                masks = {window: _last_row(mask) for window, mask in masks.items()}
            cache = caches[i] if caches is not None and heads.donor is None else None
            donated = None if heads.donor is None else used[heads.donor]
            per_layer = None if inputs is None else inputs[:, :, i]
            h, kv = layer(h, masks[heads.window], offset, cache, donated, per_layer)
            used.append(kv)
        return h

    def logits(self, hidden: mx.array) -> mx.array:
        if self.config.tie_word_embeddings:
            logits = self.model.embed_tokens.as_linear(hidden)
        else:
            logits = self.lm_head(hidden)
        return soft_cap(logits, self.config.final_logit_softcapping)


def _last_row(mask: Mask) -> Mask:
    """The mask of a chunk's last query, which sees every key where the chunk was causal."""
    return mask[-1:] if isinstance(mask, mx.array) else None


_SKIPPED = re.compile(
    r"(^|\.)(vision_tower|vision_embedder|audio_tower|embed_vision|embed_audio|"
    r"multi_modal_projector)\.|rotary_emb\.|inv_freq$"
)
_OWN_KV = re.compile(r"\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours: the language model's prefix is taken off.

    Returns:
        The weights, and the names left out: vision and audio, rotary frequencies, and what layers
        that read another's KV would have needed for their own.
    """
    kept: dict[str, mx.array] = {}
    skipped: list[str] = []
    n_own = config.num_hidden_layers - config.num_kv_shared_layers
    for name, array in weights.items():
        own_kv = _OWN_KV.search(name)
        if _SKIPPED.search(name) or (own_kv and int(own_kv[1]) >= n_own):
            skipped.append(name)
        else:
            kept |= _experts(_without_prefix(name), array)
    return kept, skipped


def _without_prefix(name: str) -> str:
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


def _experts(name: str, array: mx.array) -> dict[str, mx.array]:
    """Hugging Face's fused experts under mlx-lm's names; everything else as it is."""
    if name.endswith(".experts.down_proj"):
        return {name.replace(".down_proj", ".switch_glu.down_proj.weight"): array}
    if not name.endswith(".experts.gate_up_proj"):
        return {name: array}
    gate, up = mx.split(array, 2, axis=1)  # [E, 2 out, in]: the gates' rows, then the others
    stem = name.removesuffix("gate_up_proj") + "switch_glu."
    return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
