"""How a model takes pictures and sound: config.json and the files of its processor.

transformers 5 writes processor_config.json with an entry for each processor; older versions, and
many checkpoints, have one flat preprocessor_config.json. Models converted from GGUF have neither,
so each family has its defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxkv.base.regular import read_text
from mlxkv.errors import ConfigError
from mlxkv.media.types import AUDIO, IMAGE

BILINEAR, BICUBIC = 2, 3
"""Pillow's numbers of its filters, as processor configs have them."""


@dataclass(frozen=True)
class Family:
    """What the processors of a family assume where no file says it.

    Args:
        image: keys of an image processor.
        audio: keys of a feature extractor; None where it takes no sound.
        ids: keys of config.json that hold token ids, by our names; older keys first.
        texts: kind -> what the chat template writes for a picture or for sound.
        around: kind -> text before and behind it.
    """

    image: Mapping[str, Any]
    audio: Mapping[str, Any] | None
    ids: Mapping[str, int]
    texts: Mapping[str, str]
    around: str = ""


_SIGLIP = {"do_rescale": True, "rescale_factor": 1 / 255, "resample": BILINEAR}
_PATCHES = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": False,
    "resample": BICUBIC,
}
_MEL4 = {
    "feature_size": 128,
    "frame_length_ms": 20.0,
    "hop_length_ms": 10.0,
    "min_frequency": 0.0,
    "max_frequency": 8000.0,
    "preemphasis": 0.0,
    "preemphasis_htk_flavor": True,
    "fft_overdrive": False,
    "mel_floor": 1e-3,
    "input_scale_factor": 1.0,
    "audio_samples_per_token": 640,
}
_MEL3N = {
    **_MEL4,
    "frame_length_ms": 32.0,
    "min_frequency": 125.0,
    "max_frequency": 7600.0,
    "preemphasis": 0.97,
    "fft_overdrive": True,
    "mel_floor": 1e-5,
}
_GEMMA4 = Family(
    image=_PATCHES,
    audio=_MEL4,
    ids={
        "boi": 255999,
        "image": 258880,
        "eoi": 258882,
        "boa": 256000,
        "audio": 258881,
        "eoa": 258883,
    },
    texts={IMAGE: "<|image|>", AUDIO: "<|audio|>"},
)
FAMILIES: Mapping[str, Family] = {
    "gemma3": Family(
        image={
            **_SIGLIP,
            "do_normalize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        audio=None,
        ids={"boi": 255999, "image": 262144, "eoi": 256000},
        texts={IMAGE: "<start_of_image>"},
        around="\n\n",
    ),
    "gemma3n": Family(
        image={**_SIGLIP, "do_normalize": False},
        audio=_MEL3N,
        ids={
            "boi": 255999,
            "image": 262145,
            "eoi": 262144,
            "boa": 256000,
            "audio": 262273,
            "eoa": 262272,
        },
        texts={IMAGE: "<image_soft_token>", AUDIO: "<audio_soft_token>"},
        around="\n\n",
    ),
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
}
"""model_type -> its family."""


@dataclass(frozen=True)
class Configs:
    """The files of one model.

    Args:
        where: the model's directory.
        model: config.json.
        image, audio: of its processors; empty where the model has no such file.
    """

    where: Path
    model: Mapping[str, Any]
    image: Mapping[str, Any]
    audio: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """Of the whole model: `gemma3`, not `gemma3_text`."""
        return str(self.model.get("model_type"))

    def sub(self, key: str) -> Mapping[str, Any]:
        """A nested part of config.json; empty where it has none."""
        part = self.model.get(key)
        return part if isinstance(part, Mapping) else {}

    def token_id(self, name: str, default: int) -> int:
        """A token's id: `boi_token_id`, or `boi_token_index` as other versions have it."""
        for key in (f"{name}_token_id", f"{name}_token_index"):
            if self.model.get(key) is not None:
                return self.whole(self.model, key, "config.json")
        return default

    def number(self, part: Mapping[str, Any], key: str, file: str, least: float = 0) -> float:
        """A finite number."""
        value = part[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            raise ConfigError(
                f"{self.where / file}: key '{key}' must be a number of at least {least}; "
                f"got {value!r}"
            )
        return float(value)

    def whole(self, part: Mapping[str, Any], key: str, file: str, default: int = 0) -> int:
        """A whole number above 0."""
        value = part.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ConfigError(
                f"{self.where / file}: key '{key}' must be a whole number above 0; got {value!r}"
            )
        return value


def read_configs(model_dir: Path) -> Configs:
    """The files of a model that say how it takes media.

    Raises:
        ConfigError: one of them is no JSON object.
    """
    flat = _json(model_dir / "preprocessor_config.json")
    nested = _json(model_dir / "processor_config.json")
    return Configs(
        model_dir,
        _json(model_dir / "config.json"),
        {**flat, **nested, **_part(nested, "image_processor")},
        {**flat, **nested, **_part(nested, "feature_extractor", "audio_processor")},
    )


def _part(config: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    return next((config[key] for key in keys if isinstance(config.get(key), Mapping)), {})


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: a JSON object is needed")
    return content
