"""Gemma 4's language model and its encoder of pictures as llama.cpp's converter writes them.

Names are those of the gguf package's map; independent of `mlxkv.convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, get_tensor_name_map

from tests.support.gguf_files import tokens, write_gguf
from tests.support.mmproj_files import SUFFIXES

SLIDING = "sliding_attention"


def keys(text: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a language model whose config is in the hub style, with a number for each
    layer where the layers differ."""
    slides = [kind == SLIDING for kind in text["layer_types"]]
    n, n_shared, wide = len(slides), text["num_kv_shared_layers"], text["intermediate_size"]
    full_kv = text.get("num_global_key_value_heads") or text["num_key_value_heads"]
    return {
        "context_length": text["max_position_embeddings"],
        "embedding_length": text["hidden_size"],
        "embedding_length_per_layer_input": text["hidden_size_per_layer_input"],
        "block_count": n,
        "feed_forward_length": [wide if i < n - n_shared else 2 * wide for i in range(n)],
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": [text["num_key_value_heads"] if s else full_kv for s in slides],
        "attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "attention.key_length": text["global_head_dim"],
        "attention.value_length": text["global_head_dim"],
        "attention.key_length_swa": text["head_dim"],
        "attention.value_length_swa": text["head_dim"],
        "attention.sliding_window": text["sliding_window"],
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": n_shared,
        "rope.dimension_count": text["global_head_dim"],
        "rope.dimension_count_swa": text["head_dim"],
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "final_logit_softcapping": text["final_logit_softcapping"],
    }


def language_tensors(
    text: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A checkpoint's arrays, and the factors that keep full layers from turning most of a head."""
    names = get_tensor_name_map(MODEL_ARCH.GEMMA4, text["num_hidden_layers"])
    found = {}
    for name, array in weights.items():
        suffix = ".weight" if name.endswith("layer_scalar") else ""
        found[names.get_name(name + suffix, SUFFIXES)] = array
    pairs = text["global_head_dim"] // 2
    factors = np.where(np.arange(pairs) < pairs // 4, 1.0, 1e30)
    return {**found, "rope_freqs.weight": factors.astype(np.float32)}


def vision_tensors(weights: Mapping[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """The encoder's arrays: patches with their colours first, bounds as vectors of one."""
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, n_layers)
    found = {}
    for name, array in weights.items():
        theirs = name.replace("model.vision_tower.encoder.", "vision_model.model.")
        theirs = theirs.replace(".linear.weight", ".weight")
        if theirs.endswith("input_proj.weight"):
            side = int((array.shape[1] // 3) ** 0.5)
            array = array.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
        if theirs.endswith("position_embedding_table"):
            theirs += ".weight"
        found[names.get_name(theirs, SUFFIXES)] = np.ascontiguousarray(
            array.reshape(array.shape or 1)
        )
    return found


def sound_keys(sound: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that an encoder of sound adds."""
    return {
        "audio.projector_type": "gemma4a",
        "has_audio_encoder": True,
        "audio.num_mel_bins": 128,
        "audio.embedding_length": sound["hidden_size"],
        "audio.feed_forward_length": 4 * sound["hidden_size"],
        "audio.block_count": sound["num_hidden_layers"],
        "audio.attention.head_count": sound["num_attention_heads"],
        "audio.attention.layer_norm_epsilon": 1e-6,
    }


def sound_tensors(weights: Mapping[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """Its arrays: the scale of each dimension as its softplus, kernels by channel as matrices."""
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, n_layers)
    found = {}
    for name, array in weights.items():
        theirs = name.replace("model.audio_tower.", "conformer.").replace(".linear.", ".")
        if theirs.endswith("per_dim_scale"):
            theirs, array = f"{theirs}.weight", np.log1p(np.exp(array))
        if "depthwise_conv1d" in theirs:
            array = array[:, 0]
        array = np.ascontiguousarray(array.reshape(array.shape or 1))
        found[names.get_name(theirs, SUFFIXES)] = array
    return found


def write_language(
    path: Path,
    text: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    kind_of: Callable[[str], str] = lambda name: "F32",
    **changes: Any,
) -> Path:
    tensors = language_tensors(text, weights)
    assert None not in tensors, "the gguf package does not map a tensor"
    metadata = {**keys(text), **tokens(text["vocab_size"]), **changes}
    return write_gguf(path, tensors, "gemma4", metadata, kind_of)
