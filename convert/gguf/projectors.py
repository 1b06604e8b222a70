"""How llama.cpp's files of encoders map to Hugging Face's, one entry for each kind of encoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxkv.errors import WeightsError

from .file import GGUFFile
from .metadata import Metadata, short_number

_LAYER = re.compile(r"[va]\.blk\.(\d+)\.(\w+)\.(\w+)")

Change = tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]
"""Our shape of a tensor, and our values of the file's."""


@dataclass(frozen=True, slots=True)
class Projector:
    """How one kind of encoder maps.

    Attributes:
        model_type: of the whole model's config.
        architecture: of the language model's file.
        section: of the whole model's config.
        tokens: key of the config -> the token whose id it holds.
        names: name in the file -> ours, of single tensors.
        layer: our name of the layers.
        layer_names: name within a block -> name within our layer.
        config: makes the section, and keys for the config's outer level.
        change: of a tensor's name and shape; None where it stays as it is.
        norms_plus_one: names in the file of tensors that are stored with 1 added.
    """

    model_type: str
    architecture: str
    section: str
    tokens: Mapping[str, str]
    names: Mapping[str, str]
    layer: str
    layer_names: Mapping[str, str]
    config: Callable[[Metadata, GGUFFile], tuple[dict[str, Any], dict[str, Any]]]
    change: Callable[[str, tuple[int, ...]], Change | None]
    norms_plus_one: frozenset[str] = frozenset()

    def our_name(self, name: str, swapped: bool) -> str | None:
        """Ours of a tensor; None for one that the encoder does not have."""
        inner = _LAYER.fullmatch(name)
        if inner is None:
            return self.names.get(name)
        layer, module, kind = inner.groups()
        module = _SWAPPED.get(module, module) if swapped else module
        ours = self.layer_names.get(f"{module}.{kind}")
        return None if ours is None else f"{self.layer}.{int(layer)}.{ours}"


_SWAPPED = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}


def has_swapped_mlp(file: GGUFFile) -> bool:
    """Whether `ffn_up` and `ffn_down` are the other way round, as in older files of Gemma 3."""
    up, gate = (file.tensors.get(f"v.blk.0.ffn_{name}.weight") for name in ("up", "gate"))
    hidden = Metadata(file).int("vision.embedding_length")
    return up is not None and gate is None and up.shape[0] == hidden != up.shape[-1]


def _sizes(m: Metadata) -> dict[str, Any]:
    return {
        "hidden_size": m.int("vision.embedding_length"),
        "intermediate_size": m.int("vision.feed_forward_length"),
        "num_hidden_layers": m.int("vision.block_count"),
        "num_attention_heads": m.int("vision.attention.head_count"),
    }


def _check_normalisation(m: Metadata, mean: float, std: float) -> None:
    for key, expected in (("image_mean", mean), ("image_std", std)):
        value = m.any(f"vision.{key}")
        if value is not None and not np.allclose(value, expected):
            raise m.error(f"vision.{key}", f"must be three times {expected}; got {value!r}")


def _gemma3_config(m: Metadata, file: GGUFFile) -> tuple[dict[str, Any], dict[str, Any]]:
    _check_normalisation(m, 0.5, 0.5)
    image, patch = m.int("vision.image_size"), m.int("vision.patch_size")
    side = image // patch // m.int("vision.projector.scale_factor", 4)
    vision = {
        "model_type": "siglip_vision_model",
        **_sizes(m),
        "image_size": image,
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": short_number(m.number("vision.attention.layer_norm_epsilon", 1e-6)),
        "vision_use_head": False,
    }
    return vision, {"mm_tokens_per_image": side**2}


def _gemma3_change(name: str, shape: tuple[int, ...]) -> Change | None:
    if name != "v.patch_embd.weight" or len(shape) != 4:
        return None
    rows, colours, height, width = shape
    return (rows, height, width, colours), lambda values: values.transpose(0, 2, 3, 1)


