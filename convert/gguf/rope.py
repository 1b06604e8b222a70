"""RoPE scaling of a GGUF file as a Hugging Face `rope_scaling`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxkv.errors import CheckpointError

from .file import GGUFFile, GGUFTensor, dequantize

if TYPE_CHECKING:
    from .metadata import Metadata

ROPE_FACTORS = "rope_freqs.weight"
"""A tensor that becomes part of the config."""
# The contexts that Llama 3.1 and its descendants were pretrained with.
_ORIGINAL_CONTEXTS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)
_LOW, _HIGH = 1.0, 4.0


def linear_or_yarn(m: Metadata) -> dict[str, Any] | None:
    """The scaling of the metadata; None for none.

    Raises:
        ConfigError: a kind that is not understood, or values missing.
    """
    kind = m.any("rope.scaling.type")
    factor = m.opt_number("rope.scaling.factor")
    legacy = m.opt_number("rope.scale_linear")
    original = m.opt_int("rope.scaling.original_context_length")
    attention = m.opt_number("rope.scaling.attn_factor")
    m.ignore("rope.scaling.finetuned")
    if kind is None:
        factor = factor or legacy
        kind = "linear" if factor and factor != 1.0 else "none"
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise m.error("rope.scaling.type", f"must be none, linear or yarn; got {kind!r}")
    if not factor or factor <= 0:
        raise m.error("rope.scaling.factor", f"must be positive; got {factor!r}")
    if kind == "linear":
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if attention not in (None, 1.0):
        raise m.error("rope.scaling.attn_factor", f"is not understood; got {attention!r}")
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if original:
        scaling["original_max_position_embeddings"] = original
    betas = {key: m.opt_number(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
    return scaling | {key: value for key, value in betas.items() if value is not None}


def scaling_from_factors(
    file: GGUFFile, tensor: GGUFTensor, theta: float, head_dim: int, context: int
) -> dict[str, Any]:
    """`rope_freqs.weight` (a divisor of each frequency) as a `rope_scaling`.

    llama.cpp computes these from Llama 3.1's four numbers: those of published models are tried.
    Other factors become a `longrope` that does not depend on the length.

    Raises:
        CheckpointError: not one positive number for each pair of a head.
    """
    if tensor.shape != (head_dim // 2,) or tensor.type != "F32":
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight must hold {head_dim // 2} F32 values; got "
            f"{list(tensor.shape)} of type {tensor.type}"
        )
    factors = dequantize(file.read_rows(tensor, 0, 1), tensor.type).ravel().astype(np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CheckpointError(f"{file.path}: rope_freqs.weight must be positive: damaged")
    factor = round(float(factors.max()), 4)
    for original in _ORIGINAL_CONTEXTS:
        if np.allclose(llama3_factors(theta, head_dim, factor, original), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    values = [float(value) for value in factors]
    return {
        "rope_type": "longrope",
        "short_factor": values,
        "long_factor": values,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def llama3_factors(theta: float, head_dim: int, factor: float, original: int) -> np.ndarray:
    """Llama 3.1's divisor of each frequency, `[head_dim / 2]`: 1 for wavelengths that fit `_HIGH`
    times into the original context, `factor` for those that do not fit `_LOW` times."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    ramp = np.clip((original / wavelengths - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
    return 1.0 / ((1 - ramp) / factor + ramp)
