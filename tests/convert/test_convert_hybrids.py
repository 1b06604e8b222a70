"""Qwen3.5's and Qwen3-Next's layouts: as released, within a multimodal checkpoint, and mlx-lm's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.convert import convert
from mlxkv.errors import ConfigError
from tests.families.test_parity import Golden, check_logits
from tests.support.tiny import write_checkpoint

VISION = {"model_type": "qwen3_5_vision", "hidden_size": 8, "depth": 1}


def multimodal(folder: Path, golden: Golden, **changes: Any) -> Path:
    """A checkpoint with pictures, of which this is the text model, as it is released."""
    outer = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
    config = {
        **outer,
        "text_config": {**golden.config("hub"), **changes},
        "vision_config": VISION,
        "image_token_id": 95,
        "tie_word_embeddings": False,
    }
    weights = {
        name.replace("model.", "model.language_model.", 1): array
        for name, array in golden.weights().items()
    }
    weights["model.visual.patch_embed.proj.weight"] = np.zeros((8, 3), np.float32)
    return write_checkpoint(folder, config, weights)


def whole(golden: Golden, model: Any) -> mx.array:
    return model(mx.array([golden.prompt]))[0]


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden.read("qwen3-5-plain")


def test_the_text_model_of_a_checkpoint_with_pictures_is_read(tmp_path, golden):
    model = mlxkv.load_model(multimodal(tmp_path, golden), dtype=mx.float32)
    check_logits(golden, whole(golden, model), "multimodal")


def test_what_is_written_is_mlx_lms_layout_and_read_again(tmp_path, golden):
    plan = convert(multimodal(tmp_path / "in", golden), tmp_path / "out").plan
    reasons = dict(plan.skipped)
    assert reasons.pop("model.visual.patch_embed.proj.weight") == "not part of the language model"
    assert set(reasons.values()) == {"predicts the token after next"} and len(reasons) == 2
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "qwen3_5" and written["full_attention_interval"] == 4
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert stored["model.layers.0.linear_attn.conv1d.weight"].shape[1:] == (4, 1)
    model = mlxkv.load_model(tmp_path / "out", dtype=mx.float32)
    check_logits(golden, whole(golden, model), "converted")


def test_a_qwen3_next_is_read_as_it_was_written(tmp_path):
    golden = Golden.read("qwen3-next-plain")
    convert(golden.write(tmp_path / "in", "hub"), tmp_path / "out")
    model = mlxkv.load_model(tmp_path / "out", dtype=mx.float32)
    check_logits(golden, whole(golden, model), "converted")


@pytest.mark.parametrize("name", ["qwen3-5-moe", "qwen3-next-plain"])
def test_small_projections_that_steer_stay_precise(tmp_path, name):
    golden = Golden.read(name)
    source, options = golden.write(tmp_path / "in", "hub"), {"quantize": "affine4"}
    options |= {"group_size": 32, "dtype": "bfloat16", "dry_run": True}
    plan = convert(source, tmp_path / "out", **options).plan
    kept = {t.name.split(".", 3)[-1]: t.dtype for t in plan.tensors if t.quantization is None}
    for part in ("A_log", "dt_bias"):
        assert kept[f"linear_attn.{part}"] == "float32"
    small = ["in_proj_a", "in_proj_b"] if "5" in name else ["in_proj_ba"]
    for part in (*(f"linear_attn.{x}" for x in small), "mlp.shared_expert_gate", "mlp.gate"):
        assert kept[f"{part}.weight"] == "bfloat16"


def test_attention_without_a_gate_is_refused(tmp_path, golden):
    with pytest.raises(ConfigError, match="attn_output_gate must be true"):
        mlxkv.load_model(multimodal(tmp_path, golden, attn_output_gate=False))
