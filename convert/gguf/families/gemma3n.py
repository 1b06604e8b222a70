"""Gemma 3n: several residual streams, embeddings per layer, layers that read another's KV."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mlxkv.errors import WeightsError

from ..architecture import Architecture, Config, Rows, Tensors
from ..file import GGUFTensor
from ..metadata import Metadata, short_number
from .common import grouped, theta
from .gemma import FOUR_NORMS
from .gemma4 import FULL, PER_LAYER, PER_LAYER_TOP, SLIDING, reads_anothers_kv

_STACKS = {
    "altup_proj.weight": "model.altup_projections",
    "altup_unembd_proj.weight": "model.altup_unembed_projections",
}


def gemma3n_config(m: Metadata, tensors: Tensors) -> Config:
    n_layers = m.int("block_count")
    wide = m.each("feed_forward_length", n_layers)
    slides = m.each("attention.sliding_window_pattern", n_layers)
    config = grouped(m, tensors, feed_forward=max(wide))
    own = tensors.get("per_layer_token_embd.weight")
    rank = tensors.get("blk.0.laurel_l.weight")
    if own is None or rank is None:
        name = "per_layer_token_embd" if own is None else "blk.0.laurel_l"
        raise WeightsError(f"{m.file.path}: the matrix '{name}.weight' is missing")
    return {
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        **config,
        "intermediate_size": wide,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": [SLIDING if slide else FULL for slide in slides],
        "sliding_window": m.int("attention.sliding_window"),
        "num_kv_shared_layers": m.opt_int("attention.shared_kv_layers") or 0,
        "hidden_size_per_layer_input": m.int("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": own.shape[0],
        "laurel_rank": rank.shape[0],
        "altup_active_idx": m.opt_int("altup.active_idx") or 0,
        "altup_num_inputs": m.int("altup.num_inputs", 4),
        "altup_correct_scale": "blk.0.altup_correct_scale.weight" in tensors,
        "activation_sparsity_pattern": _sparsity(m, n_layers),
        "final_logit_softcapping": short_number(m.number("final_logit_softcapping", 30.0)),
        "rope_theta": theta(m, 1_000_000.0),
        "rope_local_base_freq": short_number(m.number("rope.freq_base_swa", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
    }


def _sparsity(m: Metadata, n_layers: int) -> list[float]:
    """Shares of activations that are cut off; the file has the deviations they lie at."""
    key = "activation_sparsity_scale"
    values = m.any(key)
    if values is None:
        return [0.0] * n_layers
    if not isinstance(values, np.ndarray) or len(values) != n_layers or values.dtype.kind != "f":
        raise m.error(key, f"must be {n_layers} numbers")
    shares = [0.5 * (1 + math.erf(value / math.sqrt(2))) for value in values.tolist()]
    if not all(0 <= share < 1 for share in shares):
        raise m.error(key, f"must be finite, or below all numbers; got {values[:8].tolist()}")
    return [round(share, 6) for share in shares]


def _parts(tensor: GGUFTensor) -> Mapping[str, Rows]:
    """A stack of square matrices, of one each."""
    name = _STACKS.get(tensor.name)
    if name is None or len(tensor.shape) != 3:
        return {}
    n, rows, columns = tensor.shape
    return {f"{name}.{i}.weight": Rows((rows, columns), i * rows, rows, rows) for i in range(n)}


GEMMA3N = Architecture(
    gemma3n_config,
    {
        **FOUR_NORMS,
        **PER_LAYER,
        "altup_correct_coef": "altup.correction_coefs",
        "altup_predict_coef": "altup.prediction_coefs",
        "altup_router": "altup.modality_router",
        "altup_router_norm": "altup.router_norm",
        "altup_correct_scale.weight": "altup.correct_output_scale",
        "laurel_l": "laurel.linear_left",
        "laurel_r": "laurel.linear_right",
        "laurel_post_norm": "laurel.post_laurel_norm",
    },
    "bfloat16",
    top_names=PER_LAYER_TOP,
    unused=reads_anothers_kv,
    parts=_parts,
)
