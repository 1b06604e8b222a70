"""What a model takes beside text, and how: the entry of this room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxkv.errors import MediaError
from mlxkv.media.config import FAMILIES, Configs, Family, read_configs
from mlxkv.media.features import LONGEST, AudioProcessor
from mlxkv.media.pan_and_scan import BEFORE, BETWEEN
from mlxkv.media.pictures import ImageSource, picture
from mlxkv.media.pixels import ImageProcessor
from mlxkv.media.processors import images_of, sounds_of
from mlxkv.media.sound import SoundSource, decoded, windows
from mlxkv.media.source import name_of
from mlxkv.media.types import AUDIO, IMAGE, Medium

if TYPE_CHECKING:
    from PIL.Image import Image


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
        sounds: None for one that takes no sound.
    """

    placeholders: Mapping[str, Placeholder]
    images: ImageProcessor | None
    sounds: AudioProcessor | None

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
        self._images(name or "the picture")
        return self._image(picture(source, name), budget, name)

    def image_parts(
        self, source: ImageSource, budget: int | None = None, name: str = ""
    ) -> list[str | Medium]:
        """A picture, and crops of it with text between where the model's processor asks for them.

        Arguments and errors are those of `image`. Each medium stands in the prompt as the
        placeholder says; with one part this is `[image(...)]`.
        """
        name = name_of(source, name, "")
        crops = self._images(name or "the picture").crops
        whole = picture(source, name)
        parts: list[str | Medium] = [self._image(whole, budget, name)]
        boxes = crops.boxes(*whole.size) if crops else []
        for i, box in enumerate(boxes):
            parts += [" " if i else BETWEEN, self._image(whole.crop(box), budget, name)]
        return [BEFORE, *parts] if boxes else parts

    def _image(self, whole: Image, budget: int | None, name: str) -> Medium:
        made = self._images(name)(whole, budget)
        token = self.placeholders[IMAGE].token
        return Medium(IMAGE, made.digest, made.n_tokens, token, name, made.data)

    def image_tokens(self, width: int, height: int, budget: int | None = None) -> int:
        """Tokens of a picture of this size, in pixels, upright."""
        return self._images("the picture").n_tokens(width, height, budget)

    def audio(self, source: SoundSource, name: str = "") -> list[Medium]:
        """Read a recording, in windows of 30 s.

        Args:
            source: path, bytes of a file, or (samples, samples a second) as `sound.decoded` takes
                them.
            name: for messages; the file's where it is "".

        Raises:
            MediaError: it cannot be read, or the model takes no sound.
        """
        name = name_of(source, name, "")
        processor = self._sounds(name or "the recording")
        pieces = windows(decoded(source, name), LONGEST, processor.shortest, name)
        token = self.placeholders[AUDIO].token
        made = [processor(piece) for piece in pieces]
        return [Medium(AUDIO, m.digest, m.n_tokens, token, name, m.data) for m in made]

    def audio_tokens(self, n_samples: int) -> int:
        """Tokens of a recording of so many samples at 16 kHz, of all its windows."""
        processor = self._sounds("the recording")
        whole, rest = divmod(n_samples, LONGEST)
        last = processor.n_tokens(max(rest, processor.shortest)) if rest else 0
        return whole * processor.n_tokens(LONGEST) + last

    def _sounds(self, name: str) -> AudioProcessor:
        if self.sounds is None:
            raise MediaError(f"{name}: this model takes no sound")
        return self.sounds

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
    images, sounds = images_of(configs, family), sounds_of(configs, family)
    placeholders = {}
    if images is not None:
        placeholders[IMAGE] = _placeholder(configs, family, IMAGE, "boi", "image", "eoi")
    if sounds is not None:
        placeholders[AUDIO] = _placeholder(configs, family, AUDIO, "boa", "audio", "eoa")
    return MediaReader(placeholders, images, sounds) if placeholders else None


def _placeholder(
    configs: Configs, family: Family, kind: str, begin: str, token: str, end: str
) -> Placeholder:
    ids = {name: configs.token_id(name, family.ids[name]) for name in (begin, token, end)}
    around = family.around
    return Placeholder(family.texts[kind], around, around, ids[begin], ids[end], ids[token])
