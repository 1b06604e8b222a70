"""GGUF files for tests, made as llama.cpp's converter makes them: names, permuted q and k, norms.

Written from the description of the format and independent of `mlxkv.convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants

from tests.support.tiny import random_weights, tensor_shapes

Kind = GGMLQuantizationType
# The quantizers that the gguf package has; others get random blocks.
QUANTIZABLE = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")

_COMMON = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_NORMS = {
    "llama": {"post_attention_layernorm": "ffn_norm"},
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def architecture(config: Mapping[str, Any]) -> str:
    return "gemma3" if config["model_type"].startswith("gemma") else "llama"


def gguf_name(name: str, arch: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{({**_COMMON, **_NORMS[arch]})[inner]}.{kind}"


def permuted(array: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k."""
    shape = array.shape
    halves = array.reshape(n_heads, 2, shape[0] // n_heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(shape)


def gguf_tensors(
    config: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A Hugging Face checkpoint's arrays under llama.cpp's names, as it stores them."""
    arch = architecture(config)
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    found = {}
    for name, array in weights.items():
        if arch == "llama" and ".q_proj." in name:
            array = permuted(array, n_heads)
        if arch == "llama" and ".k_proj." in name:
            array = permuted(array, n_kv_heads)
        if arch == "gemma3" and "norm" in name:
            array = array + np.float32(1)
        found[gguf_name(name, arch)] = array
    return found


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the architecture."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(config["rope_theta"]),
    }
    if architecture(config) == "gemma3":
        keys["attention.sliding_window"] = config["sliding_window"]
    else:
        keys["rope.dimension_count"] = head_dim
        keys["vocab_size"] = config["vocab_size"]
    return keys


def tokens(n: int) -> dict[str, Any]:
    """A byte-level vocabulary of n tokens, just enough to be one."""
    names = ["<|pad|>", "<|bos|>", "<|eos|>", *(chr(33 + i) for i in range(90))]
    names += [f"x{i}" for i in range(n - len(names))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": names[:n],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (n - 3),
        "tokenizer.ggml.merges": ["x 0"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Stored bytes of a ggml type whose values are finite, `[rows, row_bytes]`."""
    rng = np.random.default_rng(seed)
    size = quants.quant_shape_to_byte_shape(shape, Kind[kind])
    stored = rng.integers(0, 256, size, dtype=np.uint8)
    while True:
        with np.errstate(all="ignore"):
            values = quants.dequantize(stored, Kind[kind])
        bad = ~np.isfinite(values) | (np.abs(values) > 1e4)
        if not bad.any():
            return stored
        # Scales are float16 somewhere in a block: draw the rows again that got NaN or infinity.
        rows = np.unique(np.nonzero(bad)[0])
        stored[rows] = rng.integers(0, 60, (len(rows), size[-1]), dtype=np.uint8)


_SCALES_AT = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def weight_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random blocks of a K-quant, `[rows, row_bytes]`, whose values look like weights: around 0,
    with a deviation of some 0.1.
    """
    rng = np.random.default_rng(seed)
    size = quants.quant_shape_to_byte_shape(shape, Kind[kind])
    stored = rng.integers(0, 256, size, dtype=np.uint8)
    step = {"Q4_K": 5e-4, "Q5_K": 2.5e-4, "Q6_K": 7e-5}[kind]
    # A minimum of half the steps of its group, on average.
    factors = (step, step * (15.5 if kind == "Q5_K" else 7.5))
    blocks = stored.reshape(-1, GGML_QUANT_SIZES[Kind[kind]][1])
    for at, factor in zip(_SCALES_AT[kind], factors, strict=False):
        blocks[:, at : at + 2] = np.array([factor], np.float16).view(np.uint8)
    return stored


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    arch: str,
    keys: Mapping[str, Any],
    kind_of: Callable[[str], str] = lambda name: "F32",
) -> Path:
    """Writes a file with tensors quantized as `kind_of` says; vectors stay F32.

    Args:
        keys: of the architecture (without its prefix) and, with a dot-separated namespace of
            "general." or "tokenizer.", of anything else. None leaves a key out.
    """
    writer = GGUFWriter(path, arch)
    for key, value in keys.items():
        if value is None:
            continue
        full = key if key.split(".")[0] in ("general", "tokenizer", "split") else f"{arch}.{key}"
        _add(writer, full, value)
    for name, array in tensors.items():
        kind = kind_of(name) if array.ndim > 1 else "F32"
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=Kind[kind])
        elif kind == "F32":
            writer.add_tensor(name, array)
        else:
            stored = quants.quantize(array, Kind[kind])
            writer.add_tensor(name, stored, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path,
    config: Mapping[str, Any],
    kind_of: Callable[[str], str] = lambda name: "F32",
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A whole model with random weights and a vocabulary.

    Args:
        keys: changes to its metadata; None takes a key out.
        extra: more tensors, under llama.cpp's names.
    """
    arch = architecture(config)
    if weights is None:
        weights = random_weights(tensor_shapes(config), 0, 0.0 if arch == "gemma3" else 1.0)
    tensors = {**gguf_tensors(config, weights), **(extra or {})}
    all_keys = {**metadata(config), **tokens(config["vocab_size"]), **(keys or {})}
    return write_gguf(path, tensors, arch, all_keys, kind_of)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, list(value))
