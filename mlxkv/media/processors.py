"""The processors of a model, made of its config and of its family's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxkv.errors import ConfigError
from mlxkv.media.config import Configs, Family
from mlxkv.media.features import AudioProcessor, Mel, Mel3n, Mel4, RawSamples
from mlxkv.media.pan_and_scan import PanAndScan
from mlxkv.media.pixels import ImageProcessor, Normalisation, Patches, Squares
from mlxkv.media.sound import RATE

_FILE = "preprocessor_config.json"
_RATIO = "pan_and_scan_min_ratio_to_activate"


def images_of(configs: Configs, family: Family) -> ImageProcessor | None:
    """How pictures become pixels; None for a model without a `vision_config`."""
    if not configs.sub("vision_config"):
        return None
    keys = {**family.image, **{k: v for k, v in configs.image.items() if v is not None}}
    resample = keys["resample"]
    if resample not in range(6):
        raise ConfigError(
            f"{configs.where / _FILE}: key 'resample' must be a filter of Pillow, 0 to 5; "
            f"got {resample!r}"
        )
    vision = configs.sub("vision_config")
    if configs.model_type.startswith("gemma4"):
        return Patches(
            configs.whole(vision, "patch_size", "config.json", 16),
            configs.whole(vision, "pooling_kernel_size", "config.json", 3),
            configs.whole(keys, "max_soft_tokens", _FILE, 280),
            configs.model_type == "gemma4_unified",
            resample,
            _normalisation(configs, keys),
        )
    return _squares(configs, keys, resample)


def _squares(configs: Configs, keys: Mapping[str, Any], resample: int) -> Squares:
    if configs.model_type == "gemma3":
        vision = configs.sub("vision_config")
        side = configs.whole(vision, "image_size", "config.json", 896)
        tokens = configs.whole(configs.model, "mm_tokens_per_image", "config.json", 256)
    else:
        side = 768
        tokens = configs.whole(configs.model, "vision_soft_tokens_per_image", "config.json", 256)
    crops = None
    if keys.get("do_pan_and_scan"):
        crops = PanAndScan(
            configs.whole(keys, "pan_and_scan_min_crop_size", _FILE, 256),
            configs.whole(keys, "pan_and_scan_max_num_crops", _FILE, 4),
            configs.number({_RATIO: 1.2, **keys}, _RATIO, _FILE, least=1),
        )
    size = keys.get("size")
    size = size if isinstance(size, Mapping) else {}
    return Squares(
        configs.whole(size, "width", _FILE, side),
        configs.whole(size, "height", _FILE, side),
        tokens,
        resample,
        _normalisation(configs, keys),
        crops,
    )


def _normalisation(configs: Configs, keys: Mapping[str, Any]) -> Normalisation:
    scale = configs.number(keys, "rescale_factor", _FILE) if keys["do_rescale"] else 1.0
    if not keys["do_normalize"]:
        return Normalisation(scale)
    mean, std = keys.get("image_mean", [0.5] * 3), keys.get("image_std", [0.5] * 3)
    try:
        means, stds = (tuple(float(value) for value in part) for part in (mean, std))
        (_, _, _), (_, _, _) = means, stds
        return Normalisation(scale, means, stds)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{configs.where / _FILE}: 'image_mean' and 'image_std' must be three numbers each; "
            f"got {mean!r} and {std!r}"
        ) from error


def sounds_of(configs: Configs, family: Family) -> AudioProcessor | None:
    """How samples become features; None for a model without an `audio_config`."""
    if family.audio is None or not configs.sub("audio_config"):
        return None
    audio = configs.sub("audio_config")
    own = {"feature_size": audio.get("input_feat_size")}
    own["audio_samples_per_token"] = audio.get("audio_embed_dim")
    given = [*own.items(), *configs.audio.items()]
    keys = {**family.audio, **{k: v for k, v in given if v is not None}}
    if configs.whole(keys, "sampling_rate", _FILE, RATE) != RATE:
        raise ConfigError(
            f"{configs.where / _FILE}: key 'sampling_rate' must be {RATE}; "
            f"got {keys['sampling_rate']}"
        )
    if configs.model_type == "gemma4_unified":
        return RawSamples(configs.whole(keys, "audio_samples_per_token", _FILE))
    if configs.model_type == "gemma4":
        return Mel4(_mel(configs, keys))
    tokens = configs.whole(configs.model, "audio_soft_tokens_per_image", "config.json", 188)
    return Mel3n(_mel(configs, keys), tokens)


def _mel(configs: Configs, keys: Mapping[str, Any]) -> Mel:
    def samples(key: str) -> int:
        return round(RATE * configs.number(keys, key, _FILE, least=0.1) / 1000)

    per_bin = [
        tuple(float(value) for value in keys.get(key) or ())
        for key in ("per_bin_mean", "per_bin_stddev")
    ]
    return Mel(
        n_mels=configs.whole(keys, "feature_size", _FILE),
        frame=samples("frame_length_ms"),
        hop=samples("hop_length_ms"),
        overdrive=bool(keys["fft_overdrive"]),
        lowest=configs.number(keys, "min_frequency", _FILE),
        highest=configs.number(keys, "max_frequency", _FILE),
        preemphasis=configs.number(keys, "preemphasis", _FILE),
        htk=bool(keys["preemphasis_htk_flavor"]),
        floor=configs.number(keys, "mel_floor", _FILE),
        scale=configs.number(keys, "input_scale_factor", _FILE),
        mean=per_bin[0],
        std=per_bin[1],
    )
