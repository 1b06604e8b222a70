"""Tiny checkpoints with random weights, made without torch, for every test that needs a model.

A weight is a function of its name, its shape and a seed alone (NumPy's `RandomState`, whose stream
is frozen), so golden files store no weights: the oracle and the tests make the same ones.
Norms vary, biases are far from zero and the projections are large enough for attention to matter:
a norm, a bias or a position that is forgotten shows in the logits at once.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Shapes = Mapping[str, Sequence[int]]
CLIPS = ("input_min", "input_max", "output_min", "output_max")


LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
}
"""Sizes of a Llama: 4 query heads on 2 KV heads of 16."""
GEMMA = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}
"""Sizes of a Gemma, whose heads are wider than its hidden states."""


def llama_config(**changes: Any) -> dict[str, Any]:
    """A Llama in the hub style: 3 layers, 4 query heads on 2 KV heads of 16."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **LLAMA,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def mistral_config(**changes: Any) -> dict[str, Any]:
    """A Mistral in the hub style whose every layer slides over 24 tokens."""
    base = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 24,
    }
    config = llama_config(**base)
    del config["mlp_bias"], config["attention_bias"], config["rope_scaling"]
    return {**config, **changes}


def gemma3_config(**changes: Any) -> dict[str, Any]:
    """A Gemma 3 text model in the hub style: 6 layers, 5 of them over 32 tokens, 1 full."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **GEMMA,
        "num_hidden_layers": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window": 32,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 24,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "torch_dtype": "float32",
        "bos_token_id": 2,
        "eos_token_id": 1,
        **changes,
    }


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Llama, Mistral or Gemma 3 text checkpoint."""
    c = {"attention_bias": False, "mlp_bias": False, **config}
    gemma = c["model_type"].startswith("gemma")
    E, I, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    H = c["num_attention_heads"]
    D = c.get("head_dim") or E // H
    Hk = c.get("num_key_value_heads") or H
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, E)}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        rows = {"q_proj": (H * D, E), "k_proj": (Hk * D, E), "v_proj": (Hk * D, E)}
        rows["o_proj"] = (E, H * D)
        for name, shape in rows.items():
            shapes[f"{layer}self_attn.{name}.weight"] = shape
            if c["attention_bias"]:
                shapes[f"{layer}self_attn.{name}.bias"] = shape[:1]
        for name, shape in {"gate_proj": (I, E), "up_proj": (I, E), "down_proj": (E, I)}.items():
            shapes[f"{layer}mlp.{name}.weight"] = shape
            if c["mlp_bias"]:
                shapes[f"{layer}mlp.{name}.bias"] = shape[:1]
        norms = ["input_layernorm", "post_attention_layernorm"]
        if gemma:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
            shapes[f"{layer}self_attn.q_norm.weight"] = (D,)
            shapes[f"{layer}self_attn.k_norm.weight"] = (D,)
        shapes |= {f"{layer}{name}.weight": (E,) for name in norms}
    shapes["model.norm.weight"] = (E,)
    if not c.get("tie_word_embeddings", gemma):
        shapes["lm_head.weight"] = (V, E)
    return shapes


def random_tensor(name: str, shape: Sequence[int], seed: int, norm_mean: float) -> np.ndarray:
    """One float32 tensor, the same wherever and in whatever order it is made.

    Args:
        name: its name in the checkpoint.
        shape: its shape.
        seed: of the whole checkpoint.
        norm_mean: what norms vary around: 1, or 0 for Gemma, which stores the difference from 1.
    """
    noise = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(
        tuple(shape)
    )
    part = name.split(".")[-2] if "." in name else name
    if name.endswith(CLIPS):
        # Where about a fifth of the values are clipped.
        scaled = (0.8 + 0.2 * abs(noise)) * (-1 if name.endswith("_min") else 1)
    elif part.endswith("norm"):
        scaled = norm_mean + 0.3 * noise
    elif name.endswith(".sinks"):
        # Next to scores of this size: some heads say little, others hardly listen to theirs.
        scaled = 2.0 * noise
    elif name.endswith("A_log"):
        # A gated delta net remembers some 30 tokens, some heads more.
        scaled = noise - 3
    elif len(shape) == 1 or name.endswith("_bias"):
        scaled = 0.3 * noise
    elif part == "embed_tokens":
        # Small next to what the layers add, or a tied head would only repeat the last token; and
        # Gemma multiplies by the root of its dimension.
        scaled = (0.3 if norm_mean else 0.05) * noise
    elif part == "modality_router":
        # Gemma 3n divides what it gets by the dimension.
        scaled = 0.3 * noise * shape[-1] ** 0.5
    elif part in ("q_proj", "k_proj"):
        scaled = 1.5 * noise / shape[-1] ** 0.5
    else:
        scaled = noise / shape[-1] ** 0.5
    return np.asarray(scaled, np.float32)


def random_weights(shapes: Shapes, seed: int = 0, norm_mean: float = 1.0) -> dict[str, np.ndarray]:
    """A float32 array for every name."""
    return {name: random_tensor(name, shape, seed, norm_mean) for name, shape in shapes.items()}


def fingerprint(weights: Mapping[str, np.ndarray]) -> str:
    """A hash over names and contents."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray | mx.array] | None = None,
    *,
    seed: int = 0,
    dtype: mx.Dtype = mx.float32,
    shards: int = 1,
) -> Path:
    """Write config.json and safetensors as Hugging Face lays them out.

    Args:
        directory: made if need be.
        config: what config.json holds.
        weights: None for random ones that fit the config.
        seed: of those random ones.
        dtype: of the tensors on disk; packed integers are left as they are.
        shards: files to spread the tensors over; more than one come with an index.

    Returns:
        The directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if weights is None:
        norm_mean = 0.0 if str(config["model_type"]).startswith("gemma") else 1.0
        weights = random_weights(tensor_shapes(config), seed, norm_mean)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2))
    arrays = {name: _as_mlx(array, dtype) for name, array in weights.items()}
    names = sorted(arrays)
    if shards == 1:
        mx.save_safetensors(str(directory / "model.safetensors"), arrays, {"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: arrays[name] for name in names[i::shards]}
        mx.save_safetensors(str(directory / file), part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def _as_mlx(array: np.ndarray | mx.array, dtype: mx.Dtype) -> mx.array:
    array = array if isinstance(array, mx.array) else mx.array(array)
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def tokens(n: int, vocab_size: int = 96, seed: int = 0) -> list[int]:
    """A random prompt."""
    return np.random.RandomState(seed).randint(0, vocab_size, n).tolist()
