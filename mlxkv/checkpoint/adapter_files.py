"""An adapter's directory, mlx-lm's or PEFT's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlxkv.checkpoint.adapter import (
    CONFIG,
    MLX_LM,
    PEFT,
    Adapter,
    Target,
    digest_of,
    pair,
    tensors_of,
)
from mlxkv.checkpoint.config import Fields, read_json
from mlxkv.checkpoint.peft import read_peft
from mlxkv.errors import ModelNotFound, UnsupportedModel, WeightsError

FILES = (CONFIG, MLX_LM, PEFT)
GGUF = ".gguf"
"""The end of the name of llama.cpp's adapters."""
_PICKLED = ("adapter_model.bin", "adapters.npz")
_PARTS = ("lora_a", "lora_b", "m")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that `open_adapter` reads, damaged or not."""
    return any((folder / name).is_file() for name in (MLX_LM, PEFT)) or (
        (folder / CONFIG).is_file() and any((folder / name).is_file() for name in _PICKLED)
    )


def open_adapter(folder: Path) -> Adapter:
    """Read mlx-lm's or PEFT's adapter.

    Raises:
        ModelNotFound: no adapter in the folder.
        ConfigError: its config is damaged, or asks for what is not supported, with the key.
        UnsupportedModel: it is another kind of fine-tuning than LoRA or DoRA.
        WeightsError: its tensors do not fit together.
    """
    if (folder / MLX_LM).is_file():
        return _read_mlx_lm(folder)
    if (folder / PEFT).is_file():
        return read_peft(folder)
    if pickled := [name for name in _PICKLED if (folder / name).is_file()]:
        raise UnsupportedModel(
            f"{folder / pickled[0]}: pickled weights can run code and are not read: save the "
            "adapter as safetensors"
        )
    raise ModelNotFound(f"{folder}: no adapter in it ({MLX_LM} or {PEFT})")


def _read_mlx_lm(folder: Path) -> Adapter:
    file, source = folder / MLX_LM, str(folder / CONFIG)
    raw = read_json(folder / CONFIG)
    fields = Fields(raw, source)
    method = fields.str("fine_tune_type", "lora")
    if method == "full":
        raise UnsupportedModel(
            f"{source}: key 'fine_tune_type' is 'full': these are weights of the whole model, no "
            "adapter; fuse them into it with `mlx_lm.fuse`"
        )
    if method not in ("lora", "dora"):
        raise fields.error("fine_tune_type", f"must be lora or dora; got {method!r}")
    parameters = raw.get("lora_parameters")
    if not isinstance(parameters, Mapping):
        raise fields.error("lora_parameters", "is missing")
    scale = Fields(parameters, f"{source}: lora_parameters").float("scale")
    targets = {
        path: _mlx_lm_target(str(file), path, parts, scale)
        for path, parts in _by_module(str(file), tensors_of(file)).items()
    }
    digest = digest_of([folder / CONFIG, file])
    name = {"lora": "LoRA", "dora": "DoRA"}[method]
    return Adapter(str(folder), "mlx-lm", name, str(raw.get("model") or ""), targets, digest)


def _by_module(source: str, tensors: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """Module's path -> its parts.

    Raises:
        WeightsError: a tensor that is no part of an adapter.
    """
    found: dict[str, dict[str, mx.array]] = {}
    for key, array in tensors.items():
        path, _, part = key.rpartition(".")
        if part not in _PARTS:
            raise WeightsError(f"{source}: tensor {key} is no part of LoRA or DoRA")
        found.setdefault(path, {})[part] = array
    return found


def _mlx_lm_target(source: str, path: str, parts: Mapping[str, mx.array], scale: float) -> Target:
    a, b = pair(source, path, parts, ("lora_a", "lora_b"))
    if b.ndim == 3:  # of experts: [E, r, in] and [E, out, r]
        a, b = a.reshape(b.shape[0], b.shape[-1], -1).swapaxes(-1, -2), b.swapaxes(-1, -2)
    kind = "tied" if path.rpartition(".")[2].startswith("embed_tokens") else "linear"
    return Target(f"{path}.lora_a", a, b, scale, parts.get("m"), kind)
