"""The assistant of a Gemma 4, in a directory beside the model's: its name and `-assistant`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxkv.checkpoint.config import read_config
from mlxkv.checkpoint.weights import open_weights
from mlxkv.errors import CheckpointError

if TYPE_CHECKING:
    from mlxkv.models.gemma4_assistant import AssistantConfig

SUFFIX = "-assistant"
PREFIX = "assistant."
"""Of its parameters' names in the model's."""

_log = logging.getLogger("mlxkv")


def assistant_beside(
    path: Path, config: Any
) -> tuple[AssistantConfig | None, Mapping[str, mx.array]]:
    """The config and lazy weights of a model's assistant; None and nothing without one.

    One that cannot be used is named in the log, and left out: no answer depends on it.

    Args:
        path: the model's directory.
        config: the model's.
    """
    path = path.absolute()
    folder = path.parent / (path.name + SUFFIX)
    if not folder.is_dir():
        return None, {}
    from mlxkv.models.gemma4_assistant import MODEL_TYPES, AssistantConfig
    from mlxkv.models.gemma4_config import Config

    if not isinstance(config, Config):
        return None, {}
    try:
        raw, source = read_config(folder), str(folder / "config.json")
        if raw.get("model_type") not in MODEL_TYPES or raw.get("quantization"):
            raise CheckpointError(f"{source}: is of no assistant in 16 or 32 bits")
        found = AssistantConfig.from_dict(raw, source)
        if not found.fits(config):
            raise CheckpointError(f"{source}: the assistant is not one of {path}")
        weights = open_weights(folder).arrays()
    except CheckpointError as error:
        _log.warning("the assistant is left out: %s", error)
        return None, {}
    if found.text.tie_word_embeddings:
        weights = {name: array for name, array in weights.items() if name != "lm_head.weight"}
    return found, {PREFIX + name: array for name, array in weights.items()}
