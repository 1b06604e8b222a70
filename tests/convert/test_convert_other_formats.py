"""Checkpoints of other quantizers: every format against its own formula, on tiny matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.checkpoint.weights import TensorInfo
from mlxkv.convert import changes, convert, describe, float4
from mlxkv.convert.hub import other_formats
from mlxkv.convert.hub.matrices import Float8
from mlxkv.convert.plan import ConvertPlan
from mlxkv.errors import UnsupportedModel, WeightsError
from mlxkv.store import library, resolve
from tests.families.test_parity import Golden
from tests.support import tiny
from tests.support.other_formats import (
    CASES,
    CONFIG,
    Stored,
    checkpoint,
    e5m2,
    fp8,
    fp8_tensor,
    gptq,
    random_fp8,
    write,
)


def written(folder: Path, plan: ConvertPlan, name: str) -> np.ndarray:
    """A weight's values as they were written."""
    arrays: Any = mx.load(str(folder / "model.safetensors"))
    tensor = next(t for t in plan.tensors if t.name == name)
    q, module = tensor.quantization, name.removesuffix(".weight")
    if q is None:
        return np.array(arrays[name].astype(mx.float32))
    parts = [arrays[f"{module}.{k}"] for k in ("scales", "biases") if f"{module}.{k}" in arrays]
    parts = [p.astype(mx.float32) if q.mode == "affine" else p for p in parts]
    found = mx.dequantize(
        arrays[name], *parts, group_size=q.group_size, bits=q.bits, mode=q.mode, dtype=mx.float32
    )
    return np.array(found)


@pytest.mark.parametrize("name", CASES)
def test_a_format_becomes_its_own_formulas_values(tmp_path: Path, name: str):
    settings, case, becomes, error = CASES[name]
    source, values = checkpoint(tmp_path / "in", settings, case)
    result = convert(source, tmp_path / "out")
    plan, text = result.plan, describe(result.plan)
    assert becomes in text, text
    assert ("nearest values" in text) == (error == 0.025)
    assert ("the same values: 7 tensors" in text) == (error < 1e-4)
    told = [line for line in changes(plan, result.errors) if "left out" not in line]
    if error < 1e-4:
        assert told == ["7 tensors keep their quantized values"]
    else:
        assert len(told) == 1 and told[0].startswith("7 tensors, ")
        assert 1e-5 < next(iter(result.errors.values())) < error
    for tensor, expected in values.items():
        got = written(tmp_path / "out", plan, tensor)
        assert np.abs(got - expected).max() <= error * np.abs(expected).max(), tensor
    assert mlxkv.load_model(tmp_path / "out")(mx.array([[1, 2]])).shape == (1, 2, 96)


def test_a_folder_of_another_quantizer_runs_from_one_converted_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path / "models"))
    settings, case, *_ = CASES["awq"]
    source, _ = checkpoint(tmp_path / "in", settings, case)
    with pytest.raises(UnsupportedModel, match="'awq' is not supported; `mlxkv convert` makes"):
        mlxkv.load_model(source)
    assert resolve.source_path(str(source)) == source  # `convert` reads it as it is
    path = resolve.resolve(str(source))
    mlxkv.load_model(path)
    moved = source.rename(tmp_path / "moved")
    assert resolve.resolve(str(moved)) == path
    assert [model.source for model in library.list_models()] == ["folder"]