_SIGLIP = "vision_tower.vision_model"
_GEMMA3 = Projector(
    model_type="gemma3",
    architecture="gemma3",
    section="vision_config",
    tokens={
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
        "image_token_index": "<image_soft_token>",
    },
    names={
        "v.patch_embd.weight": f"{_SIGLIP}.embeddings.patch_embedding.weight",
        "v.patch_embd.bias": f"{_SIGLIP}.embeddings.patch_embedding.bias",
        "v.position_embd.weight": f"{_SIGLIP}.embeddings.position_embedding.weight",
        "v.post_ln.weight": f"{_SIGLIP}.post_layernorm.weight",
        "v.post_ln.bias": f"{_SIGLIP}.post_layernorm.bias",
        "mm.input_projection.weight": "multi_modal_projector.mm_input_projection_weight",
        "mm.soft_emb_norm.weight": "multi_modal_projector.mm_soft_emb_norm.weight",
    },
    layer=f"{_SIGLIP}.encoder.layers",
    layer_names={
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in {
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_out": "self_attn.out_proj",
            "ln1": "layer_norm1",
            "ln2": "layer_norm2",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        }.items()
        for kind in ("weight", "bias")
    },
    config=_gemma3_config,
    change=_gemma3_change,
    norms_plus_one=frozenset({"mm.soft_emb_norm.weight"}),
)


def _gemma4_config(m: Metadata, file: GGUFFile) -> tuple[dict[str, Any], dict[str, Any]]:
    sizes = _sizes(m)
    m.ignore("vision.image_size", "vision.image_mean", "vision.image_std")
    shapes = {}
    for name in ("blk.0.attn_q", "blk.0.attn_k", "patch_embd", "position_embd"):
        tensor = file.tensors.get(f"v.{name}.weight")
        if tensor is None or len(tensor.shape) < 2:
            raise WeightsError(f"{file.path}: the tensor 'v.{name}.weight' is missing")
        shapes[name] = tensor.shape
    head_dim = shapes["blk.0.attn_q"][0] // sizes["num_attention_heads"]
    vision = {
        "model_type": "gemma4_vision",
        **sizes,
        "num_key_value_heads": shapes["blk.0.attn_k"][0] // max(1, head_dim),
        "head_dim": head_dim,
        "patch_size": shapes["patch_embd"][-1],
        "pooling_kernel_size": m.int("vision.projector.scale_factor", 3),
        "position_embedding_size": shapes["position_embd"][-2],
        "rms_norm_eps": short_number(m.number("vision.attention.layer_norm_epsilon", 1e-6)),
        "use_clipped_linears": "v.blk.0.attn_q.input_min" in file.tensors,
        "standardize": "v.std_bias" in file.tensors,
    }
    return vision, {}


def _gemma4_change(name: str, shape: tuple[int, ...]) -> Change | None:
    if name.endswith(_BOUNDS) and shape == (1,):
        return (), lambda values: values.reshape(())
    if name != "v.patch_embd.weight" or len(shape) != 4:
        return None
    rows, colours, height, width = shape
    columns = colours * height * width
    return (rows, columns), lambda values: values.transpose(0, 2, 3, 1).reshape(rows, columns)


_BOUNDS = ("input_min", "input_max", "output_min", "output_max")
_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ln1": "input_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
_GEMMA4 = Projector(
    model_type="gemma4",
    architecture="gemma4",
    section="vision_config",
    tokens={
        "boi_token_id": "<|image>",
        "eoi_token_id": "<image|>",
        "image_token_id": "<|image|>",
    },
    names={
        "v.patch_embd.weight": "vision_tower.patch_embedder.input_proj.weight",
        "v.position_embd.weight": "vision_tower.patch_embedder.position_embedding_table",
        "v.std_bias": "vision_tower.std_bias",
        "v.std_scale": "vision_tower.std_scale",
        "mm.input_projection.weight": "embed_vision.embedding_projection.weight",
    },
    layer="vision_tower.encoder.layers",
    layer_names={
        **{f"{theirs}.weight": f"{ours}.linear.weight" for theirs, ours in _LINEARS.items()},
        **{f"{theirs}.weight": f"{ours}.weight" for theirs, ours in _NORMS.items()},
        **{f"{t}.{bound}": f"{ours}.{bound}" for t, ours in _LINEARS.items() for bound in _BOUNDS},
    },
    config=_gemma4_config,
    change=_gemma4_change,
)


