"""PEFT's adapters: `adapter_model.safetensors` and `adapter_config.json`.

Reference: `tuners/lora` of https://github.com/huggingface/peft. What its config may ask for beyond
LoRA, rslora, patterns and DoRA is refused by key: it would change the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxkv.checkpoint.adapter import CONFIG, PEFT, Adapter, Target, digest_of, pair, tensors_of
from mlxkv.checkpoint.config import Fields, read_json
from mlxkv.errors import ConfigError, UnsupportedModel, WeightsError

_REFUSED = (
    "modules_to_save", "fan_in_fan_out", "layer_replication", "lora_bias", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "trainable_token_indices", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Of `init_lora_weights`: those that leave the base's weights as they are."""
_NAME = re.compile(
    r"^base_model\.model\.(?P<path>.+?)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?$"
)


def read_peft(folder: Path) -> Adapter:
    """Read PEFT's adapter; errors as for `open_adapter`."""
    file, source = folder / PEFT, str(folder / CONFIG)
    raw = read_json(folder / CONFIG)
    _check(raw, source)
    scales = Scales(raw, source)
    modules: dict[str, dict[str, mx.array]] = {}
    for key, array in tensors_of(file).items():
        match = _NAME.match(key)
        if match is None:
            raise WeightsError(f"{file}: tensor {key} is no part of LoRA or DoRA")
        modules.setdefault(match["path"], {})[match["part"]] = array
    of_parameters = bool(raw.get("target_parameters"))
    targets = {
        path: _target(str(file), path, parts, scales, of_parameters)
        for path, parts in modules.items()
    }
    base = str(raw.get("base_model_name_or_path") or "")
    method = "DoRA" if raw.get("use_dora") else "LoRA"
    digest = digest_of([folder / CONFIG, file])
    return Adapter(str(folder), "PEFT", method, base, targets, digest)


class Scales:
    """The factor of each target: alpha / r, or alpha / sqrt(r), by the patterns of the config."""

    def __init__(self, raw: Mapping[str, Any], source: str):
        fields = Fields(raw, source)
        self._source = source
        self._r, self._alpha = fields.int("r"), fields.float("lora_alpha")
        self._is_rs = fields.bool("use_rslora", False)
        self._ranks, self._alphas = (
            self._pattern(raw, key) for key in ("rank_pattern", "alpha_pattern")
        )

    def rank(self, path: str) -> int:
        return int(_matched(self._ranks, path, self._r))

    def __call__(self, path: str) -> float:
        rank = self.rank(path)
        alpha = _matched(self._alphas, path, self._alpha)
        return alpha / (math.sqrt(rank) if self._is_rs else rank)

    def _pattern(self, raw: Mapping[str, Any], key: str) -> list[tuple[re.Pattern[str], float]]:
        found = raw.get(key) or {}
        try:
            return [(re.compile(rf"(.*\.)?({k})$"), float(v)) for k, v in found.items()]
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise ConfigError(f"{self._source}: key {key!r} cannot be read ({error})") from error


def _matched(patterns: list[tuple[re.Pattern[str], float]], path: str, default: float) -> float:
    """The value of the first pattern that fits, as PEFT has it."""
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _check(raw: Mapping[str, Any], source: str) -> None:
    if (kind := raw.get("peft_type")) != "LORA":
        raise UnsupportedModel(f"{source}: key 'peft_type' is {kind!r}; supported is LORA")
    for key in _REFUSED:
        if raw.get(key):
            raise ConfigError(
                f"{source}: key {key!r} is {raw[key]!r:.80}, which is not supported: train without "
                "it, or merge the adapter into its model with PEFT"
            )
    if raw.get("bias", "none") != "none":
        raise ConfigError(f"{source}: key 'bias' must be none; got {raw['bias']!r}")
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        raise ConfigError(
            f"{source}: key 'init_lora_weights' is {start!r}, which changes the base's weights: "
            "save the adapter with `path_initial_model_for_weight_conversion`"
        )


def _target(
    source: str, path: str, parts: Mapping[str, mx.array], scales: Scales, of_parameters: bool
) -> Target:
    key, magnitude = f"base_model.model.{path}", parts.get("lora_magnitude_vector")
    if "lora_embedding_A" in parts or "lora_embedding_B" in parts:
        a, b = pair(source, key, parts, ("lora_embedding_A", "lora_embedding_B"))
        return Target(f"{key}.lora_embedding_A", a.T, b.T, scales(path), magnitude, "embedding")
    a, b = pair(source, key, parts, ("lora_A", "lora_B"))
    name = f"{key}.lora_A.weight"
    if of_parameters and (rank := scales.rank(path)) != a.shape[0]:
        if a.shape[0] % rank:
            raise WeightsError(f"{source}: {name} has {a.shape[0]} rows; 'r' is {rank}")
        return Target(name, a, b, scales(path), None, "experts")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != scales.rank(path):
        raise WeightsError(
            f"{source}: {name} is {list(a.shape)}; by adapter_config.json its rank is "
            f"{scales.rank(path)}"
        )
    flat = None if magnitude is None else magnitude.flatten()
    return Target(name, a.T, b.T, scales(path), flat)
