"""What a model takes beside text, and how: the entry of this room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxkv.errors import ConfigError, MediaError
from mlxkv.media.config import FAMILIES, Configs, Family, read_configs
from mlxkv.media.pictures import ImageSource, picture
from mlxkv.media.pixels import ImageProcessor, Normalisation, Patches, Squares
from mlxkv.media.source import name_of
from mlxkv.media.types import IMAGE, Medium


@dataclass(frozen=True)
class Placeholder:
    """How a picture or a piece of sound stands in a prompt.

    In the prompt's text `text` becomes `before`, the tokens `begin`, `Medium.ids` and `end`, and
    `after`.

    Args:
        text: what the chat template writes for it.
        before, after: ordinary text, encoded together with its neighbours.
        begin, end: tokens around the rows; end None for none.
        token: the vocabulary's token that stands for one row.
    """

    text: str
    before: str
    after: str
    begin: int
    end: int | None
    token: int


@dataclass(frozen=True)
class MediaReader:
    """Reads pictures and sound as one model takes them.

    Args:
        placeholders: kind -> how it stands in a prompt.
        images: None for a model that takes no pictures.
    """

    placeholders: Mapping[str, Placeholder]
    images: ImageProcessor | None

    @property
    def kinds(self) -> frozenset[str]:
        """Of `KINDS`, what the model's config has encoders for."""
        return frozenset(self.placeholders)

    def image(self, source: ImageSource, budget: int | None = None, name: str = "") -> Medium:
        """Read a picture.

        Args:
            source: path, bytes of a file, PIL image, or array as `pictures.picture` takes it.
            budget: most tokens, one of `pixels.BUDGETS`, for models that let them be chosen.
            name: for messages; the file's where it is "".

        Raises:
            MediaError: it cannot be read, or the model takes no pictures.
        """
        name = name_of(source, name, "")
        processor = self._images(name or "the picture")
        made = processor(picture(source, name), budget)
        token = self.placeholders[IMAGE].token
        return Medium(IMAGE, made.digest, made.n_tokens, token, name, made.data)

    def image_tokens(self, width: int, height: int, budget: int | None = None) -> int:
        """Tokens of a picture of this size, in pixels, upright."""
        return self._images("the picture").n_tokens(width, height, budget)

    def _images(self, name: str) -> ImageProcessor:
        if self.images is None:
            raise MediaError(f"{name}: this model takes no pictures")
        return self.images


def reader_of(model_dir: Path) -> MediaReader | None:
    """The reader of a model; None for one whose config has no encoders.

    Raises:
        ConfigError: its config or its processor's cannot be understood.
    """
    configs = read_configs(model_dir)
    family = FAMILIES.get(configs.model_type)
    if family is None:
        return None
    images = _images_of(configs, family) if configs.sub("vision_config") else None
    if images is None:
        return None
    placeholders = {IMAGE: _placeholder(configs, family, IMAGE, "boi", "image", "eoi")}
    return MediaReader(placeholders, images)


def _placeholder(
    configs: Configs, family: Family, kind: str, begin: str, token: str, end: str
) -> Placeholder:
    ids = {name: configs.token_id(name, family.ids[name]) for name in (begin, token, end)}
    around = family.around
    return Placeholder(family.texts[kind], around, around, ids[begin], ids[end], ids[token])


_FILE = "preprocessor_config.json"


def _images_of(configs: Configs, family: Family) -> ImageProcessor:
    keys = {**family.image, **{k: v for k, v in configs.image.items() if v is not None}}
    resample = configs.whole(keys, "resample", _FILE)
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
    if configs.model_type == "gemma3":
        side = configs.whole(vision, "image_size", "config.json", 896)
        tokens = configs.whole(configs.model, "mm_tokens_per_image", "config.json", 256)
    else:
        side = 768
        tokens = configs.whole(configs.model, "vision_soft_tokens_per_image", "config.json", 256)
    size = keys.get("size")
    size = size if isinstance(size, Mapping) else {}
    return Squares(
        configs.whole(size, "width", _FILE, side),
        configs.whole(size, "height", _FILE, side),
        tokens,
        resample,
        _normalisation(configs, keys),
    )


def _normalisation(configs: Configs, keys: Mapping[str, Any]) -> Normalisation:
    scale = keys["rescale_factor"] if keys["do_rescale"] else 1.0
    if not keys["do_normalize"]:
        return Normalisation(scale)
    mean, std = keys.get("image_mean", [0.5] * 3), keys.get("image_std", [0.5] * 3)
    try:
        means, stds = (tuple(float(value) for value in part) for part in (mean, std))
        (_, _, _), (_, _, _) = means, stds
        return Normalisation(float(scale), means, stds)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{configs.where / _FILE}: 'image_mean' and 'image_std' must be three numbers each; "
            f"got {mean!r} and {std!r}"
        ) from error
