"""Shared by Gemma 3n and 4: last layers that read the KV of earlier ones, embeddings per layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.rope_config import RopeConfig, rope_config
from mlxkv.kv.layout import Caches, LayerCache, Mask, Offset, TwoWayMask
from mlxkv.kv.storage import KV
from mlxkv.kv.types import CacheSpec
from mlxkv.nn import kernels
from mlxkv.nn.attention import attend
from mlxkv.nn.decoder_model import Backbone, DecoderConfig, DecoderModel, FourNorms
from mlxkv.nn.layers import Fusing, NormedHeads, RMSNorm, gated, merge_heads
from mlxkv.nn.linear import Embedding, Linear
from mlxkv.nn.model import Media, attention_masks, blanked
from mlxkv.nn.rope import RoPE

KeysValues = tuple[KV, KV]
"""Keys `[B, Hk, S, D]` and values that a layer used, for the layers that share them."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention of one layer.

    Args:
        donor: the earlier layer whose KV this one reads; None where it has its own.
        k_is_v: whether the values are the keys' projection under another norm.
    """

    window: int | None
    head_dim: int
    n_kv_heads: int
    donor: int | None
    k_is_v: bool
    rope: RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedKVConfig(DecoderConfig):
    """The numbers of a decoder whose layers differ in their attention.

    Attributes:
        heads: the attention of each layer.
        hidden_size_per_layer_input: size of the embedding that each layer takes; 0: none.
        vocab_size_per_layer_input: tokens that have one.
        pad_token_id: the token whose one stands at media.
    """

    scales_embedding = True

    heads: tuple[Heads, ...]
    hidden_size_per_layer_input: int
    vocab_size_per_layer_input: int
    pad_token_id: int = 0


def donors(fields: Fields, kinds: Sequence[Hashable], n_shared: int) -> tuple[int | None, ...]:
    """Each layer's donor: for the last `n_shared` the last layer of their kind with KV of its own.

    Raises:
        ConfigError: there is no such layer.
    """
    n_own = max(len(kinds) - n_shared, 0)
    last = {kind: i for i, kind in enumerate(kinds[:n_own])}
    if any(kind not in last for kind in kinds[n_own:]):
        raise fields.error(
            "num_kv_shared_layers",
            f"of {n_shared} leaves no layer of each kind with KV of its own",
        )
    return tuple(None if i < n_own else last[kind] for i, kind in enumerate(kinds))


def sizes_by_layer(fields: Fields, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(head_dim, KV heads) of each layer, with what `per_layer_config` says of some.

    Raises:
        ConfigError: it names no layer, or says more than that.
    """
    sizes = list(sizes)
    overrides = fields.nested("per_layer_config")
    for key in overrides.raw:
        layer = overrides.nested(key)
        unknown = sorted(set(layer.raw) - {"head_dim", "num_key_value_heads"})
        if not key.isdecimal() or int(key) >= len(sizes):
            raise overrides.error(key, f"is no layer of {len(sizes)}")
        if unknown:
            raise layer.error(unknown[0], "changes the mathematics and is not understood")
        head_dim, n_kv_heads = sizes[int(key)]
        sizes[int(key)] = (
            layer.int("head_dim", head_dim),
            layer.int("num_key_value_heads", n_kv_heads),
        )
    return sizes


def rope_of_kind(fields: Fields, kind: str, head_dim: int) -> RopeConfig:
    """The rotation of layers of one kind, from `rope_parameters`.

    Raises:
        ConfigError: it is missing, wrong, or turns a part of the head without saying how.
    """
    params = fields.nested("rope_parameters")
    if not isinstance(params.raw.get(kind), Mapping):
        raise params.missing(kind)
    rope = rope_config(fields, head_dim, default_theta=None, layer_type=kind, scaling_key=None)
    if rope.dims != head_dim:
        raise params.error(
            kind, f"turns {rope.dims} of {head_dim} values, which is for proportional"
        )
    return rope


