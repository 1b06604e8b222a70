"""Tiny Llamas in the formats of other quantizers, each made by its own formula.

Independent of `mlxkv.convert`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

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


def e5m2(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Codes of 8-bit floats with 5 bits of exponent, and their values."""
    halves = (random.standard_normal(shape) * 50).astype(np.float16).view(np.uint16) & 0xFF00
    return (halves >> 8).astype(np.uint8), halves.view(np.float16).astype(np.float32)


def fp8_wide(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
    codes, values = e5m2(random, shape)
    scale = np.array(0.00123, np.float32)
    return {"weight": ("F8_E5M2", codes), "weight_scale": ("F32", scale)}, values * scale


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


def whole_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes in words that hold whole ones only, as compressed-tensors packs them."""
    n = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % n))).reshape(len(codes), -1, n)
    return (padded.astype(np.uint64) << np.arange(n, dtype=np.uint64) * bits).sum(-1).astype("<u4")


def packed_ints(bits: int, group: int, symmetric: bool = True, gaps: bool = True) -> Case:
    """compressed-tensors, which leaves no gaps since 0.20."""
    pack = whole_words if gaps else words_of

    def make(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
        codes, scales, zeros, values = grouped(random, shape, bits, group or shape[1], symmetric)
        stored: Stored = {
            "weight_packed": ("I32", pack(codes, bits)),
            "weight_scale": ("F16", scales),
            "weight_shape": ("I64", np.array(shape)),
        }
        if not symmetric:
            stored["weight_zero_point"] = ("I32", pack(zeros.T, bits).T)
        return stored, values

    return make


def int8(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
    codes = random.integers(-127, 128, shape).astype(np.int8)
    scales = random.uniform(0.001, 0.002, (shape[0], 1)).astype(np.float16)
    stored: Stored = {"weight": ("I8", codes), "weight_scale": ("F16", scales)}
    return stored, codes * scales.astype(np.float32)


def gptq(
    bits: int,
    symmetric: bool = True,
    act_order: bool = False,
    named: bool = True,
    less: int = 1,
    group: int = 32,
) -> Case:
    """Transposed; zeros less one in the first format. A group that is cut is the last one."""

    def make(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
        n_groups = -(-shape[1] // group)
        whole = shape[0], n_groups * group
        codes, scales, zeros, values = grouped(random, whole, bits, group, symmetric)
        codes, values = codes[:, : shape[1]], values[:, : shape[1]]
        columns = np.arange(shape[1])
        if act_order:
            columns = random.permutation(shape[1])
        stored: Stored = {
            "qweight": ("I32", words_of(codes[:, columns], bits).T),
            "qzeros": ("I32", words_of(zeros.T - less, bits)),
            "scales": ("F16", scales.T),
        }
        if named:
            stored["bias"] = ("F16", np.zeros(shape[0], np.float16))
            stored["g_idx"] = ("I32", (columns // group).astype(np.int32))
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


def float4(second: str | None, factor: float = 0.00021) -> Case:
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
        values = values * fp8(scales).repeat(16, 1) * np.float32(factor)
        if second == "weight_scale_2":
            stored: Stored = {
                "weight": ("U8", bytes_),
                second: ("F32", np.array(factor, np.float32)),
            }
        else:
            stored = {
                "weight_packed": ("U8", bytes_),
                second: ("F32", np.array([1 / np.float32(factor)], np.float32)),
            }
        return stored | {"weight_scale": ("F8_E4M3", scales)}, values

    return make


def mxfp8(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
    codes = random_fp8(random, shape)
    scales = random.integers(110, 120, (shape[0], shape[1] // 32)).astype(np.uint8)
    values = fp8(codes) * np.exp2(scales.astype(np.float32) - 127).repeat(32, 1)
    return {"weight": ("F8_E4M3", codes), "weight_scale": ("U8", scales)}, values


def bitsandbytes(nested: bool) -> Case:
    """4 bits: blocks of 64 values of the whole matrix, whose maxima may be quantized too.

    Where they are not, the bytes lie in an array of bfloat16, as for sharded training.
    """

    def make(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
        table = np.sort(random.uniform(-1, 1, 16)).astype(np.float32)
        codes = random.integers(0, 16, shape[0] * shape[1]).astype(np.uint8)
        n = len(codes) // 64
        state: dict[str, Any] = {"shape": list(shape), "blocksize": 64, "quant_type": "nf4"}
        maxima = random.uniform(0.01, 0.02, n).astype(np.float32)
        stored: Stored = {"weight.absmax": ("F32", maxima)}
        if nested:
            book = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
            inner = random.integers(0, 256, n).astype(np.uint8)
            outer = random.uniform(0.001, 0.002, -(-n // 256)).astype(np.float32)
            maxima = book[inner] * outer[np.arange(n) // 256] + np.float32(0.02)
            state |= {"nested_blocksize": 256, "nested_offset": 0.02}
            stored = {"weight.absmax": ("U8", inner), "weight.nested_absmax": ("F32", outer)}
            stored["weight.nested_quant_map"] = ("F32", book)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        bytes_ = codes[0::2] << 4 | codes[1::2]
        stored["weight"] = ("U8", bytes_) if nested else ("BF16", bytes_.view(np.uint16))
        stored["weight"] = stored["weight"][0], stored["weight"][1][:, None]
        stored["weight.quant_map"] = ("F32", table)
        stored["weight.quant_state.bitsandbytes__nf4"] = ("U8", text)
        return stored, (table[codes] * maxima.repeat(64)).reshape(shape)

    return make


def stating(bits: int, **others: int) -> dict[str, Any]:
    """compressed-tensors' config: bits of all linear layers, and of those that have a name."""
    groups = {"Linear": bits, **{f"re:.*{name}$": n for name, n in others.items()}}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {
            f"group_{i}": {"targets": [target], "weights": {"num_bits": n}}
            for i, (target, n) in enumerate(groups.items())
        },
    }


