"""The registry: which file defines a `model_type`. A family's module is imported when asked for.

A family's module has `Config.from_dict(raw, source)`, `Model(config)` and
`remap(weights, config) -> (weights, skipped names)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxkv.errors import ConfigError, UnsupportedModel

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxkv.nn.model import CausalLM

NATIVE = {
    "llama": "llama",
    "mistral": "llama",
    "ministral": "llama",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma3n": "gemma3n",
    "gemma3n_text": "gemma3n",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "gemma4_unified_text": "gemma4",
    "glm": "glm4",
    "glm4": "glm4",
    "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "glm4_moe_lite",
    "glm_moe_dsa": "glm_moe_dsa",
    "gpt_oss": "gpt_oss",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_next": "qwen3_next",
    "qwen3_5": "qwen3_5",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5",
    "embedding_gemma2": "embedding_gemma2",
    "embedding_gemma2_text": "embedding_gemma2",
}
"""`model_type` of config.json -> module of this package; `family_for` has the exception."""

EMBEDDERS = frozenset({"embedding_gemma", "embedding_gemma2"})
"""Modules whose models make vectors of texts (`nn.embedder`), and write no tokens."""


@dataclass(frozen=True, slots=True)
class Family:
    """Where a model's definition comes from.

    Args:
        name: the family, for people.
        module: import path of its definition.
    """

    name: str
    module: str

    @property
    def native(self) -> bool:
        """Whether the definition is mlxkv's own; else it is mlx-lm's, on mlxkv's caches."""
        return self.name != "mlx-lm"

    @property
    def embeds(self) -> bool:
        """Whether its models make vectors of texts; else they write tokens."""
        return self.name in EMBEDDERS

    def config(self, raw: Mapping[str, Any], source: str) -> Any:
        """The family's frozen config.

        Raises:
            ConfigError: a key is missing, wrong or not understood.
        """
        return self._load().Config.from_dict(raw, source)

    def build(self, config: Any) -> CausalLM:
        """A model with placeholder weights, nothing of it computed yet."""
        return self._load().Model(config)

    def remap(
        self, weights: Mapping[str, mx.array], config: Any
    ) -> tuple[dict[str, mx.array], list[str]]:
        """Checkpoint names -> the model's, and the names left out on purpose."""
        return self._load().remap(weights, config)

    def _load(self) -> Any:
        return importlib.import_module(self.module)


def family_for(raw: Mapping[str, Any], source: str) -> Family:
    """The family that defines a config's `model_type`.

    Raises:
        ConfigError: there is no model_type.
        UnsupportedModel: neither mlxkv nor an installed mlx-lm defines it.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ConfigError(f"{source}: key 'model_type' is missing or not a text")
    if model_type == "gemma3_text" and raw.get("use_bidirectional_attention") is True:
        return Family("embedding_gemma", "mlxkv.models.embedding_gemma")
    if module := NATIVE.get(model_type):
        return Family(module, f"mlxkv.models.{module}")
    from mlxkv.models import foreign

    if foreign.defines(model_type):
        return Family("mlx-lm", "mlxkv.models.foreign")
    raise UnsupportedModel(
        f"{source}: model_type {model_type!r} is not supported; `mlxkv models` lists what is"
    )
