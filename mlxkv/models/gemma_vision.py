"""Gemma 4's encoders of pictures: a ViT, and what 12B has in its place.

Reference: transformers `modeling_gemma4.py` and `modeling_gemma4_unified.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlxkv.models.gemma_audio_config import Gemma4Audio, RawAudio
from mlxkv.models.gemma_vision_config import EmbedderConfig, VitConfig
from mlxkv.nn.encoder_attention import attend_all
from mlxkv.nn.layers import (
    Fusing,
    NormedHeads,
    RMSNorm,
    compiled,
    gated,
    merge_heads,
    on_halves,
    residual,
)
from mlxkv.nn.linear import Linear

BOUNDS = ("input_min", "input_max", "output_min", "output_max")


class Layers(nn.Module):
    """What the checkpoint calls `encoder`."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = list(layers)


class ClippableLinear(nn.Module):
    """x W^T, both x and the result clipped to the bounds that the checkpoint has, if it has any.

    The bounds are of all values or, of the result, one for each.
    """

    def __init__(self, input_dims: int, output_dims: int, clipped: bool):
        super().__init__()
        self.linear = Linear(input_dims, output_dims, bias=False)
        if clipped:
            for name in BOUNDS:
                self[name] = mx.array(float("-inf" if name.endswith("min") else "inf"))

    def __call__(self, x: mx.array) -> mx.array:
        if "input_min" not in self:
            return self["linear"](x)
        x = self["linear"](_clipped(x, self["input_min"], self["input_max"]))
        return _clipped(x, self["output_min"], self["output_max"])


@compiled
def _clipped(x: mx.array, low: mx.array, high: mx.array) -> mx.array:
    return mx.minimum(mx.maximum(x, low), high)


class Clipping(Fusing):
    """`Fusing` of clippable linears, where they clip what they get alike."""

    def joined(self, parts: Sequence[nn.Module]) -> nn.Module | None:
        linear = super().joined([part["linear"] for part in parts])
        clipped = "input_min" in parts[0]
        if linear is None or (clipped and not _clip_alike(parts)):
            return None
        whole = ClippableLinear.__new__(ClippableLinear)
        nn.Module.__init__(whole)
        whole["linear"] = linear
        if clipped:
            for name in BOUNDS[:2]:
                whole[name] = parts[0][name]
            for name in BOUNDS[2:]:
                whole[name] = mx.concatenate([_of_each_row(part, name) for part in parts])
        return whole


def _clip_alike(parts: Sequence[nn.Module]) -> bool:
    return all(
        mx.array_equal(part[name], parts[0][name]).item()
        for part in parts[1:]
        for name in BOUNDS[:2]
    )


def _of_each_row(part: nn.Module, name: str) -> mx.array:
    return mx.broadcast_to(part[name], (part["linear"]["weight"].shape[0],))


