"""Gemma 3n: several residual streams (AltUp), a low-rank residual (LAuReL), an embedding per layer,
sparse activations, and last layers that read the KV of earlier ones.

Reference: transformers `modeling_gemma3n.py`. `gemma3n_vision` has its encoder of pictures,
`gemma3n_audio` that of sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint import tensor_names
from mlxkv.kv.layout import Caches, LayerCache, Mask, Offset
from mlxkv.models.gemma3n_altup import AltUp, one_stream, rescaled, root_mean_square
from mlxkv.models.gemma3n_audio import Gemma3nTower
from mlxkv.models.gemma3n_config import Config, VisionConfig
from mlxkv.models.gemma3n_embedder import Embedder
from mlxkv.models.gemma3n_vision import VisionTower, channels_last
from mlxkv.models.gemma_audio import audio_names
from mlxkv.models.gemma_audio_config import Gemma3nAudio
from mlxkv.nn.encoders import AUDIO, IMAGE
from mlxkv.nn.layers import Gate, GatedMLP, RMSNorm, compiled, gated
from mlxkv.nn.linear import Linear
from mlxkv.nn.model import Embedded, Media, placed
from mlxkv.nn.shared_kv import KeysValues, PerLayerBackbone, PerLayerNorms, SharedKVModel


class MLP(GatedMLP):
    """A gated MLP that lets only the largest gates through.

    Args:
        sparsity: share of the gates to cut off, were they normally distributed; 0 cuts none.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: str, sparsity: float):
        super().__init__(dim, hidden_dim, activation)
        if sparsity:
            n_deviations, plain = NormalDist().inv_cdf(sparsity), gated(activation)
            self._gated = Gate(lambda gate, up: plain(above(gate, n_deviations), up))


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
        self.post_laurel_norm = RMSNorm(E, config.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self["post_laurel_norm"](self["linear_right"](self["linear_left"](x)))


class Layer(PerLayerNorms):
    """One update of all streams."""

    def __init__(self, config: Config, layer: int):
        mlp = MLP(
            config.hidden_size,
            config.intermediate_sizes[layer],
            config.hidden_act,
            config.activation_sparsity_pattern[layer],
        )
        super().__init__(config, config.heads[layer], mlp)
        self.altup = AltUp(config)
        self.laurel = Laurel(config)
        self._scales = config.altup_correct_scale
        n_more = config.altup_num_inputs - 1
        self._takes_own = mx.array([False] + [True] * n_more)[:, None, None, None]

    def __call__(
        self,
        streams: mx.array,
        mask: Mask,
        offset: Offset,
        cache: LayerCache | None,
        kv: KeysValues | None,
        own: mx.array,
    ) -> tuple[mx.array, KeysValues]:
        """The next streams `[A, B, L, E]`, and the keys and values of the attention.

        Args:
            streams: `[A, B, L, E]`.
            own: the tokens' embedding for this layer, `[B, L, P]`; the others are of `attention`.
        """
        altup = self["altup"]
        predicted = altup.predict(streams)
        x = one_stream(predicted, altup.active)
        normed = self["input_layernorm"](x)
        r, used = self["self_attn"](normed, mask, offset, cache, kv)
        x = x + self["post_attention_layernorm"](r)
        x = _averaged(x, self["laurel"](normed))
        r = self["mlp"](self["pre_feedforward_layernorm"](x))
        x = x + self["post_feedforward_layernorm"](r)
        corrected = altup.correct(predicted, x)
        return self._with_own(corrected, own), used

    def _with_own(self, streams: mx.array, own: mx.array) -> mx.array:
        """The layer's own embedding, gated by the active stream, on all streams but the first."""
        altup = self["altup"]
        x = one_stream(streams, altup.active)
        if self._scales:
            x = x * altup.correct_output_scale
        x = self["per_layer_projection"](self._gated(self["per_layer_input_gate"](x), own))
        return _added(streams, self["post_per_layer_input_norm"](x), self._takes_own)


@compiled
def _averaged(x: mx.array, y: mx.array) -> mx.array:
    return (x + y) * 2**-0.5


@compiled
def _added(streams: mx.array, x: mx.array, which: mx.array) -> mx.array:
    return mx.where(which, streams + x, streams)


class Backbone(PerLayerBackbone):
    """A backbone that makes streams of one hidden state and back."""

    def __init__(self, config: Config, layers: Sequence[nn.Module]):
        super().__init__(config, layers)
        E, n_more = config.hidden_size, config.altup_num_inputs - 1
        self.altup_projections = [Linear(E, E, bias=False) for _ in range(n_more)]
        self.altup_unembed_projections = [Linear(E, E, bias=False) for _ in range(n_more)]

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


def _embedder(encoder: VisionConfig | Gemma3nAudio, config: Config) -> Embedder:
    return Embedder(
        encoder.vocab_offset,
        encoder.vocab_size,
        encoder.hidden_size,
        config.hidden_size,
        encoder.rms_norm_eps,
    )


class Model(SharedKVModel):
    """A Gemma 3n language model with its head, and the encoders that its config has."""

    def __init__(self, config: Config):
        layers = [Layer(config, i) for i in range(config.num_hidden_layers)]
        super().__init__(config, layers, Backbone)
        if vision := config.vision:
            self.vision_tower = VisionTower(vision)
            self.embed_vision = _embedder(vision, config)
        if audio := config.audio:
            self._n_audio_rows, self._audio_padding = audio.n_rows, audio.padding
            self.audio_tower = Gemma3nTower(audio)
            self.embed_audio = _embedder(audio, config)

    @property
    def media_kinds(self) -> frozenset[str]:
        towers = {IMAGE: "vision_tower", AUDIO: "audio_tower"}
        return frozenset(kind for kind, name in towers.items() if name in self)

    def media_rows(self, kind: str, data: Mapping[str, mx.array]) -> mx.array:
        """See `CausalLM`; a picture is `pixels`, `[H, W, 3]` as the processor scales them, sound is
        `mel`, real frames `[T, bins]`.
        """
        if kind == AUDIO:
            return self._heard(mx.array(data["mel"]).astype(self.compute_dtype))
        pixels = mx.array(data["pixels"]).astype(self.compute_dtype)
        return self["embed_vision"](self["vision_tower"](pixels))

    def _heard(self, mel: mx.array) -> mx.array:
        """The rows of a clip, and those of the padding token up to the number that all have."""
        rows = self["embed_audio"](self["audio_tower"](mel))
        n_more = self._n_audio_rows - rows.shape[0]
        assert n_more >= 0, "a clip longer than the model takes"
        padding = self["embed_audio"].token_rows()[self._audio_padding]
        return mx.concatenate([rows, mx.broadcast_to(padding, (n_more, padding.size))])

    def embed(self, tokens: mx.array, media: Media = ()) -> mx.array:
        x = super().embed(tokens)
        for name in ("embed_vision", "embed_audio"):
            if name in self:
                x = self[name].over(x, tokens)
        return placed(x, media)

    def embed_per_layer(self, tokens: mx.array, media: Media = ()) -> mx.array | None:
        # Pictures, sound and the tokens around them have no row here and get that of token 0.
        known = tokens < self.config.vocab_size_per_layer_input
        for _, start, rows in media:
            known[:, start : start + rows.shape[0]] = False
        return super().embed_per_layer(mx.where(known, tokens, 0), media)

    def forward(self, inputs: Embedded, caches: Caches, last_only: bool = False) -> mx.array:
        x, per_layer, _ = inputs
        assert per_layer is not None, "its layers need embed_per_layer(tokens)"
        own = self.model.per_layer_inputs(x, per_layer)
        streams = self.through_layers(self.model.streams(x), own, caches)
        return self.model.norm(self.model.joined(streams))


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours: the prefixes of the parts are taken off.

    Returns:
        The weights, and the names left out: encoders that the config does not have, and the
        projections of keys and values that layers without KV of their own do not use.
    """
    readers = [i for i, heads in enumerate(config.heads) if heads.donor is not None]
    kept, skipped = tensor_names.language_model(weights, config, readers=readers)
    vision = {name: array for name, array in kept.items() if name.startswith("vision_tower.")}
    kept, unused = audio_names(kept | channels_last(vision), config.audio)
    return kept, skipped + unused