class SharedAttention(kernels.Settled, Fusing):
    """Queries of this layer on the keys and values of an earlier one; norms replace the scale."""

    def __init__(self, config: DecoderConfig, heads: Heads):
        super().__init__()
        E, D, H = config.hidden_size, heads.head_dim, config.num_attention_heads
        self.n_heads, self.n_kv_heads, self.head_dim = H, heads.n_kv_heads, D
        self.q_proj = Linear(E, H * D, bias=config.attention_bias)
        self.o_proj = Linear(H * D, E, bias=config.attention_bias)
        self.q_norm = RMSNorm(D, config.rms_norm_eps)
        self._rope = RoPE(heads.rope)

    def __call__(
        self,
        x: mx.array,
        mask: Mask,
        offset: Offset,
        cache: LayerCache | None,
        kv: KeysValues | None,
    ) -> tuple[mx.array, KeysValues]:
        """Attention of x `[B, L, E]`, and the keys and values that it used.

        Args:
            x: the layer's input.
            mask: see `attend`.
            offset: position of the first token.
            cache: the layer's own, if it has one and this is not one pass over a whole sequence.
            kv: the donor's; None for a layer with its own.
        """
        q, k, v = self.heads(x, offset, kv)
        if cache is not None:
            assert isinstance(k, mx.array) and isinstance(v, mx.array), "another layer's KV"
            k, v = cache.update(k, v)
        out = kernels.attended(q, k, v, 1.0, mask) if self.uses_kernels else None
        if out is None:
            out = merge_heads(attend(q, k, v, 1.0, mask))
        return self["o_proj"](out), (k, v)

    def heads(self, x: mx.array, offset: Offset, kv: KeysValues | None) -> tuple[mx.array, KV, KV]:
        """Queries `[B, H, L, D]`, keys and values."""
        assert kv is not None, "a layer without KV needs its donor's"
        # Norms before the transposition, which they would copy.
        q = self["q_norm"](self["q_proj"](x).reshape(*x.shape[:-1], -1, self.head_dim))
        return self["_rope"](q.transpose(0, 2, 1, 3), offset), *kv


class OwnAttention(SharedAttention, NormedHeads):
    """Grouped-query attention with norms on queries, keys and, without a weight, values."""

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: DecoderConfig, heads: Heads):
        super().__init__(config, heads)
        self._eps = config.rms_norm_eps
        rows = self.n_kv_heads * self.head_dim
        self.k_norm = RMSNorm(self.head_dim, self._eps)
        for name in self.fusions["qkv_proj"][1:]:
            self[name] = Linear(config.hidden_size, rows, bias=config.attention_bias)

    def heads(self, x: mx.array, offset: Offset, kv: KeysValues | None) -> tuple[mx.array, KV, KV]:
        return self.turned(self.project("qkv_proj", x), offset)

    def turned(self, qkv: mx.array, offset: Offset) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values of the projections' rows `[B, L, (H + 2 Hk) D]`."""
        H, Hk = self.n_heads, self.n_kv_heads
        # Without a v_proj the values are the keys before their norm and rotation.
        heads = qkv.reshape(*qkv.shape[:-1], -1, self.head_dim)
        qk, plain = self.normed(heads, self._eps)  # [B, L, H + Hk or H + 2 Hk, D]
        qk = self["_rope"](qk.transpose(0, 2, 1, 3), offset)  # [B, H + Hk, L, D]
        return qk[:, :H], qk[:, H:], plain[:, :, -Hk:].transpose(0, 2, 1, 3)


class KeyIsValueAttention(OwnAttention):
    """Attention whose values are its keys' projection under a norm of their own."""

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj")}


def attention(config: DecoderConfig, heads: Heads) -> SharedAttention:
    if heads.donor is not None:
        return SharedAttention(config, heads)
    return (KeyIsValueAttention if heads.k_is_v else OwnAttention)(config, heads)


class PerLayerNorms(FourNorms):
    """`FourNorms`, and the modules for an embedding of the layer's own, if the config has any."""

    def __init__(self, config: SharedKVConfig, heads: Heads, mlp: nn.Module):
        super().__init__(config, attention(config, heads), mlp)
        E, P = config.hidden_size, config.hidden_size_per_layer_input
        if P:
            self.per_layer_input_gate = Linear(E, P, bias=False)
            self.per_layer_projection = Linear(P, E, bias=False)
            self.post_per_layer_input_norm = RMSNorm(E, config.rms_norm_eps)
            self._gated = gated(config.hidden_act)


