"""Gemma 3n text: several residual streams (AltUp), a low-rank residual (LAuReL), an embedding per
layer, sparse activations, and last layers that read the KV of earlier ones.

Reference: transformers `modeling_gemma3n.py`. Multimodal checkpoints load as their language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.kv.layout import LayerCache, Mask, Offset
from mlxkv.kv.storage import KV
from mlxkv.kv.types import CacheSpec
from mlxkv.models.gemma3n_altup import AltUp, one_stream, rescaled, root_mean_square
from mlxkv.models.gemma3n_config import Config
from mlxkv.nn.attention import attend
from mlxkv.nn.layers import GatedMLP, NormedHeads, compiled, gated, soft_cap
from mlxkv.nn.linear import Embedding, Linear
from mlxkv.nn.model import CausalLM, attention_masks, model_windows
from mlxkv.nn.rope import RoPE

KeysValues = tuple[KV, KV]


class Attention(NormedHeads):
    """Grouped-query attention with norms on queries, keys and, without a weight, values.

    Scores are not scaled: the norms of q and k do it.
    """

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: Config, layer: int):
        super().__init__()
        E, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = D, config.rms_norm_eps
        self.q_proj = Linear(E, self.n_heads * D, bias=bias)
        self.k_proj = Linear(E, self.n_kv_heads * D, bias=bias)
        self.v_proj = Linear(E, self.n_kv_heads * D, bias=bias)
        self.o_proj = Linear(self.n_heads * D, E, bias=bias)
        self.q_norm = nn.RMSNorm(D, self.eps)
        self.k_norm = nn.RMSNorm(D, self.eps)
        self._rope = _rope(config, layer)

    def __call__(
        self, x: mx.array, mask: Mask, offset: Offset, cache: LayerCache | None
    ) -> tuple[mx.array, KeysValues]:
        """Attention of x `[B, L, E]`, and the keys and values that it went over."""
        B, L, _ = x.shape
        H, Hk = self.n_heads, self.n_kv_heads
        qkv = self.project("qkv_proj", x).reshape(B, L, H + 2 * Hk, self.head_dim)
        qk, plain = self.normed(qkv, self.eps)
        qk = self._rope(qk.transpose(0, 2, 1, 3), offset)
        q, k = qk[:, :H], qk[:, H:]  # [B, H, L, D], [B, Hk, L, D]
        v = plain[:, :, H + Hk :].transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = cache.update(k, v)
        out = attend(q, k, v, 1.0, mask)
        return self["o_proj"](out.transpose(0, 2, 1, 3).reshape(B, L, -1)), (k, v)


class SharedAttention(nn.Module):
    """`Attention` over the keys and values of another layer."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        E, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.n_heads, self.head_dim = config.num_attention_heads, D
        self.q_proj = Linear(E, self.n_heads * D, bias=bias)
        self.o_proj = Linear(self.n_heads * D, E, bias=bias)
        self.q_norm = nn.RMSNorm(D, config.rms_norm_eps)
        self._rope = _rope(config, layer)

    def __call__(
        self, x: mx.array, mask: Mask, offset: Offset, kv: KeysValues
    ) -> tuple[mx.array, KeysValues]:
        B, L, _ = x.shape
        # Normed before the axes change places: a norm copies what does not lie in order.
        q = self["q_norm"](self["q_proj"](x).reshape(B, L, self.n_heads, self.head_dim))
        out = attend(self._rope(q.transpose(0, 2, 1, 3), offset), *kv, 1.0, mask)
        return self["o_proj"](out.transpose(0, 2, 1, 3).reshape(B, L, -1)), kv


def _rope(config: Config, layer: int) -> RoPE:
    return RoPE(config.full_rope if config.windows[layer] is None else config.sliding_rope)


