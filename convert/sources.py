"""A directory of safetensors or a GGUF file as a `Source`: opened and checked, no tensor read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlxkv.checkpoint.config import text_config
from mlxkv.errors import ConfigError, one_line
from mlxkv.models import Family, family_for
from mlxkv.models.loader import random_state_kept

from .tensors import SourceTensor

# Far more than any published model: a config with more is damaged, and building its model would
# take the machine's memory.
_LIMITS = {
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: the directory or file, for messages.
        config: config.json as the source holds it, in either Hugging Face style.
        family: which definition runs it.
        parsed: the family's config.
        tensors: by the model's own names, complete and of the right shapes.
        default_dtype: of what is not quantized without `--dtype`; None keeps each tensor's.
        side_files: names of what `write_side_files` writes: the tokenizer and the like.
        skipped: names that are left out, with the reason.
        tied: whether the head is the embedding.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    parsed: Any
    tensors: Mapping[str, SourceTensor]
    write_side_files: Callable[[Path], None]
    side_files: tuple[str, ...]
    default_dtype: str | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    tied: bool = False


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_config(raw: Mapping[str, Any], source: str, n_tensors: int) -> tuple[Family, Any]:
    """The family of a config, and its parsed config.

    Args:
        n_tensors: of the checkpoint: a model cannot have more layers.

    Raises:
        UnsupportedModel: an unknown architecture.
        ConfigError: a key is missing, wrong, not understood, or far too large.
    """
    family = family_for(raw, source)
    inner = text_config(raw)
    for key, limit in (*_LIMITS.items(), ("num_hidden_layers", n_tensors)):
        value = inner.get(key)
        if isinstance(value, int) and value > limit:
            raise ConfigError(f"{source}: {key} is {value:,}, more than this checkpoint can have")
    return family, family.config(raw, source)


def expected_shapes(family: Family, config: Any, source: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the model's definition; nothing is allocated.

    Raises:
        ConfigError: the numbers do not make a model.
    """
    try:
        with random_state_kept():
            root = family.build(config).weights_root()
        parameters = dict(tree_flatten(root.parameters()))
    except (ArithmeticError, IndexError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{source}: its numbers do not make a model: {one_line(error)}"
        ) from error
    return {name: tuple(array.shape) for name, array in parameters.items()}