def test_experts_stored_one_by_one_become_one_stack(tmp_path: Path):
    """FP8 with a scale each, and latents that are split: `kv_b_proj` is decoded for it."""
    golden = Golden.read("glm4-moe-lite-plain")
    random, stored = np.random.default_rng(0), Stored()
    values = golden.weights()
    for name, array in list(values.items()):
        if "_proj" in name and array.ndim == 2:
            arrays, values[name] = fp8_tensor(random, array.shape)
            arrays["output_scale"] = ("F32", np.array(0.5, np.float32))
            stored |= {f"{name.removesuffix('.weight')}.{k}": v for k, v in arrays.items()}
        else:
            stored[name] = ("F32", array)
    config = {**golden.config("hub"), "quantization_config": {"quant_method": "fp8"}}
    config["dtype"] = "float32"
    plan = convert(write(tmp_path / "in", config, stored), tmp_path / "out").plan
    for why in ("for products", "for a KV cache"):
        assert sum(why in told for _, told in plan.skipped) == sum("_proj" in n for n in values)
    reference = tiny.write_checkpoint(tmp_path / "hf", golden.config("hub"), values)
    prompt = mx.array([tiny.tokens(20)])
    got, expected = (
        np.array(mlxkv.load_model(path, dtype=mx.float32)(prompt))
        for path in (tmp_path / "out", reference)
    )
    np.testing.assert_allclose(got, expected, atol=1e-4 * expected.std(), rtol=0)


