"""Files of encoders as llama.cpp's converter makes them, under the names of the gguf package's map.

Independent of `mlxkv.convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, get_tensor_name_map

from tests.support.gguf_files import write_gguf

SUFFIXES = (".weight", ".bias", ".input_max", ".input_min", ".output_max", ".output_min")


def keys(vision: Mapping[str, Any], text_size: int, kind: str) -> dict[str, Any]:
    """The metadata of encoders of pictures."""
    name = "projector_type" if kind == "gemma3" else "vision.projector_type"
    middle = 0.5 if kind == "gemma3" else 0.0
    return {
        "general.type": "mmproj",
        name: kind,
        "has_vision_encoder": True,
        "use_gelu": True,
        "vision.projection_dim": text_size,
        "vision.image_size": vision.get("image_size", 224),
        "vision.patch_size": vision["patch_size"],
        "vision.embedding_length": vision["hidden_size"],
        "vision.feed_forward_length": vision["intermediate_size"],
        "vision.block_count": vision["num_hidden_layers"],
        "vision.attention.head_count": vision["num_attention_heads"],
        "vision.attention.layer_norm_epsilon": 1e-6,
        "vision.image_mean": [middle] * 3,
        "vision.image_std": [0.5 if kind == "gemma3" else 1.0] * 3,
    }


def gemma3_tensors(weights: Mapping[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """SigLIP and its projector: one norm gets 1 added."""
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, n_layers)
    found = {}
    for name, array in weights.items():
        theirs = name.replace("_weight", ".weight")
        if "soft_emb_norm" in theirs:
            array = array + np.float32(1)
        found[names.get_name(theirs, SUFFIXES)] = array
    return found


def write_mmproj(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    kind_of: Callable[[str], str] = lambda name: "F32",
) -> Path:
    assert None not in tensors, "the gguf package does not map a tensor"
    return write_gguf(path, tensors, "clip", metadata, kind_of)