def _gemma4_sound(m: Metadata, file: GGUFFile) -> tuple[dict[str, Any], dict[str, Any]]:
    shapes = {}
    for name in ("conv1d.0", "conv1d.1", "blk.0.conv_dw", "pre_encode.out"):
        tensor = file.tensors.get(f"a.{name}.weight")
        if tensor is None or len(tensor.shape) < 2:
            raise WeightsError(f"{file.path}: the tensor 'a.{name}.weight' is missing")
        shapes[name] = tensor.shape
    sound = {
        "model_type": "gemma4_audio",
        "hidden_size": m.int("audio.embedding_length"),
        "num_hidden_layers": m.int("audio.block_count"),
        "num_attention_heads": m.int("audio.attention.head_count"),
        "subsampling_conv_channels": [shapes["conv1d.0"][0], shapes["conv1d.1"][0]],
        "conv_kernel_size": shapes["blk.0.conv_dw"][-1],
        "output_proj_dims": shapes["pre_encode.out"][0],
        "rms_norm_eps": short_number(m.number("audio.attention.layer_norm_epsilon", 1e-6)),
        "use_clipped_linears": "a.blk.0.attn_q.input_min" in file.tensors,
    }
    return sound, {}


def _sound_change(name: str, shape: tuple[int, ...]) -> Change | None:
    if name.endswith(_BOUNDS) and shape == (1,):
        return (), lambda values: values.reshape(())
    if name.endswith(".per_dim_scale.weight"):
        return shape, _inverse_softplus
    if name.endswith(".conv_dw.weight") and len(shape) == 2:
        return (*shape, 1), lambda values: values[..., None]
    if name.startswith("a.conv1d.") and len(shape) == 4:
        rows, channels, height, width = shape
        return (rows, height, width, channels), lambda values: values.transpose(0, 2, 3, 1)
    return None


def _inverse_softplus(values: np.ndarray) -> np.ndarray:
    """x of log(1 + exp(x)), which the file has in its place."""
    wide = values.astype(np.float64)
    return (wide + np.log(-np.expm1(-wide))).astype(np.float32)


_SOUND_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.post",
    "conv_pw1": "lconv1d.linear_start",
    "conv_pw2": "lconv1d.linear_end",
    "ffn_up": "feed_forward1.ffw_layer_1",
    "ffn_down": "feed_forward1.ffw_layer_2",
    "ffn_up_1": "feed_forward2.ffw_layer_1",
    "ffn_down_1": "feed_forward2.ffw_layer_2",
}
_SOUND_WEIGHTS = {
    "attn_pre_norm": "norm_pre_attn",
    "attn_post_norm": "norm_post_attn",
    "ln2": "norm_out",
    "conv_norm": "lconv1d.pre_layer_norm",
    "norm_conv": "lconv1d.conv_norm",
    "ffn_norm": "feed_forward1.pre_layer_norm",
    "ffn_post_norm": "feed_forward1.post_layer_norm",
    "ffn_norm_1": "feed_forward2.pre_layer_norm",
    "ffn_post_norm_1": "feed_forward2.post_layer_norm",
    "attn_k_rel": "self_attn.relative_k_proj",
    "conv_dw": "lconv1d.depthwise_conv1d",
}
_GEMMA4_SOUND = Projector(
    model_type="gemma4",
    architecture="gemma4",
    section="audio_config",
    tokens={
        "boa_token_id": "<|audio>",
        "eoa_token_id": "<audio|>",
        "audio_token_id": "<|audio|>",
    },
    names={
        **{
            f"a.conv1d.{i}.{kind}weight": (
                f"audio_tower.subsample_conv_projection.layer{i}.{kind or 'conv.'}weight"
            )
            for i in (0, 1)
            for kind in ("", "norm.")
        },
        "a.input_projection.weight": (
            "audio_tower.subsample_conv_projection.input_proj_linear.weight"
        ),
        "a.pre_encode.out.weight": "audio_tower.output_proj.weight",
        "a.pre_encode.out.bias": "audio_tower.output_proj.bias",
        "mm.a.input_projection.weight": "embed_audio.embedding_projection.weight",
    },
    layer="audio_tower.layers",
    layer_names={
        **{f"{theirs}.weight": f"{ours}.linear.weight" for theirs, ours in _SOUND_LINEARS.items()},
        **{f"{theirs}.weight": f"{ours}.weight" for theirs, ours in _SOUND_WEIGHTS.items()},
        **{f"{t}.{b}": f"{ours}.{b}" for t, ours in _SOUND_LINEARS.items() for b in _BOUNDS},
        "per_dim_scale.weight": "self_attn.per_dim_scale",
    },
    config=_gemma4_sound,
    change=_sound_change,
)
PROJECTORS: Mapping[str, Projector] = {"gemma3": _GEMMA3, "gemma4v": _GEMMA4}
"""`clip.vision.projector_type`, or `clip.projector_type` of encoders of pictures alone."""
SOUND: Mapping[str, Projector] = {"gemma4a": _GEMMA4_SOUND}
"""`clip.audio.projector_type`."""