@pytest.mark.parametrize(
    ("end", "array", "message"),
    [
        ("scales", ("F16", np.ones((3, 96), np.float16)), "q_proj.qweight is .* does not fit"),
        ("g_idx", ("I32", np.full(128, 99, np.int32)), "g_idx must name one of 4 groups"),
        ("qzeros", None, None),
        ("scales", None, "q_proj.scales is missing beside"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    tmp_path: Path, end: str, array: tuple[str, np.ndarray] | None, message: str | None
):
    """Without zeros a matrix is symmetric; all else is an error of one line."""

    def damaged(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
        stored, values = gptq(4)(random, shape)
        if shape == (128, 128):
            stored = {k: v for k, v in stored.items() if k != end}
            stored |= {} if array is None else {end: array}
        return stored, values

    source, _ = checkpoint(tmp_path / "in", {"quant_method": "gptq", "bits": 4}, damaged)
    if message is None:
        assert "the same values: 7" in describe(convert(source, tmp_path / "out").plan)
        return
    with pytest.raises(WeightsError, match=message) as raised:
        convert(source, tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_powers_of_two_by_all_their_codes():
    found = float4.e8m0(np.arange(256, dtype=np.uint8))
    np.testing.assert_array_equal(found[:255], 2.0 ** np.arange(-127.0, 128))
    assert np.isnan(found[255])


def test_words_of_four_codes_are_not_read_where_the_config_names_no_bits(tmp_path: Path):
    settings = {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["re:("]}}}
    source, _ = checkpoint(tmp_path / "in", settings, CASES["int7"][1])
    message = r"q_proj.weight_packed may hold codes of 7 or 8 bits, .* says no number"
    with pytest.raises(WeightsError, match=message):
        convert(source, tmp_path / "out")


def test_of_the_bits_that_the_config_says_of_classes_those_that_fit_count(tmp_path: Path):
    settings, case, becomes, _ = CASES["int8-packed"]
    groups = {**settings["config_groups"]}
    groups["of_embedding"] = {"targets": ["Embedding"], "weights": {"num_bits": 4}}
    source, _ = checkpoint(tmp_path / "in", {**settings, "config_groups": groups}, case)
    assert becomes in describe(convert(source, tmp_path / "out").plan)


@pytest.mark.parametrize("kind", ["F8_E5M2", "F8_E4M3"])
def test_a_model_that_was_cast_to_8_bits_keeps_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    """Norms and embedding too; a model of 16-bit values runs, with the same ones."""
    monkeypatch.setenv("MLXKV_MODELS", str(tmp_path / "models"))
    random, stored, values = np.random.default_rng(0), Stored(), {}
    for name, shape in tiny.tensor_shapes(CONFIG).items():
        codes, values[name] = e5m2(random, shape)
        if kind == "F8_E4M3":
            codes = random_fp8(random, shape)
            values[name] = fp8(codes)
        stored[name] = (kind, codes)
    config = {**CONFIG, "torch_dtype": f"float8_{kind[3:].lower()}"}
    folder = resolve.resolve(str(write(tmp_path / "in", config, stored)))
    arrays: Any = mx.load(str(folder / "model.safetensors"))
    assert {array.dtype for array in arrays.values()} == {mx.float16}
    for name, expected in values.items():
        np.testing.assert_array_equal(np.array(arrays[name].astype(mx.float32)), expected)
    assert mlxkv.load_model(folder)(mx.array([[1, 2]])).shape == (1, 2, 96)


def test_mixed_recipes_of_mlx_lm_load(tmp_path: Path):
    """Null group sizes and modes, an entry for each layer in its own mode, 1 bit."""
    config = tiny.llama_config(hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    at = "model.layers.0"
    formats = {
        f"{at}.self_attn.q_proj": (None, 6, "affine"),
        f"{at}.self_attn.k_proj": (None, 4, "mxfp4"),
        f"{at}.self_attn.v_proj": (32, 8, "mxfp8"),
        f"{at}.mlp.up_proj": (None, None, "nvfp4"),
        f"{at}.mlp.gate_proj": (128, 1, "affine"),
    }
    arrays: dict[str, Any] = dict(weights)
    for module, (group, bits, mode) in formats.items():
        size = group or {"affine": 64, "mxfp4": 32, "nvfp4": 16}[mode]
        parts = mx.quantize(mx.array(weights[f"{module}.weight"]), size, bits or 4, mode=mode)
        names = ("weight", "scales", "biases")
        arrays |= {f"{module}.{n}": part for n, part in zip(names, parts, strict=False)}
    entries = {
        module: {"group_size": group, "bits": bits, "mode": mode}
        for module, (group, bits, mode) in formats.items()
    }
    entries[f"{at}.mlp.down_proj"] = {"group_size": None}  # all else by default
    arrays |= dict(
        zip(
            (f"{at}.mlp.down_proj.{name}" for name in ("weight", "scales", "biases")),
            mx.quantize(mx.array(weights[f"{at}.mlp.down_proj.weight"])),
            strict=True,
        )
    )
    config["quantization"] = {"group_size": None, "bits": 4, "mode": None, **entries}
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}  # the source's, left over
    source = tiny.write_checkpoint(tmp_path / "in", config, arrays)
    prompt = mx.array([tiny.tokens(9)])
    expected = np.array(mlxkv.load_model(source, dtype=mx.float32)(prompt))
    convert(source, tmp_path / "plain", quantize="none", dtype="float32")
    for name in ("plain", "out"):
        if name == "out":
            convert(source, tmp_path / name)
        got = np.array(mlxkv.load_model(tmp_path / name, dtype=mx.float32)(prompt))
        np.testing.assert_allclose(got, expected, atol=1e-3 * expected.std(), rtol=0)


@pytest.mark.parametrize("scales", [(3,), (3, 1, 1), (3, 64, 1), (3, 2, 4)])
def test_scales_of_stacked_experts_go_with_their_expert(scales: tuple[int, ...]):
    """One a matrix, one a row, or one a block of 32 x 32."""
    random = np.random.default_rng(0)
    codes = random_fp8(random, (3, 64, 128))
    found = random.uniform(0.5, 2, scales).astype(np.float32)
    each = found.reshape(*scales, *(1,) * (3 - len(scales)))
    times = [n // have for n, have in zip(codes.shape, each.shape, strict=True)]
    for axis, n in enumerate(times):
        each = each.repeat(n, axis)
    infos: dict[str, Any] = {}
    reader = other_formats._Reader(infos, {}, "config.json")
    infos["w"] = TensorInfo((3, 64, 128), "F8_E4M3", Path("x"), 0)
    matrix = Float8((3, 64, 128), "FP8", codes, *reader.blocks("w", found, (3, 64, 128)))
    np.testing.assert_array_equal(
        matrix.values(10, 150), (fp8(codes) * each).reshape(-1, 128)[10:150]
    )