class MLP(GatedMLP):
    """A gated MLP that lets only the largest gates through.

    Args:
        sparsity: share of the gates to cut off, were they normally distributed; 0 cuts none.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: str, sparsity: float):
        super().__init__(dim, hidden_dim, activation)
        if sparsity:
            n_deviations, plain = NormalDist().inv_cdf(sparsity), gated(activation)
            self._gated = lambda gate, up: plain(above(gate, n_deviations), up)


def above(x: mx.array, n_deviations: float) -> mx.array:
    """By how much each value exceeds mean + n standard deviations of its row, or 0."""
    # float32, because the sums are of thousands of values; the dtype's own would lose their digits.
    mean = x.astype(mx.float32).mean(axis=-1, keepdims=True)
    variance = _squared_errors(x, mean).mean(axis=-1, keepdims=True)
    return _excess(x, mean, variance, n_deviations)


@compiled
def _squared_errors(x: mx.array, mean: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32) - mean)


@compiled
def _excess(x: mx.array, mean: mx.array, variance: mx.array, n_deviations: float) -> mx.array:
    bound = mean + n_deviations * mx.sqrt(variance)
    return mx.maximum(x.astype(mx.float32) - bound, 0).astype(x.dtype)


class Laurel(nn.Module):
    """Learned augmented residual layer: x + norm(right(left(x))), of low rank."""

    def __init__(self, config: Config):
        super().__init__()
        E = config.hidden_size
        self.linear_left = Linear(E, config.laurel_rank, bias=False)
        self.linear_right = Linear(config.laurel_rank, E, bias=False)
        self.post_laurel_norm = nn.RMSNorm(E, config.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self["post_laurel_norm"](self["linear_right"](self["linear_left"](x)))


class Layer(nn.Module):
    """One update of all streams."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        E, P, eps = config.hidden_size, config.hidden_size_per_layer_input, config.rms_norm_eps
        owns = config.donors[layer] is None
        self.self_attn = Attention(config, layer) if owns else SharedAttention(config, layer)
        self.mlp = MLP(
            E,
            config.intermediate_size[layer],
            config.hidden_activation,
            config.activation_sparsity_pattern[layer],
        )
        self.input_layernorm = nn.RMSNorm(E, eps)
        self.post_attention_layernorm = nn.RMSNorm(E, eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(E, eps)
        self.post_feedforward_layernorm = nn.RMSNorm(E, eps)
        self.altup = AltUp(config)
        self.laurel = Laurel(config)
        self.per_layer_input_gate = Linear(E, P, bias=False)
        self.per_layer_projection = Linear(P, E, bias=False)
        self.post_per_layer_input_norm = nn.RMSNorm(E, eps)
        self._gated = gated(config.hidden_activation)
        self._scales = config.altup_correct_scale
        n_more = config.altup_num_inputs - 1
        self._takes_own = mx.array([False] + [True] * n_more)[:, None, None, None]

    def __call__(
        self, streams: mx.array, own: mx.array, mask: Mask, offset: Offset, source: Any
    ) -> tuple[mx.array, KeysValues]:
        """Update the streams.

        Args:
            streams: `[A, B, L, E]`.
            own: the tokens' embedding for this layer, `[B, L, P]`.
            mask: see `attend`.
            offset: position of the first token.
            source: the layer's cache or None; the donor's keys and values where it has none.

        Returns:
            The streams, and the keys and values of its attention.
        """
        altup = self["altup"]
        predicted = altup.predict(streams)
        x = one_stream(predicted, altup.active)
        normed = self["input_layernorm"](x)
        r, kv = self["self_attn"](normed, mask, offset, source)
        x = x + self["post_attention_layernorm"](r)
        x = _averaged(x, self["laurel"](normed))
        r = self["mlp"](self["pre_feedforward_layernorm"](x))
        x = x + self["post_feedforward_layernorm"](r)
        corrected = altup.correct(predicted, x)
        return self._with_own(corrected, own), kv

    def _with_own(self, streams: mx.array, own: mx.array) -> mx.array:
        """The layer's own embedding, gated by the active stream, on all streams but the first."""
        altup = self["altup"]
        x = one_stream(streams, altup.active)
        if self._scales:
            x = x * altup.correct_output_scale
        x = self["per_layer_projection"](self._gated(self["per_layer_input_gate"](x), own))
        x = self["post_per_layer_input_norm"](x)
        return _added(streams, x, self._takes_own)


@compiled
def _averaged(x: mx.array, y: mx.array) -> mx.array:
    return (x + y) * 2**-0.5


@compiled
def _added(streams: mx.array, x: mx.array, which: mx.array) -> mx.array:
    return mx.where(which, streams + x, streams)


class Backbone(nn.Module):
    """Embeddings, layers, and what makes streams of one hidden state and back: `model`."""

    def __init__(self, config: Config):
        super().__init__()
        E, eps, N = config.hidden_size, config.rms_norm_eps, config.num_hidden_layers
        P, n_more = config.hidden_size_per_layer_input, config.altup_num_inputs - 1
        self.per_layer_shape = (N, P)
        self.embed_tokens = Embedding(config.vocab_size, E)
        self.embed_tokens_per_layer = Embedding(config.vocab_size_per_layer_input, N * P)
        self.per_layer_model_projection = Linear(E, N * P, bias=False)
        self.per_layer_projection_norm = nn.RMSNorm(P, eps)
        self.altup_projections = [Linear(E, E, bias=False) for _ in range(n_more)]
        self.altup_unembed_projections = [Linear(E, E, bias=False) for _ in range(n_more)]
        self.layers = [Layer(config, i) for i in range(N)]
        self.norm = nn.RMSNorm(E, eps)

    def per_layer_inputs(self, tokens: mx.array, h: mx.array) -> mx.array:
        """What each layer is told of tokens `[B, L]` embedded as `[B, L, E]`: `[B, L, N, P]`."""
        N, P = self.per_layer_shape
        projected = self["per_layer_model_projection"](h) * h.shape[-1] ** -0.5
        projected = self["per_layer_projection_norm"](projected.reshape(*tokens.shape, N, P))
        table = self["embed_tokens_per_layer"]
        # Tokens of images and sound have no row here and get that of token 0.
        known = mx.where(tokens < table.weight.shape[0], tokens, 0)
        embedded = table(known).reshape(*tokens.shape, N, P) * P**0.5
        return (projected + embedded) * 2**-0.5

    def streams(self, h: mx.array) -> mx.array:
        """One hidden state `[B, L, E]` -> A of its size, `[A, B, L, E]`."""
        target = root_mean_square(h)
        more = [rescaled(project(h), target) for project in self["altup_projections"]]
        return mx.stack([h, *more])

    def joined(self, streams: mx.array) -> mx.array:
        """The mean of the streams, each brought to the size of the first: `[B, L, E]`."""
        first = one_stream(streams, 0)
        target, total = root_mean_square(first), first
        for i, project in enumerate(self["altup_unembed_projections"], start=1):
            total = total + rescaled(project(one_stream(streams, i)), target)
        return total / streams.shape[0]


class Model(CausalLM):
    """A Gemma 3n language model with its head."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._owned = tuple(model_windows(self.cache_specs()))

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer; None where it reads its donor's KV."""
        c = self.config
        return [
            CacheSpec(c.num_key_value_heads, c.head_dim, c.head_dim, window)
            if donor is None
            else None
            for window, donor in zip(c.windows, c.donors, strict=True)
        ]

    def hidden(self, tokens: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        masks = attention_masks(self._owned, caches, tokens.shape[1])
        # Before any layer: a donor's cache has moved on when its readers rotate their queries.
        offset = 0 if caches is None else caches[0].offset
        # A Python number takes the dtype of h: rounded to bfloat16 only when computing in it.
        h = self.model.embed_tokens(tokens) * self.config.hidden_size**0.5
        own = self.model.per_layer_inputs(tokens, h)
        streams, kv = self.model.streams(h), list[KeysValues]()
        for i, (window, donor) in enumerate(
            zip(self.config.windows, self.config.donors, strict=True)
        ):
            # Layers with their own KV come first, so a cache has its layer's number.
            source = kv[donor] if donor is not None else None if caches is None else caches[i]
            layer = self.model.layers[i]
            streams, held = layer(streams, own[:, :, i], masks[window], offset, source)
            kv.append(held)
        return self.model.norm(self.model.joined(streams))

    def logits(self, hidden: mx.array) -> mx.array:
        tied = self.config.tie_word_embeddings
        logits = self.model.embed_tokens.as_linear(hidden) if tied else self.lm_head(hidden)
        return soft_cap(logits, self.config.final_logit_softcapping)


_SKIPPED = re.compile(r"(^|\.)(vision_tower|audio_tower|embed_vision|embed_audio)\.|inv_freq$")
_OWN_KV = re.compile(r"^model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours: the language model's prefix is taken off.

    Returns:
        The weights, and the names left out: towers of images and sound, and the projections of
        keys and values that layers without KV of their own do not use.
    """
    kept: dict[str, mx.array] = {}
    skipped: list[str] = []
    for name, array in weights.items():
        ours = name.removeprefix("language_model.")
        if ours.startswith("model.language_model."):
            ours = "model." + ours.removeprefix("model.language_model.")
        own_kv = _OWN_KV.match(ours)
        if _SKIPPED.search(name) or (own_kv and _is_shared(config, int(own_kv[1]))):
            skipped.append(name)
        else:
            kept[ours] = array
    return kept, skipped


def _is_shared(config: Config, layer: int) -> bool:
    return layer < len(config.donors) and config.donors[layer] is not None
