"""Encoders of pictures in the file that llama.cpp has beside a language model's (`mmproj`).

The names and transformations are those of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.errors import CheckpointError, UnsupportedModel, WeightsError

from ..tensors import matrix_shape
from .file import GGUFFile, check_readable, open_gguf
from .metadata import Metadata
from .projectors import PROJECTORS, SOUND, Change, Projector, has_swapped_mlp
from .weight import GGUFWeight

ARCHITECTURE = "clip"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderWeight(GGUFWeight):
    """A tensor of an encoder, always dequantized.

    Attributes:
        changed: the shape of its values, and what makes them of the file's; None for the file's.
    """

    changed: Change | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.changed is None else self.changed[0]

    @property
    def quantization(self) -> None:
        return None

    def rows(self, start: int, stop: int) -> mx.array:
        if self.changed is None:
            return GGUFWeight.rows(self, start, stop)
        stored_shape, (shape, change) = self.tensor.shape, self.changed
        stored = np.array(GGUFWeight.rows(self, 0, matrix_shape(stored_shape)[0]))
        values = change(stored.reshape(stored_shape)).reshape(matrix_shape(shape))
        return mx.array(values[start:stop])


def open_mmproj(path: Path) -> GGUFFile:
    """Open a file of encoders.

    Raises:
        CheckpointError: it is damaged, or a language model.
    """
    file = open_gguf(path)
    if file.architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{path}: its architecture is {file.architecture!r}; a file of encoders has 'clip'"
        )
    return file


def projector_of(file: GGUFFile) -> Projector:
    """Raises UnsupportedModel for encoders of another kind."""
    metadata = file.metadata
    kind = metadata.get("clip.vision.projector_type") or metadata.get("clip.projector_type")
    found = PROJECTORS.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise UnsupportedModel(
            f"{file.path}: projector type {kind!r} is not supported; supported are "
            f"{', '.join(sorted(PROJECTORS))}"
        )
    return found


def sound_projector_of(file: GGUFFile) -> Projector | None:
    """That of the file's encoder of sound; None without one, or with one of another kind."""
    kind = file.metadata.get("clip.audio.projector_type")
    return SOUND.get(kind) if isinstance(kind, str) else None


def misfit(file: GGUFFile, language: GGUFFile, text: Mapping[str, Any]) -> str | None:
    """Why a file of encoders is not of this language model; None where it fits.

    Raises:
        UnsupportedModel: encoders of a kind that is not supported.
    """
    projector = projector_of(file)
    if projector.architecture != language.architecture:
        return f"is for {projector.architecture}, the model is {language.architecture}"
    size, hidden = Metadata(file).int("vision.projection_dim"), text["hidden_size"]
    if size != hidden:
        return f"makes rows of {size}, the model's have {hidden}"
    return None


def with_encoders(file: GGUFFile, text: Mapping[str, Any], tokens: Any) -> dict[str, Any]:
    """The config of a multimodal model.

    Args:
        text: the language model's config.
        tokens: the vocabulary, a list of texts.

    Raises:
        ConfigError: a key is missing or wrong.
    """
    projector, sound = projector_of(file), sound_projector_of(file)
    outer: dict[str, Any] = {}
    for part in (projector,) if sound is None else (projector, sound):
        outer[part.section], more = part.config(Metadata(file), file)
        outer |= more | _token_ids(part, tokens, text.get("pad_token_id", 0))
    name = projector.model_type.capitalize()
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": projector.model_type,
        **{key: text[key] for key in keys if key in text},
        "text_config": dict(text),
        **outer,
    }


def _token_ids(part: Projector, tokens: Any, other: int) -> dict[str, int]:
    """The ids of an encoder's tokens, as far as the vocabulary has them.

    A row takes a token's place, which must have an embedding: where the vocabulary ends before
    the row's own token, it is `other`.
    """
    if not isinstance(tokens, list):
        return {}
    places = {token: i for i, token in enumerate(tokens)}
    *around, own = part.tokens.items()
    found = {key: places[token] for key, token in around if token in places}
    return found | {own[0]: places.get(own[1], other)}


def encoder_weights(file: GGUFFile) -> tuple[dict[str, EncoderWeight], list[str]]:
    """The tensors of encoders under our names, and the names of one of sound that is left out.

    Raises:
        WeightsError: names that the encoder does not have.
        UnsupportedModel: a ggml type that cannot be dequantized.
    """
    pictures, hearing = projector_of(file), sound_projector_of(file)
    swapped = has_swapped_mlp(file)
    found: dict[str, EncoderWeight] = {}
    sound, unknown = [], []
    for tensor in file.tensors.values():
        of_sound = tensor.name.startswith(("a.", "mm.a."))
        if of_sound and hearing is None:
            sound.append(tensor.name)
            continue
        projector = hearing if of_sound and hearing is not None else pictures
        name = projector.our_name(tensor.name, swapped and not of_sound)
        if name is None:
            unknown.append(tensor.name)
            continue
        check_readable(file, tensor)
        added = 1.0 if tensor.name in projector.norms_plus_one else 0.0
        changed = projector.change(tensor.name, tensor.shape)
        found[name] = EncoderWeight(
            file=file, tensor=tensor, name=name, added=added, changed=changed
        )
    if unknown:
        raise WeightsError(
            f"{file.path}: {len(unknown)} tensors that its encoder does not have: "
            f"{', '.join(sorted(unknown)[:12])}"
        )
    return found, sound
