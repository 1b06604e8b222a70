"""A GGUF file as a Hugging Face checkpoint: its config, and its tensors under their names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mlxkv.errors import UnsupportedModel, WeightsError

from .architecture import Architecture, Rows
from .families.gemma import GEMMA, GEMMA2, GEMMA3
from .families.gemma3n import GEMMA3N
from .families.gemma4 import GEMMA4
from .families.glm import GLM4, GLM4_MOE, GLM4_MOE_LITE
from .families.gpt_oss import GPT_OSS
from .families.llama import LLAMA, MISTRAL3, SMOLLM3
from .families.qwen import QWEN2, QWEN3, QWEN3MOE
from .families.qwen_hybrid import QWEN3NEXT, QWEN35, QWEN35MOE
from .file import GGUFFile, GGUFTensor, check_readable, dequantize
from .metadata import Metadata
from .reordered import ReorderedWeight
from .rope import ROPE_FACTORS
from .weight import GGUFWeight

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(\w+)")
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def architecture_of(file: GGUFFile) -> Architecture:
    """A file's architecture.

    Raises:
        UnsupportedModel: it is not in the table, or a mixture of experts.
    """
    name = file.architecture
    found = _ARCHITECTURES.get(name)
    if found is None:
        of = f" ({_OTHERS[name]})" if name in _OTHERS else ""
        raise UnsupportedModel(
            f"{file.path}: GGUF architecture {name!r}{of} is none of mlxkv's families; its "
            "safetensors run if mlx-lm defines them (`pip install mlx-lm`). Read are "
            f"{', '.join(sorted(_ARCHITECTURES))}"
        )
    experts = [t for t in file.tensors if "_exps" in t or "ffn_gate_inp" in t]
    if (experts or file.metadata.get(f"{name}.expert_count")) and not _has_experts(found):
        of = "a Mixtral or another mixture" if name == "llama" else "a mixture"
        raise UnsupportedModel(
            f"{file.path}: holds {of} of experts of architecture {name!r}"
            f"{f' (tensor {experts[0]!r})' if experts else ''}, none of mlxkv's families; its "
            "safetensors run if mlx-lm defines them (`pip install mlx-lm`)"
        )
    return found


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """config.json of a GGUF file, in Hugging Face's hub style.

    Raises:
        UnsupportedModel: another architecture.
        ConfigError: a key is missing, wrong or not understood.
    """
    architecture = architecture_of(file)
    metadata = Metadata(file)
    config = architecture.config(metadata, file.tensors)
    metadata.finish()
    return config


def _has_experts(architecture: Architecture) -> bool:
    return "ffn_gate_inp" in architecture.layer_names


def gguf_weights(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, GGUFWeight]:
    """The tensors of a GGUF file under the names of our definitions.

    Raises:
        WeightsError: names that the architecture does not have.
        UnsupportedModel: a ggml type that cannot be dequantized.
    """
    architecture = architecture_of(file)
    found: dict[str, GGUFWeight] = {}
    unknown = []
    seconds = _second_scales(file, architecture)
    for tensor in file.tensors.values():
        if tensor.name in seconds:
            continue
        if architecture.unused(tensor.name, config):
            continue
        if tensor.name == ROPE_FACTORS and architecture.rope_factors:
            continue
        weights = dict(_weights(file, tensor, architecture, config))
        if not weights:
            unknown.append(tensor.name)
        if (second := tensor.name.removesuffix(".weight") + ".scale") in seconds:
            scale = _read_seconds(file, tensor, second)
            weights = {name: replace(w, second=scale) for name, w in weights.items()}
        found |= weights
    if unknown:
        raise WeightsError(
            f"{file.path}: {len(unknown)} tensors that architecture {file.architecture!r} does "
            f"not have: {', '.join(sorted(unknown)[:12])}"
        )
    return found


def _second_scales(file: GGUFFile, architecture: Architecture) -> set[str]:
    """Names of tensors that hold a second scale of one in NVFP4, or of what it is multiplied by.

    The latter is for kernels that quantize their input. A scale that the model itself has, as
    Gemma 4's experts do, stays with it.
    """
    found = set()
    for name, tensor in file.tensors.items():
        stem = name.removesuffix(".weight")
        if tensor.type == "NVFP4" and stem != name:
            names = {f"{stem}.scale", f"{stem}.input_scale"} & file.tensors.keys()
            found |= {one for one in names if our_name(one, architecture) is None}
    return found


def _read_seconds(file: GGUFFile, tensor: GGUFTensor, name: str) -> tuple[float, ...]:
    """The second scales of a tensor, which are all 1 where none is stored.

    Raises:
        WeightsError: not one for all, or one for each matrix.
    """
    scale = file.tensors[name]
    count = math.prod(scale.shape)
    fits = count == 1 or (len(tensor.shape) == 3 and count == tensor.shape[0])
    values = dequantize(file.read_rows(scale, 0, 1), "F32").ravel() if scale.type == "F32" else None
    if values is None or not fits or not (np.isfinite(values).all() and (values > 0).all()):
        raise WeightsError(
            f"{file.path}: {name!r} must be one positive F32 for all of {tensor.name!r}, or one "
            f"for each of its matrices; got {list(scale.shape)} of type {scale.type}"
        )
    return () if (values == 1).all() else tuple(values.tolist())


def _weights(
    file: GGUFFile, tensor: GGUFTensor, architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[tuple[str, GGUFWeight]]:
    """Our tensors that one of the file holds; none of one that the architecture does not have."""
    if orders := architecture.orders(tensor, config):
        check_readable(file, tensor)
        for name, order in orders.items():
            dtype = architecture.scale_dtype
            yield name, ReorderedWeight(file, tensor, name, scale_dtype=dtype, order=order)
        return
    names: Mapping[str, Rows | None] = architecture.parts(tensor)
    if not names and (name := our_name(tensor.name, architecture)) is not None:
        names = {name: None}
    if not names:
        return
    check_readable(file, tensor)
    permuted = is_permuted(tensor.name, architecture)
    added = 1.0 if architecture.norms_plus_one and "norm" in tensor.name else 0.0
    head_dim = config["head_dim"] if permuted else 0
    if head_dim and tensor.shape[0] % head_dim:
        raise WeightsError(
            f"{file.path}: {tensor.name!r} has {tensor.shape[0]} rows, which are not heads of "
            f"{head_dim}"
        )
    for name, part in names.items():
        yield (
            name,
            GGUFWeight(file, tensor, name, head_dim, added, architecture.scale_dtype, part),
        )


def is_permuted(name: str, architecture: Architecture) -> bool:
    """Whether a tensor's rows are permuted per head."""
    inner = _LAYER.fullmatch(name)
    return inner is not None and inner[2] in architecture.permuted


