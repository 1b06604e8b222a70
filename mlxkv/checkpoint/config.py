"""config.json, read once into frozen dataclasses: the reader that names file and key in errors.

A number that changes the output has no default here: a family states its own, or it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

from mlxkv.base import regular
from mlxkv.checkpoint.tensor_names import TOWERS, has_mtp, has_next_token
from mlxkv.errors import ConfigError, ModelNotFound

MATHS_KEYS = frozenset(
    {
        "alibi", "attention_multiplier", "attention_out_bias", "attn_logit_softcapping",
        "attn_temperature_tuning", "clip_qkv", "embedding_multiplier", "final_logit_softcapping",
        "layer_types", "llama_4_scaling_beta", "logit_scale", "logits_scaling", "mlp_bias",
        "moe_intermediate_size", "mup_attn_multiplier", "no_rope_layers", "num_experts",
        "num_experts_per_tok", "num_kv_shared_layers", "num_local_experts", "parallel_attn",
        "parallel_residual", "partial_rotary_factor", "per_layer_config", "qk_layernorm", "qk_norm",
        "qkv_bias", "query_pre_attn_scalar", "residual_multiplier", "rope_interleaved",
        "rope_local_base_freq", "rope_parameters", "rope_scaling", "rope_theta", "rope_traditional",
        "rotary_pct", "scale_attn_by_inverse_layer_idx", "shared_intermediate_size", "sinks",
        "use_bidirectional_attention", "use_parallel_residual", "use_qk_norm",
        "word_embed_proj_dim",
    }
)  # fmt: skip
"""Keys that change the mathematics: a family refuses a config that sets one it does not read."""

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096
"""Bounds far above every model's, so that a damaged config cannot build absurd structures."""
MTP_LAYERS = "mtp_num_hidden_layers"
"""How many layers Qwen3.5 has to predict the token after next; Qwen3-Next's config does not say."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model.

    Raises:
        ModelNotFound: there is no such file.
        ConfigError: it is not JSON, or not an object.
    """
    try:
        raw = json.loads(regular.read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(f"{path}: no such file; a model directory holds one") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a JSON object; got {type(raw).__name__}")
    return raw


def read_config(model_dir: Path) -> dict[str, Any]:
    """`config.json` of a model directory, as it is.

    Raises:
        ModelNotFound: no such directory, or no config.json in it.
        ConfigError: the file is damaged.
    """
    return read_json(Path(model_dir) / "config.json")


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config, multimodal ones nest it under `text_config`.

    Keys of the outer level that the inner one leaves out (`quantization`, `dtype`, end tokens,
    `tie_word_embeddings`) are carried over. A head is tied where either says so: transformers 5
    ties by the outer level, and writes the text model's default inside.
    """
    inner = raw.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(raw)
    outer = {
        key: raw[key]
        for key in (
            "quantization", "quantization_config", "dtype", "torch_dtype", "eos_token_id",
            "bos_token_id", "tie_word_embeddings", "vocab_size",
        )
        if raw.get(key) is not None
    }  # fmt: skip
    found = {**outer, **{key: value for key, value in inner.items() if value is not None}}
    if raw.get("tie_word_embeddings") is True:
        found["tie_word_embeddings"] = True
    return found


def with_towers(raw: Mapping[str, Any], towers: Container[str]) -> dict[str, Any]:
    """A config with the configs of these towers only, of `tensor_names.TOWERS`.

    Text-only exports of multimodal models often keep the config of a tower that they leave out.
    """
    others = {f"{tower}_config" for tower in TOWERS if tower not in towers}
    return {key: value for key, value in raw.items() if key not in others}


def with_next_token(raw: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """A config that has a layer that predicts the token after next only where these weights do.

    Quantized releases often leave the layer out, and keep the config.
    """
    inner, own = raw.get("text_config"), {MTP_LAYERS: int(has_mtp(names))}
    if own[MTP_LAYERS] or MTP_LAYERS in text_config(raw):
        raw = {**raw, **({"text_config": {**inner, **own}} if isinstance(inner, Mapping) else own)}
    key, n_layers = "num_nextn_predict_layers", raw.get("num_hidden_layers")
    if not raw.get(key) or not isinstance(n_layers, int):
        return dict(raw)
    return {**raw, key: int(has_next_token(names, n_layers))}


class Fields:
    """A typed reader of a raw config that names file and key in its errors.

    It remembers what was read, so that `finish` can refuse what changes the mathematics and was
    not understood. A null counts as absent.

    Args:
        raw: the parsed object.
        source: the file it came from, for messages.
    """

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw, self.source = raw, source
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        self._read.add(key)
        return self.raw.get(key) is not None

    def error(self, key: str, message: str) -> ConfigError:
        """An error that names the file and this key."""
        return ConfigError(f"{self.source}: {key} {message}")

    def missing(self, key: str) -> ConfigError:
        return ConfigError(f"{self.source}: key {key!r} is missing and has no default")

    def any(self, key: str) -> Any:
        """The value as it is; None when absent."""
        self._read.add(key)
        return self.raw.get(key)

    def int(self, key: str, default: int | None = None, *, at_most: int = MAX_SIZE) -> int:
        """A whole number of at least 1; without a default the key is required."""
        value = self.opt_int(key, at_most=at_most)
        return self._or_default(key, value, default)

    def n_layers(self) -> int:
        """`num_hidden_layers`, which is required."""
        return self.int("num_hidden_layers", at_most=MAX_LAYERS)

    def opt_int(self, key: str, *, at_most: int = MAX_SIZE) -> int | None:
        """A whole number of at least 1, or None when absent or null."""
        return self._whole(key, 1, at_most) if self.has(key) else None

    def _whole(self, key: str, least: int, most: int) -> int:
        value = self.raw[key]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(key, f"must be a whole number from {least} to {most}; got {value!r}")
        return value

    def float(self, key: str, default: float | None = None) -> float:
        """A positive number; without a default the key is required."""
        return self._or_default(key, self.opt_float(key), default)

    def count(self, key: str, default: int, *, at_most: int = MAX_SIZE) -> int:
        """A whole number of at least 0."""
        return self._whole(key, 0, at_most) if self.has(key) else default

    def opt_float(self, key: str, *, zero: bool = False) -> float | None:
        """A positive number, or with `zero` 0 as well; None when absent or null."""
        if not self.has(key):
            return None
        value = self.raw[key]
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not (0 < value < 1e300 or (zero and value == 0)):
            raise self.error(key, f"must be a positive number; got {value!r}")
        return float(value)

    def bool(self, key: str, default: bool | None = None) -> bool:
        """True or false; without a default the key is required."""
        value = self.raw[key] if self.has(key) else None
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"must be true or false; got {value!r}")
        return self._or_default(key, value, default)

    def str(self, key: str, default: str | None = None, *, among: Sequence[str] = ()) -> str:
        """A text; without a default the key is required."""
        value = self.raw[key] if self.has(key) else None
        if value is not None and (not isinstance(value, str) or (among and value not in among)):
            allowed = f"one of {', '.join(among)}" if among else "a text"
            raise self.error(key, f"must be {allowed}; got {value!r}")
        return self._or_default(key, value, default)

    def strings(self, key: str, length: int, among: Sequence[str]) -> tuple[str, ...] | None:
        """A list of `length` texts, or None when absent."""
        if not self.has(key):
            return None
        value = self.raw[key]
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, f"must be a list of {length}; got {short(value)}")
        for item in value:
            if item not in among:
                raise self.error(key, f"holds {item!r}; allowed are {', '.join(among)}")
        return tuple(value)

    def floats(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers; required."""
        if not self.has(key):
            raise self.missing(key)
        value = self.raw[key]
        if not isinstance(value, list) or not all(
            isinstance(item, int | float) and 0 < item < 1e300 for item in value
        ):
            raise self.error(key, f"must be a list of positive numbers; got {short(value)}")
        return tuple(float(item) for item in value)

    def nested(self, key: str) -> Fields:
        """A reader of the object under this key, `{}` when absent."""
        value = self.any(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be an object; got {value!r}")
        return Fields(value, f"{self.source}: {key}")

    def with_defaults(self, defaults: Mapping[str, Any]) -> Fields:
        """The same reader with values for absent keys."""
        return self.with_values(
            {key: value for key, value in defaults.items() if not self.has(key)}
        )

    def with_values(self, values: Mapping[str, Any]) -> Fields:
        """The same reader with these values, whatever was there."""
        fields = Fields({**self.raw, **values}, self.source)
        fields._read = self._read
        return fields

    def ignore(self, *keys: str) -> None:
        """Keys known to say nothing in this family."""
        self._read.update(keys)

    def finish(self) -> None:
        """Refuse keys that change the mathematics and were not read.

        Raises:
            ConfigError: one of `MATHS_KEYS` is set and was not read.
        """
        for key in sorted(MATHS_KEYS & set(self.raw) - self._read):
            if self.raw[key] not in (None, False, {}, []):
                raise self.error(
                    key,
                    f"changes the mathematics and is not understood for model_type "
                    f"{self.raw.get('model_type')!r}; got {short(self.raw[key])}",
                )

    def _or_default(self, key: str, value: Any, default: Any) -> Any:
        if value is not None:
            return value
        if default is None:
            raise self.missing(key)
        return default


def refuse_bidirectional(fields: Fields, *others: Any) -> None:
    """Refuse Gemmas with bidirectional attention, which make embeddings, not text.

    Args:
        fields: the config.
        others: values of the key that are allowed beside false.
    """
    if fields.any("use_bidirectional_attention") not in (None, False, *others):
        raise fields.error("use_bidirectional_attention", "is for embeddings; not supported")
