"""Qwen3-Next's and Qwen3.5's tensors -> our names and layouts, which are mlx-lm's.

Hugging Face's releases store norms as their difference from 1, and a convolution's taps last;
mlx-community's store the norms' factors, and taps before a last axis of 1. The taps tell which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.core as mx

from mlxkv.checkpoint.expert_stacks import stack_experts
from mlxkv.checkpoint.tensor_names import Remapped, language_model, text_name
from mlxkv.errors import WeightsError

NEXT_TOKEN = "mtp."
"""How the names of the layer that predicts the token after next begin."""
_OFFSET_NORM = re.compile(
    r"(\.(input_layernorm|post_attention_layernorm|q_norm|k_norm)|^(model|mtp)\.norm|"
    r"^mtp\.pre_fc_norm_(embedding|hidden))\.weight$"
)
_EXPERTS = re.compile(r"^(.*\.mlp)\.experts\.(gate_up_proj|down_proj)$")
_TAPS = ".conv1d.weight"


def hybrid_names(weights: Mapping[str, mx.array], keeps_mtp: bool) -> Remapped:
    """The text model's weights; the names left out: encoders, and the layer `NEXT_TOKEN`.

    Args:
        weights: of a checkpoint of text alone or not.
        keeps_mtp: whether that layer is kept.

    Raises:
        WeightsError: an expert is missing, or of another shape than the first.
    """
    of_mtp = [name for name in weights if text_name(name).startswith(NEXT_TOKEN)]
    rest = {name: array for name, array in weights.items() if name not in set(of_mtp)}
    kept, skipped = language_model(rest)
    if keeps_mtp:
        kept |= {text_name(name): weights[name] for name in of_mtp}
        of_mtp = []
    is_original = any(_is_original(name, array) for name, array in kept.items())
    found: dict[str, mx.array] = {}
    for name, array in kept.items():
        if match := _EXPERTS.match(name):
            found |= _split(name, array, *match.groups())
        elif _is_original(name, array):
            found[name] = array.swapaxes(1, 2)
        elif is_original and _OFFSET_NORM.search(name):
            # In float32: a 16-bit sum would lose digits.
            found[name] = array.astype(mx.float32) + 1.0
        else:
            found[name] = array
    return stack_experts(found), skipped + of_mtp


def _is_original(name: str, array: mx.array) -> bool:
    """Whether it is a convolution as Hugging Face stores it, `[C, 1, taps]`."""
    return name.endswith(_TAPS) and array.ndim == 3 and array.shape[-1] != 1


def _split(name: str, array: mx.array, mlp: str, part: str) -> dict[str, mx.array]:
    """The experts of a layer, gate and up apart: they are the halves of the rows."""
    if array.ndim != 3 or (part == "gate_up_proj" and array.shape[1] % 2):
        raise WeightsError(f"{name} is {list(array.shape)}; it must be [experts, rows, columns]")
    if part == "down_proj":
        return {f"{mlp}.switch_mlp.down_proj.weight": array}
    half = array.shape[1] // 2
    return {
        f"{mlp}.switch_mlp.gate_proj.weight": array[:, :half],
        f"{mlp}.switch_mlp.up_proj.weight": array[:, half:],
    }