class PerLayerBackbone(Backbone):
    """A backbone whose N layers take an embedding of their own, of P values."""

    def __init__(self, config: SharedKVConfig, layers: Sequence[nn.Module]):
        super().__init__(config, layers)
        E, N, P = config.hidden_size, len(layers), config.hidden_size_per_layer_input
        if P:
            self.embed_tokens_per_layer = Embedding(config.vocab_size_per_layer_input, N * P)
            self.per_layer_model_projection = Linear(E, N * P, bias=False)
            self.per_layer_projection_norm = RMSNorm(P, config.rms_norm_eps)

    def per_layer_inputs(self, x: mx.array, own: mx.array) -> mx.array:
        """Each layer's input `[B, L, N, P]`: x `[B, L, E]` projected, and `own` of the same shape.

        `own` comes from `SharedKVModel.embed_per_layer`.
        """
        projected = self["per_layer_model_projection"](x) * x.shape[-1] ** -0.5
        return (self["per_layer_projection_norm"](projected.reshape(own.shape)) + own) * 2**-0.5


class SharedKVModel(DecoderModel):
    """A decoder whose last layers may read the KV of earlier ones, on a `PerLayerBackbone`.

    Its layers are callables of (x, mask, offset, cache, the donor's KV, own embedding) and return x
    and the KV they used.
    """

    config: SharedKVConfig

    def cache_specs(self) -> list[CacheSpec | None]:
        return [
            CacheSpec(h.n_kv_heads, h.head_dim, h.head_dim, h.window) if h.donor is None else None
            for h in self.config.heads
        ]

    def embed_per_layer(self, tokens: mx.array, media: Media = ()) -> mx.array | None:
        P = self.config.hidden_size_per_layer_input
        if not P:
            return None
        # Media have the padding's, whatever token stands in their places.
        tokens = blanked(tokens, media, self.config.pad_token_id) if media else tokens
        return self.model.embed_tokens_per_layer(tokens).reshape(*tokens.shape, -1, P) * P**0.5

    def through_layers(
        self,
        x: mx.array,
        inputs: mx.array | None,
        caches: Caches,
        media: Media = (),
        *,
        last_only: bool = False,
    ) -> mx.array:
        """The last layer's output.

        Args:
            x: the first layer's input, `[..., L, E]`.
            inputs: from `per_layer_inputs`, if the layers take any.
            caches: one per layer that owns KV.
            media: among x; those of `two_way_kinds` see each other in sliding layers.
            last_only: compute the layers without KV of their own for the last token alone.
        """
        L, n_own = x.shape[-2], len(self._windows)
        runs = self.two_way_runs(media) if media else ()
        masks = attention_masks(self._windows, caches, L, runs, sliding_only=True)
        # Read before any layer: a donor's cache has advanced when its readers rotate their queries.
        offset = caches[0].offset if caches else 0
        used: list[KeysValues] = []
        for i, (layer, heads) in enumerate(zip(self.model.layers, self.config.heads, strict=True)):
            if last_only and i == n_own:
                x, offset = x[..., -1:, :], offset + (L - 1)
                inputs = None if inputs is None else inputs[:, -1:]
                masks = {window: _last_row(mask) for window, mask in masks.items()}
            # Layers with their own KV come first, so a cache has its layer's number.
            cache = caches[i] if caches is not None and heads.donor is None else None
            donated = None if heads.donor is None else used[heads.donor]
            own = None if inputs is None else inputs[:, :, i]
            x, kv = layer(x, masks[heads.window], offset, cache, donated, own)
            used.append(kv)
        return x


def _last_row(mask: Mask) -> Mask:
    """The mask of a chunk's last query, which sees every key where the chunk was causal."""
    if isinstance(mask, TwoWayMask):
        mask = mask.array
    return mask[-1:] if isinstance(mask, mx.array) else None
