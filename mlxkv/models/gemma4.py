"""Gemma 4: dense (12B, 31B), mixture of experts (26B-A4B), per-layer embeddings (E2B, E4B).

Sliding layers and full ones have their own head sizes and KV heads; a full layer may use its keys
as values; the last layers may read the KV of the last layer of their kind that has its own.

Pictures: E2B to 31B have an encoder, 12B has next to none (`gemma_vision`). Sound: E2B and E4B have
an encoder (`gemma4_audio`), 12B projects samples.

Reference: transformers `modeling_gemma4.py` and `modeling_gemma4_unified.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint import tensor_names
from mlxkv.kv.layout import Caches, LayerCache, Mask, Offset
from mlxkv.models.gemma4_assistant import Assistant, BorrowedKV
from mlxkv.models.gemma4_audio import Gemma4Tower
from mlxkv.models.gemma4_config import Config
from mlxkv.models.gemma_audio import audio_names
from mlxkv.models.gemma_audio_config import Gemma4Audio
from mlxkv.models.gemma_vision import RowProjection, VisionEmbedder, VitTower, vit_names
from mlxkv.models.gemma_vision_config import VitConfig
from mlxkv.nn.encoders import AUDIO, IMAGE
from mlxkv.nn.layers import GatedMLP, Prepared, RMSNorm, compiled, gated
from mlxkv.nn.linear import Linear
from mlxkv.nn.model import Embedded, Reader
from mlxkv.nn.moe import GatedExperts, weighed
from mlxkv.nn.shared_kv import Heads, KeysValues, PerLayerBackbone, PerLayerNorms, SharedKVModel


class Layer(PerLayerNorms):
    """Attention and MLP between norms, then the per-layer input, all of it times a scalar."""

    def __init__(self, config: Config, heads: Heads):
        wide = config.use_double_wide_mlp and heads.donor is not None
        n_hidden = config.intermediate_size * (1 + wide)
        super().__init__(config, heads, GatedMLP(config.hidden_size, n_hidden, config.hidden_act))
        self.layer_scalar = mx.ones((1,))

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
        return self["mlp"](x, self["pre_feedforward_layernorm"])


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
        # The share among the chosen is their softmax: what the others had falls out of the sum.
        experts = mx.argpartition(scores, kth=-self._k, axis=-1)[..., -self._k :]
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
            gated(config.hidden_act),
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
        self.post_feedforward_layernorm_1 = RMSNorm(E, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(E, eps)
        self.pre_feedforward_layernorm_2 = RMSNorm(E, eps)

    def _feed_forward(self, x: mx.array) -> mx.array:
        shared = self["post_feedforward_layernorm_1"](super()._feed_forward(x))
        chosen = self["experts"](self["pre_feedforward_layernorm_2"](x), *self["router"](x))
        return shared + self["post_feedforward_layernorm_2"](chosen)


class Model(SharedKVModel):
    """A Gemma 4 with its head and the encoders that the config has."""

    def __init__(self, config: Config):
        kind = ExpertsLayer if config.num_experts else Layer
        layers = [kind(config, heads) for heads in config.heads]
        super().__init__(config, layers, PerLayerBackbone)
        vision, E, self._two_way = config.vision, config.hidden_size, config.two_way
        if isinstance(vision, VitConfig):
            self.vision_tower = VitTower(vision)
        elif vision is not None:
            self.vision_embedder = VisionEmbedder(vision)
        if vision is not None:
            self.embed_vision = RowProjection(vision, E)
        if isinstance(audio := config.audio, Gemma4Audio):
            self.audio_tower = Gemma4Tower(audio)
        if audio is not None:
            self.embed_audio = RowProjection(audio, E)
        if (assistant := config.assistant) is not None:
            layers = [Layer(assistant.text, heads) for heads in assistant.text.heads]
            self.assistant = Assistant(assistant, layers)

    def reader(self) -> Reader | None:
        return BorrowedKV(self) if "assistant" in self else None

    @property
    def media_kinds(self) -> frozenset[str]:
        embedders = {IMAGE: "embed_vision", AUDIO: "embed_audio"}
        return frozenset(kind for kind, name in embedders.items() if name in self)

    @property
    def two_way_kinds(self) -> frozenset[str]:
        return frozenset((IMAGE,) if self._two_way else ()) & self.media_kinds

    def media_rows(self, kind: str, data: Mapping[str, mx.array]) -> mx.array:
        """See `CausalLM`; pictures are `patches` and `positions`, see `VitTower`; sound is `mel`,
        real frames `[T, bins]`, or 12B's `samples`, `[n, 640]`.
        """
        if kind == AUDIO:
            sound = data["mel" if "audio_tower" in self else "samples"]
            rows = mx.array(sound).astype(self.compute_dtype)
            return self.embed_audio(self.audio_tower(rows) if "audio_tower" in self else rows)
        encoder = self["vision_tower" if "vision_tower" in self else "vision_embedder"]
        return self.embed_vision(encoder(data["patches"], data["positions"], self.compute_dtype))

    def forward(self, inputs: Embedded, caches: Caches, last_only: bool = False) -> mx.array:
        """As every model's; of the last token alone, layers without KV compute no other."""
        x, per_layer, media = inputs
        own = None if per_layer is None else self.model.per_layer_inputs(x, per_layer)
        x = self.through_layers(x, own, caches, media, last_only=last_only)
        return self.model.norm(x[:, -1:] if last_only else x)


def remap(weights: Mapping[str, mx.array], config: Config) -> tuple[dict[str, mx.array], list[str]]:
    """Hugging Face names -> ours: the language model's prefix is taken off.

    Returns:
        The weights, and the names left out: of encoders without a config, rotary frequencies, and
        what layers that read another's KV would have needed for their own.
    """
    n_layers, n_shared = config.num_hidden_layers, config.num_kv_shared_layers
    text, skipped = tensor_names.language_model(
        weights, config, readers=range(n_layers - n_shared, n_layers)
    )
    text, unused = vit_names(text, config.vision)
    text, unused_audio = audio_names(text, config.audio)
    kept: dict[str, mx.array] = {}
    for name, array in text.items():
        kept |= _experts(name, array)
    return kept, skipped + unused + unused_audio


def _experts(name: str, array: mx.array) -> dict[str, mx.array]:
    """Hugging Face's fused experts under mlx-lm's names; everything else as it is."""
    if name.endswith(".experts.down_proj"):
        return {name.replace(".down_proj", ".switch_glu.down_proj.weight"): array}
    if not name.endswith(".experts.gate_up_proj"):
        return {name: array}
    gate, up = mx.split(array, 2, axis=1)  # [E, 2 out, in]: the gates' rows, then the others
    stem = name.removesuffix("gate_up_proj") + "switch_glu."
    return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
