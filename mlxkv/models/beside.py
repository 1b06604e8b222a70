"""The assistant of a Gemma 4, in a directory beside the model's: its name and `-assistant`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from mlxkv.checkpoint.config import read_config
from mlxkv.checkpoint.quantization import Format, Quantization
from mlxkv.checkpoint.weights import open_weights
from mlxkv.errors import CheckpointError

if TYPE_CHECKING:
    from mlxkv.models.gemma4_assistant import AssistantConfig

SUFFIX = "-assistant"
PREFIX = "assistant."
"""Of its parameters' names in the model's."""

_log = logging.getLogger("mlxkv")


class Beside(NamedTuple):
    """An assistant.

    Args:
        config: its own; None without one.
        weights: lazy ones, under their names in the model.
        formats: module path in the model -> how its weight is quantized.
    """

    config: AssistantConfig | None = None
    weights: Mapping[str, mx.array] = {}
    formats: Mapping[str, Format | None] = {}


def assistant_beside(path: Path, config: Any) -> Beside:
    """The assistant of a model.

    One that cannot be used is named in the log, and left out: no answer depends on it.

    Args:
        path: the model's directory.
        config: the model's.
    """
    path = path.absolute()
    folder = path.parent / (path.name + SUFFIX)
    if not folder.is_dir():
        return Beside()
    from mlxkv.models.gemma4_assistant import MODEL_TYPES, AssistantConfig
    from mlxkv.models.gemma4_config import Config

    if not isinstance(config, Config):
        return Beside()
    try:
        raw, source = read_config(folder), str(folder / "config.json")
        if raw.get("model_type") not in MODEL_TYPES:
            raise CheckpointError(f"{source}: is of no assistant")
        quantization = Quantization.from_config(raw, source)
        found = AssistantConfig.from_dict(raw, source)
        if not found.fits(config):
            raise CheckpointError(f"{source}: the assistant is not one of {path}")
        weights = open_weights(folder).arrays()
        packed = [name.removesuffix(".scales") for name in weights if name.endswith(".scales")]
        if packed and quantization is None:
            raise CheckpointError(f"{source}: key 'quantization' is missing and weights are packed")
    except CheckpointError as error:
        _log.warning("the assistant is left out: %s", error)
        return Beside()
    if found.text.tie_word_embeddings:
        weights = {k: array for k, array in weights.items() if not k.startswith("lm_head.")}
        packed = [name for name in packed if name != "lm_head"]
    formats = {} if quantization is None else {PREFIX + at: quantization.at(at) for at in packed}
    return Beside(found, {PREFIX + k: array for k, array in weights.items()}, formats)
