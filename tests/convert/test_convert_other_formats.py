"""Checkpoints of other quantizers: every format against its own formula, on tiny matrices."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.checkpoint.weights import TensorInfo
from mlxkv.convert import changes, convert, describe
from mlxkv.convert.hub import other_formats
from mlxkv.convert.hub.matrices import Float8
from mlxkv.convert.plan import ConvertPlan
from mlxkv.errors import UnsupportedModel, WeightsError
from mlxkv.store import library, resolve
from tests.families.test_parity import Golden
from tests.support import tiny

Stored = dict[str, tuple[str, np.ndarray]]
"""Name of an array after the module's -> safetensors' dtype and bits."""
Case = Callable[[np.random.Generator, tuple[int, int]], tuple[Stored, np.ndarray]]
"""Arrays of a matrix of this shape, and its values."""

CONFIG = tiny.llama_config(
    hidden_size=128, intermediate_size=256, num_hidden_layers=1, torch_dtype="float16"
)


def write(folder: Path, config: Mapping[str, Any], arrays: Stored) -> Path:
    """A safetensors directory of arrays with any dtype."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, data = {}, b""
    for name, (dtype, array) in arrays.items():
        part = np.ascontiguousarray(array).tobytes()
        span = [len(data), len(data) + len(part)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
        data += part
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def words_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes in 32-bit words, lowest bits first; each row by itself as one number."""
    rows = []
    for row in codes:
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        n_words = -(-len(row) * bits // 32)
        rows.append(np.frombuffer(number.to_bytes(4 * n_words, "little"), "<i4"))
    return np.stack(rows)


def fp8(codes: np.ndarray) -> np.ndarray:
    return np.array(mx.from_fp8(mx.array(codes), dtype=mx.float32))


def random_fp8(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.array(mx.to_fp8(mx.array(random.standard_normal(shape, dtype=np.float32) * 50)))


def fp8_tensor(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
    codes, scale = random_fp8(random, shape), np.float32(0.00123)
    stored: Stored = {
        "weight": ("F8_E4M3", codes),
        "weight_scale_inv": ("F32", np.array(scale)),
        "activation_scale": ("F32", np.array(0.5, np.float32)),
    }
    return stored, fp8(codes) * scale


def fp8_blocks(scales: Callable[[np.random.Generator], np.ndarray], end: str) -> Case:
    def make(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
        codes, found = random_fp8(random, shape), scales(random)
        if end == "weight_scale":  # one for each row
            found = np.resize(found, (shape[0], 1))
            values = fp8(codes) * found
        else:
            found = np.resize(found, (-(-shape[0] // 64), -(-shape[1] // 64)))
            each = found.repeat(64, 0).repeat(64, 1)
            values = fp8(codes) * each[: shape[0], : shape[1]]
        return {"weight": ("F8_E4M3", codes), end: ("F32", found)}, values

    return make


def any_scales(random: np.random.Generator) -> np.ndarray:
    return random.uniform(0.001, 0.002, 40).astype(np.float32)


def powers(random: np.random.Generator) -> np.ndarray:
    return np.exp2(random.integers(-12, -8, 40)).astype(np.float32)


def grouped(
    random: np.random.Generator, shape: tuple[int, int], bits: int, group: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[out, in]`, float16 scales and zeros `[out, groups]`, and the values."""
    codes = random.integers(0, 2**bits, shape).astype(np.uint8)
    n = shape[0], shape[1] // group
    scales = random.uniform(0.01, 0.02, n).astype(np.float16)
    zeros = np.full(n, 1 << (bits - 1)) if symmetric else random.integers(1, 2**bits, n)
    values = (codes - zeros.repeat(group, 1)) * scales.astype(np.float32).repeat(group, 1)
    return codes, scales, zeros, values.astype(np.float32)


def packed_ints(bits: int, group: int, symmetric: bool = True) -> Case:
    """compressed-tensors."""

    def make(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
        codes, scales, zeros, values = grouped(random, shape, bits, group or shape[1], symmetric)
        stored: Stored = {
            "weight_packed": ("I32", words_of(codes, bits)),
            "weight_scale": ("F16", scales),
            "weight_shape": ("I64", np.array(shape)),
        }
        if not symmetric:
            stored["weight_zero_point"] = ("I32", words_of(zeros.T, bits).T)
        return stored, values

    return make


def int8(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
    codes = random.integers(-127, 128, shape).astype(np.int8)
    scales = random.uniform(0.001, 0.002, (shape[0], 1)).astype(np.float16)
    stored: Stored = {"weight": ("I8", codes), "weight_scale": ("F16", scales)}
    return stored, codes * scales.astype(np.float32)


def gptq(bits: int, symmetric: bool = True, act_order: bool = False, named: bool = True) -> Case:
    """The first format: transposed, zeros less one."""

    def make(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
        codes, scales, zeros, values = grouped(random, shape, bits, 32, symmetric)
        columns = np.arange(shape[1])
        if act_order:
            columns = random.permutation(shape[1])
        stored: Stored = {
            "qweight": ("I32", words_of(codes[:, columns], bits).T),
            "qzeros": ("I32", words_of(zeros.T - 1, bits)),
            "scales": ("F16", scales.T),
        }
        if named:
            stored["g_idx"] = ("I32", (columns // 32).astype(np.int32))
        return stored, values[:, columns]

    return make


def awq(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
    codes, scales, zeros, values = grouped(random, shape, 4, 64, False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word is value order[i]

    def words(rows: np.ndarray) -> np.ndarray:
        return words_of(rows.reshape(len(rows), -1, 8)[..., order].reshape(len(rows), -1), 4)

    stored: Stored = {
        "qweight": ("I32", words(codes.T)),
        "qzeros": ("I32", words(zeros.T)),
        "scales": ("F16", scales.T),
    }
    return stored, values


def float4(second: str | None) -> Case:
    """NVFP4 of ModelOpt or compressed-tensors, MXFP4 without a second scale."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)

    def make(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
        codes = random.integers(0, 16, shape)
        values = np.where(codes & 8, -1, 1) * table[codes & 7]
        bytes_ = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        if second is None:
            scales = random.integers(118, 124, (shape[0], shape[1] // 32)).astype(np.uint8)
            each = np.exp2(scales.astype(np.float32) - 127).repeat(32, 1)
            return {"weight_packed": ("U8", bytes_), "weight_scale": ("U8", scales)}, values * each
        scales = random.integers(0x30, 0x70, (shape[0], shape[1] // 16)).astype(np.uint8)
        factor = np.float32(0.00021)
        values = values * fp8(scales).repeat(16, 1) * factor
        if second == "weight_scale_2":
            stored: Stored = {"weight": ("U8", bytes_), second: ("F32", np.array(factor))}
        else:
            stored = {
                "weight_packed": ("U8", bytes_),
                second: ("F32", np.array([1 / factor], np.float32)),
            }
        return stored | {"weight_scale": ("F8_E4M3", scales)}, values

    return make


# Method, arrays, what `describe` says they become, and the largest error over the largest value.
CASES: dict[str, tuple[dict[str, Any], Case, str, float]] = {
    "fp8-tensor": ({"quant_method": "fp8"}, fp8_tensor, "float16", 5e-4),
    "fp8-block": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        fp8_blocks(any_scales, "weight_scale_inv"),
        "float16",
        5e-4,
    ),
    "fp8-powers": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        fp8_blocks(powers, "weight_scale_inv"),
        "mxfp8",
        0,
    ),
    "fp8-channel": (
        {"quant_method": "compressed-tensors"},
        fp8_blocks(any_scales, "weight_scale"),
        "float16",
        5e-4,
    ),
    "int4": ({"quant_method": "compressed-tensors"}, packed_ints(4, 128), "affine4 g128", 1e-7),
    "int4-zeros": (
        {"quant_method": "compressed-tensors"},
        packed_ints(4, 32, False),
        "affine4 g32, float32",
        1e-6,
    ),
    "int8-packed": ({"quant_method": "compressed-tensors"}, packed_ints(8, 0), "affine8", 1e-6),
    "int8": ({"quant_method": "compressed-tensors"}, int8, "affine8 g128, float16", 1e-6),
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq(4), "affine4 g32, float16", 1e-6),
    "gptq-3": ({"quant_method": "gptq", "bits": 3}, gptq(3, False), "affine3 g32, float32", 1e-6),
    "gptq-order": (
        {"quant_method": "gptq", "bits": 4},
        gptq(4, False, act_order=True),
        "float16",
        5e-4,
    ),
    "autoround": (
        {"quant_method": "auto-round", "bits": 8, "packing_format": "auto_round:auto_gptq"},
        gptq(8, named=False),
        "affine8 g32",
        1e-6,
    ),
    "awq": ({"quant_method": "awq", "bits": 4}, awq, "affine4 g64, float32", 1e-6),
    "modelopt": ({"quant_method": "modelopt"}, float4("weight_scale_2"), "affine6 g32", 0.025),
    "nvfp4": (
        {"quant_method": "compressed-tensors"},
        float4("weight_global_scale"),
        "affine6 g32",
        0.025,
    ),
    "mxfp4": ({"quant_method": "compressed-tensors"}, float4(None), "mxfp4", 0),
}


def checkpoint(
    folder: Path, settings: Mapping[str, Any], case: Case
) -> tuple[Path, dict[str, np.ndarray]]:
    """A tiny Llama whose projections are stored in a format; their values."""
    random = np.random.default_rng(0)
    stored: Stored = {}
    values: dict[str, np.ndarray] = {}
    for name, array in tiny.random_weights(tiny.tensor_shapes(CONFIG)).items():
        if "_proj" in name:
            arrays, values[name] = case(random, array.shape)
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{end}": found for end, found in arrays.items()}
        else:
            stored[name] = ("F16", array.astype(np.float16))
    config = {**CONFIG, "quantization_config": dict(settings)}
    return write(folder, config, stored), values


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
    told = changes(plan, result.errors)
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
            stored |= {f"{name.removesuffix('.weight')}.{k}": v for k, v in arrays.items()}
        else:
            stored[name] = ("F32", array)
    config = {**golden.config("hub"), "quantization_config": {"quant_method": "fp8"}}
    config["dtype"] = "float32"
    plan = convert(write(tmp_path / "in", config, stored), tmp_path / "out").plan
    assert sum("for products" in why for _, why in plan.skipped) == len(values) - len(
        [name for name in values if "_proj" not in name]
    )
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


def test_mixed_recipes_of_mlx_lm_load(tmp_path: Path):
    """Null group sizes, an entry for each layer in its own mode, 1 bit."""
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
    config["quantization"] = {"group_size": None, "bits": 4, "mode": "affine", **entries}
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