def llm_int8(random: np.random.Generator, shape: tuple[int, int]) -> tuple[Stored, np.ndarray]:
    codes = random.integers(-127, 128, shape).astype(np.int8)
    largest = random.uniform(0.1, 0.2, shape[0]).astype(np.float32)
    stored: Stored = {"weight": ("I8", codes), "SCB": ("F32", largest)}
    return stored, codes * (largest / np.float32(127))[:, None]


# Method, arrays, what `describe` says they become, and the largest error over the largest value.
CASES: dict[str, tuple[dict[str, Any], Case, str, float]] = {
    "fp8-tensor": ({"quant_method": "fp8"}, fp8_tensor, "float16", 5e-4),
    "fp8-e5m2": ({"quant_method": "fp8"}, fp8_wide, "float16", 5e-4),
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
    "int3-zeros": (
        {"quant_method": "compressed-tensors"},
        packed_ints(3, 64, False),
        "affine3 g64, float32",
        1e-6,
    ),
    "int5-dense": (
        {"quant_method": "compressed-tensors"},
        packed_ints(5, 32, False, gaps=False),
        "affine5 g32, float32",
        1e-6,
    ),
    "int7": (
        stating(8, q_proj=7, k_proj=7, v_proj=7, o_proj=7, gate_proj=7, up_proj=7, down_proj=7),
        packed_ints(7, 64, False),
        "affine8 g64, float32",
        1e-6,
    ),
    "int8-packed": (stating(8, lm_head=7), packed_ints(8, 0), "affine8", 1e-6),
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
    "autoround-own": (
        {
            "quant_method": "intel/auto-round",
            "bits": 4,
            "group_size": 96,
            "backend": "auto_round:exllamav2",
            "extra_config": {".*_proj": {"bits": 3}},
        },
        gptq(3, False, named=False, less=0, group=96),
        "affine3 g32, float32",
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
    "nvfp4-power": (
        {"quant_method": "modelopt"},
        float4("weight_scale_2", 2**-4),
        "nvfp4",
        1e-7,
    ),
    "nf4": ({"quant_method": "bitsandbytes"}, bitsandbytes(False), "float16", 5e-4),
    "nf4-nested": ({"quant_method": "bitsandbytes"}, bitsandbytes(True), "float16", 5e-4),
    "llm-int8": ({"quant_method": "bitsandbytes"}, llm_int8, "affine8 g128, float32", 1e-6),
    "mxfp4": ({"quant_method": "compressed-tensors"}, float4(None), "mxfp4", 0),
    "mxfp8": ({"quant_method": "compressed-tensors"}, mxfp8, "mxfp8", 0),
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