class VitAttention(Clipping, NormedHeads):
    """Attention among all patches of a picture, which turns one half of each head by x, one by y.

    Queries, keys and, without a weight, values are normed; that replaces the scale.
    """

    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, config: VitConfig):
        super().__init__()
        c, E, D = config, config.hidden_size, config.head_dim
        self.n_heads, self.n_kv_heads, self.head_dim = (
            c.num_attention_heads,
            c.num_key_value_heads,
            D,
        )
        self._eps, self._theta = c.rms_norm_eps, c.rope_theta
        self.q_proj = ClippableLinear(E, self.n_heads * D, c.use_clipped_linears)
        self.k_proj = ClippableLinear(E, self.n_kv_heads * D, c.use_clipped_linears)
        self.v_proj = ClippableLinear(E, self.n_kv_heads * D, c.use_clipped_linears)
        self.o_proj = ClippableLinear(self.n_heads * D, E, c.use_clipped_linears)
        self.q_norm = RMSNorm(D, c.rms_norm_eps)
        self.k_norm = RMSNorm(D, c.rms_norm_eps)

    def __call__(self, x: mx.array, positions: mx.array) -> mx.array:
        H, Hk = self.n_heads, self.n_kv_heads
        heads = self.project("qkv_proj", x).reshape(*x.shape[:-1], -1, self.head_dim)
        qk, plain = self.normed(heads, self._eps)  # [1, L, H + Hk, D], [1, L, H + 2 Hk, D]
        qk = self._turned(qk, positions)
        v = plain[:, :, -Hk:].transpose(0, 2, 1, 3)
        return self["o_proj"](merge_heads(attend_all(qk[:, :H], qk[:, H:], v, 1.0)))

    def _turned(self, heads: mx.array, positions: mx.array) -> mx.array:
        """Heads `[1, L, N, D]` turned by positions `[L, 2]`: `[1, N, L, D]`."""
        _, L, N, D = heads.shape
        # Each half of each patch as a sequence of one token.
        halves = heads.reshape(L, N, 2, D // 2).swapaxes(1, 2).reshape(2 * L, N, 1, D // 2)
        turned = mx.fast.rope(
            halves,
            D // 2,
            traditional=False,
            base=self._theta,
            scale=1.0,
            offset=positions.flatten(),
        )
        return turned.reshape(L, 2, N, D // 2).transpose(2, 0, 1, 3).reshape(1, N, L, D)


class VitMLP(Clipping):
    """down(activation(gate(x)) * up(x))."""

    fusions: ClassVar = {"gate_up_proj": ("gate_proj", "up_proj")}

    def __init__(self, config: VitConfig):
        super().__init__()
        E, wide, clipped = config.hidden_size, config.intermediate_size, config.use_clipped_linears
        self.gate_proj = ClippableLinear(E, wide, clipped)
        self.up_proj = ClippableLinear(E, wide, clipped)
        self.down_proj = ClippableLinear(wide, E, clipped)
        self._gated = gated(config.hidden_activation)

    def __call__(self, x: mx.array) -> mx.array:
        return self["down_proj"](on_halves(self._gated, self.project("gate_up_proj", x)))


class VitLayer(nn.Module):
    """x + norm(attention(norm(x))), and the same with the MLP."""

    def __init__(self, config: VitConfig):
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = VitAttention(config)
        self.mlp = VitMLP(config)
        self.input_layernorm = RMSNorm(E, eps)
        self.post_attention_layernorm = RMSNorm(E, eps)
        self.pre_feedforward_layernorm = RMSNorm(E, eps)
        self.post_feedforward_layernorm = RMSNorm(E, eps)

    def __call__(self, x: mx.array, positions: mx.array) -> mx.array:
        r = self["self_attn"](self["input_layernorm"](x), positions)
        x = residual(x, self["post_attention_layernorm"](r))
        r = self["mlp"](self["pre_feedforward_layernorm"](x))
        return residual(x, self["post_feedforward_layernorm"](r))


class PatchEmbedder(nn.Module):
    """A product with each patch, and a vector for its column and one for its row."""

    def __init__(self, config: VitConfig):
        super().__init__()
        E = config.hidden_size
        self.input_proj = Linear(3 * config.patch_size**2, E, bias=False)
        self.position_embedding_table = mx.zeros((2, config.position_embedding_size, E))

    def __call__(self, patches: mx.array, positions: mx.array) -> mx.array:
        x, y = self["position_embedding_table"]
        return self["input_proj"](patches) + (x[positions[:, 0]] + y[positions[:, 1]])


class VitTower(nn.Module):
    """Gemma 4's encoder: patches to rows, each the mean of a square of patches."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self._pool = config.pooling_kernel_size
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = Layers([VitLayer(config) for _ in range(config.num_hidden_layers)])
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))

    def __call__(self, patches: mx.array, positions: mx.array, dtype: mx.Dtype) -> mx.array:
        """Rows `[n, hidden_size]`.

        Args:
            patches: `[patches, values]`, from 0 to 1.
            positions: int32 `[patches, 2]`: the column and the row of each.
            dtype: of the computation.
        """
        x = self["patch_embedder"]((2 * (patches - 0.5)).astype(dtype)[None], positions)
        for layer in self["encoder"].layers:
            x = layer(x, positions)
        # The factor leaves float16's range, and the bias brings what it makes back.
        rows = self._pooled(x[0], positions).astype(mx.float32).mean(axis=1) * x.shape[-1] ** 0.5
        if "std_bias" in self:
            rows = (rows - self["std_bias"]) * self["std_scale"]
        return rows.astype(dtype)

    def _pooled(self, x: mx.array, positions: mx.array) -> mx.array:
        """Patches `[L, E]`, those of each square together: `[n, patches of a square, E]`."""
        k = self._pool
        columns = (positions[:, 0].max() + 1) // k
        at, inside = positions // k, positions % k
        square = at[:, 0] + columns * at[:, 1]
        order = mx.argsort(square * (k * k) + inside[:, 1] * k + inside[:, 0])
        return x[order].reshape(-1, k * k, x.shape[-1])


class VisionEmbedder(nn.Module):
    """What Gemma 4 12B has in an encoder's place: norms, a product and positions."""

    def __init__(self, config: EmbedderConfig):
        super().__init__()
        E = config.mm_embed_dim
        self.patch_ln1 = nn.LayerNorm(config.patch_dim)
        self.patch_dense = Linear(config.patch_dim, E)
        self.patch_ln2 = nn.LayerNorm(E)
        self.pos_embedding = mx.zeros((config.mm_posemb_size, 2, E))
        self.pos_norm = nn.LayerNorm(E)

    def __call__(self, patches: mx.array, positions: mx.array, dtype: mx.Dtype) -> mx.array:
        """Rows `[patches, E]`; arguments as for `VitTower`."""
        x = self["patch_ln2"](self["patch_dense"](self["patch_ln1"](patches.astype(dtype))))
        table = self["pos_embedding"]
        return self["pos_norm"](x + (table[positions[:, 0], 0] + table[positions[:, 1], 1]))


class RowProjection(nn.Module):
    """Rows of an encoder as rows of the language model: normed without a weight, and a product."""

    def __init__(self, config: VitConfig | EmbedderConfig | Gemma4Audio | RawAudio, text_size: int):
        super().__init__()
        self._eps = config.rms_norm_eps
        self.embedding_projection = Linear(config.projected_size, text_size, bias=False)

    def __call__(self, rows: mx.array) -> mx.array:
        return self["embedding_projection"](mx.fast.rms_norm(rows, None, self._eps))


def vit_names(
    weights: Mapping[str, mx.array], config: VitConfig | EmbedderConfig | None
) -> tuple[dict[str, mx.array], list[str]]:
    """Gemma 4's tensors under the names of published checkpoints, and the names left out.

    Some checkpoints have bounds of linears that do not clip. transformers has a model's names for
    all of 12B's embedder, and writes the published ones.
    """
    clips = isinstance(config, VitConfig) and config.use_clipped_linears
    kept: dict[str, mx.array] = {}
    skipped: list[str] = []
    for name, array in weights.items():
        if name.startswith("vision_tower.") and name.endswith(BOUNDS) and not clips:
            skipped.append(name)
            continue
        name = name.replace("embed_vision.multimodal_embedder.", "embed_vision.", 1)
        if name.startswith(("embed_vision.patch_", "embed_vision.pos_")):
            name = name.replace("embed_vision.", "vision_embedder.", 1)
        kept[name] = array
    return kept, skipped
