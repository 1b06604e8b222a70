"""llama.cpp's adapters: `<tensor>.lora_a` and `<tensor>.lora_b` in a GGUF file of type adapter.

Reference: `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.checkpoint.adapter import Adapter, Target, digest_of
from mlxkv.checkpoint.config import text_config
from mlxkv.errors import ConfigError, UnsupportedModel, WeightsError

from .file import GGUFFile, GGUFTensor, check_readable, dequantize, open_gguf
from .model import architecture_of, is_permuted, our_name
from .weight import unpermute

_A, _B = ".lora_a", ".lora_b"


def read_gguf_adapter(path: Path, config: Mapping[str, Any] | None) -> Adapter:
    """Read an adapter.

    Args:
        path: the file.
        config: the model's config.json, of whose heads Llama's queries and keys are brought in
            order; None leaves them.

    Raises:
        UnsupportedModel: another architecture or kind of adapter.
        ConfigError: its metadata is damaged.
        WeightsError: its tensors do not fit together.
    """
    file = open_gguf(path)
    _check(file)
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float):
        raise ConfigError(f"{path}: key 'adapter.lora.alpha' must be a number; got {alpha!r}")
    targets = {}
    for name, tensor in file.tensors.items():
        if name.endswith(_A):
            stem = name.removesuffix(_A)
            ours, target = _target(file, stem, tensor, float(alpha), config)
            targets[ours] = target
        elif not name.endswith(_B) or name.removesuffix(_B) + _A not in file.tensors:
            raise WeightsError(f"{path}: tensor {name} is no part of LoRA")
    base = file.metadata.get("general.base_model.0.name", "")
    return Adapter(str(path), "GGUF", "LoRA", str(base), targets, digest_of([path]))


def _check(file: GGUFFile) -> None:
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if (got := file.metadata.get(key)) != wanted:
            raise UnsupportedModel(f"{file.path}: key {key!r} is {got!r}; it must be {wanted!r}")
    if file.metadata.get("adapter.alora.invocation_tokens") is not None:
        raise UnsupportedModel(
            f"{file.path}: key 'adapter.alora.invocation_tokens': activated LoRA is not supported"
        )


def _target(
    file: GGUFFile,
    stem: str,
    first: GGUFTensor,
    alpha: float,
    config: Mapping[str, Any] | None,
) -> tuple[str, Target]:
    """A target and our name of its projection."""
    architecture = architecture_of(file)
    ours, second = our_name(stem, architecture), file.tensors.get(f"{stem}{_B}")
    if ours is None or ours.endswith("embed_tokens.weight"):
        raise UnsupportedModel(f"{file.path}: {stem}{_A}: this tensor cannot be changed here")
    if second is None:
        raise WeightsError(f"{file.path}: {stem}{_B} is missing")
    a, b = _values(file, first), _values(file, second)  # [..., r, in], [..., out, r]
    if config is not None and is_permuted(stem, architecture):
        b = unpermute(b, _head_dim(file, stem, b, config))
    rank = b.shape[-1]
    first_factor, second_factor = (mx.array(x).swapaxes(-1, -2) for x in (a, b))
    scale = alpha / rank if alpha else 1.0
    return ours.removesuffix(".weight"), Target(first.name, first_factor, second_factor, scale)


def _values(file: GGUFFile, tensor: GGUFTensor) -> np.ndarray:
    """A tensor in float32."""
    check_readable(file, tensor)
    n_rows = int(np.prod(tensor.shape[:-1]))
    return dequantize(file.read_rows(tensor, 0, n_rows), tensor.type).reshape(tensor.shape)


def _head_dim(file: GGUFFile, stem: str, b: np.ndarray, config: Mapping[str, Any]) -> int:
    text = text_config(config)
    n_heads = text.get("num_attention_heads")
    dim = text.get("head_dim") or (n_heads and text["hidden_size"] // n_heads)
    if not isinstance(dim, int) or b.ndim != 2 or b.shape[0] % dim:
        raise WeightsError(
            f"{file.path}: {stem}{_B} has {b.shape[0]} rows, which are not heads of {dim}"
        )
    return dim
