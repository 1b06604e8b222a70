"""Qwen3-Next and Qwen3.5 as GGUF files, told after llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def keys(c: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that only these architectures have."""
    if "linear_num_key_heads" not in c:
        return {}
    n, D = c["linear_num_value_heads"], c["linear_value_head_dim"]
    return {
        "ssm.conv_kernel": c["linear_conv_kernel_dim"],
        "ssm.state_size": c["linear_key_head_dim"],
        "ssm.group_count": c["linear_num_key_heads"],
        "ssm.time_step_rank": n,
        "ssm.inner_size": n * D,
        "full_attention_interval": c.get("full_attention_interval", 4),
        "rope.dimension_count": c["head_dim"] // 4,
        "expert_shared_feed_forward_length": c.get("shared_expert_intermediate_size"),
    }


def changed(c: Mapping[str, Any], name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """One tensor as the file has it, under names that the gguf package maps."""
    if c["model_type"] == "qwen3_next":
        if "in_proj_qkvz" in name:
            return _in_parts(c, name, array)
    elif "linear_attn." in name:
        array = _tiled(c, name, array)
    if name.endswith(".A_log"):
        array = -np.exp(array)
    elif name.endswith(".dt_bias"):
        name = name.replace(".dt_bias", ".dt_proj.bias")
    elif "conv1d" in name:
        array = array.squeeze(1)
    elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        array = array + np.float32(1)
    elif name.endswith("experts.gate_up_proj"):
        return _experts(name, array)
    elif name.endswith("experts.down_proj"):
        name += ".weight"
    return {name: array}


def _experts(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    gate, up = np.split(array, 2, axis=1)
    stem = name.removesuffix("gate_up_proj")
    return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}


def _in_parts(c: Mapping[str, Any], name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Queries, keys and values of all heads behind each other, and the gates apart."""
    H, Dk = c["linear_num_key_heads"], c["linear_key_head_dim"]
    wide = c["linear_num_value_heads"] // H * c["linear_value_head_dim"]
    groups = array.reshape(H, 2 * (Dk + wide), -1)
    parts = np.split(groups, [Dk, 2 * Dk, 2 * Dk + wide], axis=1)
    q, k, v, z = (part.reshape(-1, array.shape[1]) for part in parts)
    return {
        name.replace("qkvz", "qkv"): np.concatenate([q, k, v]),
        name.replace("qkvz", "z"): z,
    }


def _tiled(c: Mapping[str, Any], name: str, array: np.ndarray) -> np.ndarray:
    """Value heads: the first of each key head, then the second of each."""
    H, n, D = (c[f"linear_{k}"] for k in ("num_key_heads", "num_value_heads", "value_head_dim"))
    n_keys = 2 * H * c["linear_key_head_dim"]

    def heads(rows: np.ndarray, size: int) -> np.ndarray:
        return rows.reshape(H, n // H, size, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    if "in_proj_qkv" in name or "conv1d" in name:
        return np.concatenate([array[:n_keys], heads(array[n_keys:], D)])
    if "in_proj_z" in name:
        return heads(array, D)
    if "out_proj" in name:
        return heads(array.T, D).T
    return array if "norm" in name else heads(array, 1)
