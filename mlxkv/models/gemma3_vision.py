"""Gemma 3's encoder of pictures: SigLIP, and the projector of its patches.

Reference: transformers `modeling_siglip.py` and `modeling_gemma3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.models.gemma_vision import Layers
from mlxkv.models.gemma_vision_config import SiglipConfig
from mlxkv.nn.encoder_attention import attend_all
from mlxkv.nn.layers import (
    ACTIVATIONS,
    Fusing,
    OffsetRMSNorm,
    compiled,
    merge_heads,
    residual,
    split_heads,
)
from mlxkv.nn.linear import Embedding, Linear


class PatchEmbedding(nn.Module):
    """A product with each square of pixels: a convolution whose stride is its size.

    The weight is `[E, P, P, 3]`.
    """

    def __init__(self, config: SiglipConfig):
        super().__init__()
        E, P = config.hidden_size, config.patch_size
        self._side, self._patch = config.patches_per_side, P
        self.weight = mx.zeros((E, P, P, 3))
        self.bias = mx.zeros((E,))

    def __call__(self, pixels: mx.array) -> mx.array:
        """`[1, patches, E]` of pixels `[H, W, 3]`."""
        n, P = self._side, self._patch
        squares = pixels[: n * P, : n * P].reshape(n, P, n, P, 3).swapaxes(1, 2)
        weight = self["weight"].flatten(1)
        return mx.addmm(self["bias"], squares.reshape(1, n * n, -1), weight.T)


class SiglipEmbeddings(nn.Module):
    """Patches and their positions."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self._n = config.patches_per_side**2
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = Embedding(self._n, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self["patch_embedding"](pixels) + self["position_embedding"](mx.arange(self._n))


class SiglipAttention(Fusing):
    """Attention among all patches of a picture."""

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: SiglipConfig):
        super().__init__()
        E, self._n_heads = config.hidden_size, config.num_attention_heads
        self._scale = (E // self._n_heads) ** -0.5
        for name in (*self.fusions["qkv_proj"], "out_proj"):
            self[name] = Linear(E, E)

    def __call__(self, x: mx.array) -> mx.array:
        heads = split_heads(self.project("qkv_proj", x), 3 * self._n_heads)
        q, k, v = mx.split(heads, 3, axis=1)
        return self["out_proj"](merge_heads(attend_all(q, k, v, self._scale)))


class SiglipMLP(nn.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self._activation = compiled(ACTIVATIONS[config.hidden_act])

    def __call__(self, x: mx.array) -> mx.array:
        return self["fc2"](self._activation(self["fc1"](x)))


class SiglipLayer(nn.Module):
    """x + attention(norm(x)), and the same with an MLP."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = residual(x, self["self_attn"](self["layer_norm1"](x)))
        return residual(x, self["mlp"](self["layer_norm2"](x)))


class Siglip(nn.Module):
    """Gemma 3's encoder."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = Layers([SiglipLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        """`[1, patches, E]` of normalised pixels `[H, W, 3]`."""
        x = self["embeddings"](pixels)
        for layer in self["encoder"].layers:
            x = layer(x)
        return self["post_layernorm"](x)


class SiglipTower(nn.Module):
    """What the checkpoint calls `vision_tower`."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.vision_model = Siglip(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self["vision_model"](pixels)


class Projector(nn.Module):
    """Means of squares of patches, as rows of the language model."""

    def __init__(self, config: SiglipConfig, text_size: int):
        super().__init__()
        self._side = config.tokens_per_side
        self.mm_input_projection_weight = mx.zeros((config.hidden_size, text_size))
        self.mm_soft_emb_norm = OffsetRMSNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        """`[tokens, E]` of the encoder's output `[1, patches, hidden_size]`."""
        n, E = self._side, x.shape[-1]
        k = round(x.shape[1] ** 0.5) // n
        squares = x.reshape(n, k, n, k, E).astype(mx.float32)
        means = squares.mean(axis=(1, 3)).reshape(n * n, E).astype(x.dtype)
        return self["mm_soft_emb_norm"](means) @ self["mm_input_projection_weight"]


def siglip_names(weights: Mapping[str, mx.array]) -> tuple[dict[str, mx.array], list[str]]:
    """Gemma 3's tensors under the names of published checkpoints, and the names left out.

    transformers 5 writes the tower's without `vision_model`. What makes one vector of a picture is
    left out. PyTorch has a convolution's channels second, MLX last.
    """
    kept: dict[str, mx.array] = {}
    skipped: list[str] = []
    for name, array in weights.items():
        if not name.startswith("vision_tower."):
            kept[name] = array
            continue
        inner = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        if inner.startswith("head.") or inner.endswith("position_ids"):
            skipped.append(name)
            continue
        if inner.endswith("patch_embedding.weight") and array.ndim == 4 and array.shape[-1] != 3:
            array = array.transpose(0, 2, 3, 1)
        kept[f"vision_tower.vision_model.{inner}"] = array
    return kept, skipped