def our_name(name: str, architecture: Architecture) -> str | None:
    """Our name of a tensor of the file; None for one that the architecture does not have."""
    inner = _LAYER.fullmatch(name)
    if inner is None:
        return architecture.top_names.get(name) or _TOP_NAMES.get(name)
    layer, stem, kind = inner.groups()
    ours = architecture.layer_names.get(f"{stem}.{kind}")
    if ours is None:
        ours = architecture.layer_names.get(stem) if kind in ("weight", "bias") else None
        ours = None if ours is None else f"{ours}.{kind}"
    return None if ours is None else f"model.layers.{int(layer)}.{ours}"


def unused_tensors(file: GGUFFile, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names of the tensors that `gguf_weights` leaves out, each with the reason."""
    architecture = architecture_of(file)
    found = [(name, architecture.unused(name, config)) for name in file.tensors]
    found = [(name, reason) for name, reason in found if reason]
    if ROPE_FACTORS in file.tensors:
        found.insert(0, (ROPE_FACTORS, "part of the config: rope_scaling"))
    return found


def default_dtype(file: GGUFFile) -> str:
    """The dtype of what is not quantized: the one that all matrices have, or the architecture's.

    The architecture's also for F16: Gemma's activations leave the range of float16.
    """
    architecture = architecture_of(file)
    types = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    plain = {"F32": "float32", "BF16": "bfloat16"}
    return plain.get(types.pop(), architecture.dtype) if len(types) == 1 else architecture.dtype


_OTHERS = {
    "chatglm": "ChatGLM, or GLM-4 of 2024",
    "command-r": "Command R",
    "deepseek": "DeepSeek 1",
    "llama4": "Llama 4",
    "phi3": "Phi-3 or Phi-4",
    "qwen2moe": "Qwen 1.5 or 2 with experts",
    "qwen2vl": "Qwen 2 or 2.5 with pictures",
}
"""Architectures that are not read and whose names say little."""

_ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,
    "mistral3": MISTRAL3,
    "smollm3": SMOLLM3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3n": GEMMA3N,
    "gemma4": GEMMA4,
    "glm4": GLM4,
    "glm4moe": GLM4_MOE,
    "deepseek2": GLM4_MOE_LITE,
    "gpt-oss": GPT_OSS,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3moe": QWEN3MOE,
    "qwen3next": QWEN3NEXT,
    "qwen35": QWEN35,
    "qwen35moe": QWEN35MOE,
}
