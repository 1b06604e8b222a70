"""ggml's types in MLX's formats: values as the gguf package has them, and whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from mlx.utils import tree_flatten

import mlxkv
from mlxkv.convert import convert, describe
from mlxkv.convert.gguf.blocks import (
    AFFINE_TYPES,
    FLOAT4_TYPES,
    format_of,
    in_mlx_format,
    is_exact,
    packed,
)
from mlxkv.errors import WeightsError
from mlxkv.models.loader import lay_out
from tests.support import gguf_files, tiny
from tests.support.gguf_files import Kind, random_blocks, weight_blocks, write_model

EXACT = sorted(kind for kind in {**AFFINE_TYPES, **FLOAT4_TYPES} if is_exact(kind, "float32"))
NEAREST = {"Q2_K": 0.03, "Q3_K": 0.03, "Q6_K": 0.005}
"""Types without an equal, and the largest root mean square of the error by that of the values."""


gemma_config = partial(tiny.gemma3_config, query_pre_attn_scalar=64)


def blocks_of(kind: str, shape: tuple[int, int]) -> np.ndarray:
    stored = random_blocks(kind, shape)
    if kind == "NVFP4":  # scales have no sign
        stored.reshape(-1, 36)[:, :4] &= 0x7F
    return stored


def values_in_mlx(stored: np.ndarray, kind: str, scale_dtype: mx.Dtype = mx.float32) -> np.ndarray:
    weight, scales, *biases = map(mx.array, in_mlx_format(stored, kind))
    form = format_of(kind)
    assert form is not None
    if biases:
        scales, *biases = (x.astype(scale_dtype).astype(mx.float32) for x in (scales, *biases))
    return np.array(
        mx.dequantize(
            weight,
            scales,
            *biases,
            group_size=form.group_size,
            bits=form.bits,
            mode=form.mode,
            dtype=mx.float32,
        )
    )


@pytest.mark.parametrize("kind", EXACT)
def test_types_that_mlx_has_keep_every_value_to_the_bit(kind: str):
    """Random blocks, so that scales of both signs, subnormal ones and all codes occur."""
    stored = blocks_of(kind, (64, 512))
    expected = quants.dequantize(stored, GGMLQuantizationType[kind])
    np.testing.assert_array_equal(values_in_mlx(stored, kind), expected)


@pytest.mark.parametrize("kind", [kind for kind in AFFINE_TYPES if is_exact(kind, "float16")])
def test_types_with_a_float16_for_each_group_keep_every_value_in_float16_scales(kind: str):
    stored = blocks_of(kind, (64, 512))
    expected = quants.dequantize(stored, GGMLQuantizationType[kind])
    np.testing.assert_array_equal(values_in_mlx(stored, kind, mx.float16), expected)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
def test_float16_scales_of_a_super_block_move_a_value_by_their_rounding_alone(kind: str):
    stored = blocks_of(kind, (64, 512))
    expected = quants.dequantize(stored, GGMLQuantizationType[kind])
    _, scales, biases = in_mlx_format(stored, kind)
    largest = np.abs(scales) * (2 ** AFFINE_TYPES[kind].bits - 1) + np.abs(biases)
    error = np.abs(values_in_mlx(stored, kind, mx.float16) - expected).reshape(64, -1, 32)
    bound = largest * 2.0**-11 + 32 * 2.0**-25  # of normal numbers, and of subnormal ones
    assert error.max() > 0
    assert not is_exact(kind, "float16")
    assert (error <= bound[..., None]).all()


@pytest.mark.parametrize(("kind", "rms"), NEAREST.items())
def test_types_with_groups_of_16_get_the_nearest_values(kind: str, rms: float):
    """Within half a step of the new group, or one where the end of the range cuts off the other
    sign's; and what a bias is rounded by.
    """
    stored = blocks_of(kind, (64, 512))
    expected = quants.dequantize(stored, GGMLQuantizationType[kind])
    _, scales, biases = in_mlx_format(stored, kind)
    error = np.abs(values_in_mlx(stored, kind) - expected).reshape(64, -1, 32)
    bound = 1.1 * np.abs(scales) + np.abs(biases) * 2.0**-11 + 1e-5
    assert not is_exact(kind, "float32")
    assert (error <= bound[..., None]).all()
    assert np.sqrt((error**2).mean() / (expected**2).mean()) < rms


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_lie_as_mlx_reads_them(bits: int):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 64), dtype=np.uint8)
    weight = packed(codes.reshape(-1), bits).reshape(3, -1).view("<u4")
    ones, zeros = mx.ones((3, 2)), mx.zeros((3, 2))
    found = mx.dequantize(mx.array(weight), ones, zeros, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(found), codes)


def test_a_scale_of_mxfp4_that_is_no_number_is_damage(tmp_path: Path):
    stored = random_blocks("MXFP4", (96, 64))
    stored[3, 17] = 0xFF
    config = tiny.llama_config()
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    weights["model.layers.0.mlp.up_proj.weight"] = stored
    path = write_model(
        tmp_path / "a.gguf",
        config,
        lambda name: "MXFP4" if name == "blk.0.ffn_up.weight" else "F32",
        weights=weights,
    )
    with pytest.raises(WeightsError, match=r"a\.gguf: blk\.0\.ffn_up\.weight: holds scales"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def k_quants(name: str) -> str:
    """Types of a Q4_K_M file."""
    if name == "token_embd.weight":
        return "Q8_0"
    if "attn_v" in name:
        return "Q6_K" if ".0." in name else "Q5_K"
    return "Q6_K" if "blk.1.ffn_down" in name else "Q4_K"


def k_quant_model(folder: Path, make_config: Callable[..., dict[str, Any]]) -> tuple[Path, Path]:
    """A GGUF file of K-quants, and a float32 checkpoint of the values that they stand for."""
    config = make_config(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    arch = gguf_files.architecture(config)
    weights = tiny.random_weights(tiny.tensor_shapes(config), 0, 0.0 if arch == "gemma3" else 1.0)
    values = dict(weights)
    for i, (name, array) in enumerate(weights.items()):
        if array.ndim < 2:
            continue
        kind = k_quants(gguf_files.gguf_name(name, arch))
        stored = quants.quantize(array, Kind[kind]) if kind == "Q8_0" else None
        if stored is None:
            weights[name] = stored = weight_blocks(kind, array.shape, i)
        values[name] = quants.dequantize(stored, Kind[kind])
    path = write_model(folder / "a.gguf", config, k_quants, weights=weights)
    return path, tiny.write_checkpoint(folder / "hf", config, values)


@pytest.mark.parametrize(("make_config", "scale_dtype"), [
    (tiny.llama_config, "float16"),
    (gemma_config, "float32"),
])  # fmt: skip
def test_a_file_of_k_quants_gives_the_logits_of_its_values(
    tmp_path: Path, make_config: Callable[..., dict[str, Any]], scale_dtype: str
):
    """What Q6_K moves its values by, 0.3%, makes 0.8% of the logits of a random model, scales in
    float16 no more (0.83%); dequantized float16 values alone 0.3%, scales in bfloat16 2.9%.
    """
    path, reference = k_quant_model(tmp_path, make_config)
    convert(path, tmp_path / "out")
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(stored, dict)
    assert stored["model.layers.0.mlp.up_proj.scales"].dtype == getattr(mx, scale_dtype)
    prompt = mx.array([tiny.tokens(100)])
    expected = np.array(mlxkv.load_model(reference, dtype="float32")(prompt))
    got = np.array(mlxkv.load_model(tmp_path / "out", dtype="float32")(prompt))
    assert np.sqrt(((got - expected) ** 2).mean()) < 0.015 * expected.std()


def test_each_module_has_its_format_in_the_config(tmp_path: Path):
    path, _ = k_quant_model(tmp_path, tiny.llama_config)
    plan = convert(path, tmp_path / "out").plan
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {key: entries[key] for key in ("bits", "group_size", "mode")} == {
        "bits": 4, "group_size": 32, "mode": "affine",
    }  # fmt: skip
    bits = {path: entry["bits"] for path, entry in entries.items() if isinstance(entry, dict)}
    assert bits == {
        "model.embed_tokens": 8,
        "model.layers.0.self_attn.v_proj": 8,
        "model.layers.1.self_attn.v_proj": 5,
        "model.layers.1.mlp.down_proj": 8,
    }
    # Codes, and a scale and a bias of 16 bits for 32 values.
    nbytes = {t.name: t.nbytes for t in plan.tensors}
    assert nbytes["model.layers.1.mlp.down_proj.weight"] == 256 * 256 * 9 // 8
    assert nbytes["model.layers.1.mlp.up_proj.weight"] == 256 * 256 * 5 // 8


def test_the_report_counts_tensors_whose_values_move(tmp_path: Path):
    path, _ = k_quant_model(tmp_path, gemma_config)
    text = describe(convert(path, tmp_path / "x", dry_run=True).plan)
    assert "nearest values: 2 tensors, Q6_K as affine8 g32, float32 scales" in text
    assert "Q4_K as" not in text
    text = describe(convert(path, tmp_path / "x", dry_run=True, dtype="float16").plan)
    assert "nearest values: 11 tensors, Q4_K as affine4 g32, float16 scales" in text
    text = describe(convert(path, tmp_path / "x", dry_run=True, quantize="none").plan)
    assert "nearest values" not in text


def test_a_plan_counts_the_bytes_that_mixed_widths_take(tmp_path: Path):
    path, _ = k_quant_model(tmp_path, tiny.llama_config)
    convert(path, tmp_path / "out")
    planned = lay_out(tmp_path / "out", "float16").nbytes
    model = mlxkv.load_model(tmp_path / "out", dtype="float16")
    arrays = tree_flatten(model.parameters())
    assert planned == sum(array.nbytes for _, array in arrays)


def test_mlx_lm_runs_mixed_widths_alike(tmp_path: Path):
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    path, _ = k_quant_model(tmp_path, tiny.llama_config)
    convert(path, tmp_path / "out", dtype="float32")
    prompt = mx.array([tiny.tokens(50)])
    theirs, _ = mlx_lm.load_model(tmp_path / "out")
    ours = mlxkv.load_model(tmp_path / "out", dtype="float32")
    expected = np.array(theirs(prompt))
    np.testing.assert_allclose(np.array(ours(prompt)), expected, atol=1e-4 * expected.std(), rtol=0)


@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4"])
def test_floats_of_4_bits_stay_as_small_as_they_are(tmp_path: Path, kind: str):
    config = tiny.llama_config()
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    name = "model.layers.0.mlp.up_proj.weight"
    shape = weights[name].shape
    stored = blocks_of(kind, (shape[0], shape[1]))
    scales = stored.reshape(-1, {"MXFP4": 17, "NVFP4": 36}[kind])
    scales[:, : 1 if kind == "MXFP4" else 4] = {"MXFP4": 123, "NVFP4": 40}[kind]
    weights[name] = stored
    path = write_model(
        tmp_path / "a.gguf",
        config,
        lambda name: kind if name == "blk.0.ffn_up.weight" else "F32",
        weights=weights,
    )
    convert(path, tmp_path / "out", dtype="float32")
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert entries["mode"] == kind.lower()
    weights[name] = quants.dequantize(stored, Kind[kind])
    reference = tiny.write_checkpoint(tmp_path / "hf", config, weights)
    prompt = mx.array([tiny.tokens(50)])
    expected = np.array(mlxkv.load_model(reference, dtype="float32")(prompt))
    got = np.array(mlxkv.load_model(tmp_path / "out", dtype="float32")(prompt))
    np.testing.assert_allclose(got, expected, atol=1e-4 * expected.std(), rtol=0)
