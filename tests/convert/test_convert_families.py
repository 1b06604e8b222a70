"""Every family through the converter: what is packed reads back as the values it was packed from.

One entry of `FAMILIES` is one tiny checkpoint with the sizes that every format can pack. Its
tensors are those of the model's own definition, so nothing else has to be said about it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxkv
from mlxkv.convert import convert
from mlxkv.convert.open import open_source
from mlxkv.convert.quality.reference import dense_model, recording
from mlxkv.convert.quantization import must_stay_precise
from mlxkv.models import family_for
from tests.support import tiny

MODES = {"affine4": 32, "affine8": 32, "mxfp4": None, "mxfp8": None, "nvfp4": None}
"""`--quantize` -> `--group-size`."""

# Both sides compute in float32 on the same values, a packed product in another order of sums.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Family:
    """One tiny checkpoint.

    Args:
        config: in the hub style.
        precise: matrices that are never packed, by the end of their module's name.
        norm_mean: see `tiny.random_tensor`.
    """

    config: Mapping[str, Any]
    precise: frozenset[str] = frozenset()
    norm_mean: float = 1.0


SIZES = {
    "vocab_size": 96,
    # Its root, which Gemmas scale by, is not a power of two: rounded to bfloat16 it shows.
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float32",
}
GEMMA4 = {
    **SIZES,
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "global_head_dim": 64,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
}
FAMILIES = {
    "gemma": Family({**SIZES, "model_type": "gemma", "hidden_act": "gelu"}, norm_mean=0.0),
    "gemma2": Family(
        {**SIZES, "model_type": "gemma2", "sliding_window": 16, "attn_logit_softcapping": 2.0},
        norm_mean=0.0,
    ),
    "gemma3": Family({**SIZES, "model_type": "gemma3_text", "sliding_window": 16}, norm_mean=0.0),
    "gemma3n": Family(
        {
            **SIZES,
            "model_type": "gemma3n_text",
            "intermediate_size": [128, 128, 64, 64],
            "activation_sparsity_pattern": [0.7, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 16,
            "laurel_rank": 32,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1e6,
        },
        # Small, and each acts on every residual stream.
        frozenset(
            {
                *(f"altup_projections.{i}" for i in range(3)),
                *(f"altup_unembed_projections.{i}" for i in range(3)),
                *(f"altup.{n}" for n in ("correction_coefs", "prediction_coefs")),
                "altup.modality_router",
                "laurel.linear_left",
                "laurel.linear_right",
            }
        ),
    ),
    "gemma4-dense": Family(
        {
            **GEMMA4,
            "final_logit_softcapping": 8.0,
        },
        norm_mean=0.5,
    ),
    "gemma4-e2b": Family(
        {
            **SIZES,
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 96,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "sliding_window": 16,
            "global_head_dim": 64,
        },
        norm_mean=0.5,
    ),
    "gemma4-moe": Family(
        {
            **GEMMA4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
        frozenset({"router.proj"}),
        norm_mean=0.5,
    ),
    "glm4": Family(
        {**SIZES, "model_type": "glm4", "attention_bias": True, "partial_rotary_factor": 0.5}
    ),
    "glm4-moe": Family(
        {**SIZES, **EXPERTS, "model_type": "glm4_moe", "use_qk_norm": True, "rope_theta": 1e4},
        frozenset({"mlp.gate"}),
    ),
    "glm4-moe-lite": Family(
        {
            **SIZES,
            **EXPERTS,
            "model_type": "glm4_moe_lite",
            "q_lora_rank": 32,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "rope_theta": 1e4,
        },
        frozenset({"mlp.gate"}),
    ),
    "glm-moe-dsa": Family(
        {
            **SIZES,
            **EXPERTS,
            "model_type": "glm_moe_dsa",
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "index_head_dim": 32,
            "index_n_heads": 16,
            "index_topk": 8,
            "rope_theta": 1e4,
        },
        frozenset({"mlp.gate"}),
    ),
    "gpt-oss": Family(
        {
            **SIZES,
            "model_type": "gpt_oss",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
        },
        frozenset(
            {
                "mlp.router",
                *(f"mlp.experts.{part}_proj.bias" for part in ("gate", "up", "down")),
            }
        ),
    ),
}


def weights_of(family: Family) -> dict[str, np.ndarray]:
    """Random tensors, as the model's definition names them."""
    definition = family_for(family.config, "config.json")
    model = definition.build(definition.config(family.config, "config.json"))
    parameters: dict[str, Any] = dict(tree_flatten(model.parameters()))
    shapes = {name: array.shape for name, array in parameters.items()}
    return tiny.random_weights(shapes, 0, family.norm_mean)


def logits(folder: Path) -> np.ndarray:
    return np.array(mlxkv.load_model(folder, dtype=mx.float32)(mx.array([tiny.tokens(40)])))[0]


def end_of(name: str) -> str:
    """A module's name without its layer."""
    module = name.removesuffix(".weight").removeprefix("model.")
    return module.split(".", 2)[2] if module.startswith("layers.") else module


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_weights_compute_what_their_unpacked_values_do(tmp_path: Path, name: str, mode: str):
    family = FAMILIES[name]
    weights = weights_of(family)
    source = tiny.write_checkpoint(tmp_path / "hf", family.config, weights)
    plan = convert(source, tmp_path / "out", quantize=mode, group_size=MODES[mode]).plan

    matrices = [t for t in plan.tensors if len(t.shape) >= 2]
    assert {end_of(t.name) for t in matrices if t.quantization is None} == family.precise
    unpacked: dict[str, Any] = dict(weights)
    for tensor in matrices:
        if (q := tensor.quantization) is not None:
            packed = mx.quantize(mx.array(weights[tensor.name]), q.group_size, q.bits, mode=q.mode)
            unpacked[tensor.name] = mx.dequantize(
                *packed, group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=mx.float32
            )
    expected = logits(tiny.write_checkpoint(tmp_path / "unpacked", family.config, unpacked))
    difference = np.abs(logits(tmp_path / "out") - expected).max() / expected.std()
    assert difference < TOLERANCE
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization"]["bits"] == plan.tensors[0].quantization.bits


@pytest.mark.parametrize("name", FAMILIES)
def test_unpacked_output_has_the_inputs_logits(tmp_path: Path, name: str):
    family = FAMILIES[name]
    source = tiny.write_checkpoint(tmp_path / "hf", family.config, weights_of(family))
    convert(source, tmp_path / "out")
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(source))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_source_as_it_is_measured_has_its_logits_and_shows_its_projections_inputs(
    tmp_path: Path, name: str
):
    """Its projections are not fused, so that each can be changed alone. Then with recorders."""
    family = FAMILIES[name]
    folder = tiny.write_checkpoint(tmp_path / "hf", family.config, weights_of(family))
    model = dense_model(open_source(folder, text_only=True))
    tokens, expected = mx.array([tiny.tokens(40)]), logits(folder)
    np.testing.assert_allclose(np.array(model(tokens))[0], expected, atol=2e-5 * expected.std())
    linear = [
        path
        for path, module in model.weights_root().named_modules()
        if isinstance(module, nn.Linear) and not must_stay_precise(f"{path}.weight", (1, 1))
    ]
    with recording(model, linear, full=False) as recorders:
        found = np.array(model(tokens))[0]
    np.testing.assert_allclose(found, expected, atol=2e-5 * expected.std())
    unseen = {end_of(path) for path, each in recorders.items() if each.mean() is None}
    assert unseen == set()
