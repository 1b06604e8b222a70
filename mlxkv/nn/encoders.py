"""Encoders of pictures and sound, whose weights come into memory when they are first needed.

A model that answers text alone reads none of them: 0.8 GB of Gemma 3 4B's 16-bit weights. Until
then every float of an encoder is NaN, so that a result without its weights cannot look like one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlxkv.checkpoint.tensor_names import tower_of

IMAGE, AUDIO = "image", "audio"
"""Kinds of media, as in `mlxkv.media.types`, which models do not import."""

ENCODERS: Mapping[str, tuple[str, ...]] = {
    IMAGE: ("vision_tower", "vision_embedder"),
    AUDIO: ("audio_tower",),
}
"""Kind of media -> modules at a model's root that only its rows need. What
projects the rows is not among them: Gemma 3n embeds tokens of text with it too."""


def encoder_of(name: str) -> str | None:
    """The kind of media whose encoder a parameter or module is part of; None for all others."""
    module = name.partition(".")[0]
    return next((kind for kind, modules in ENCODERS.items() if module in modules), None)


def serves_media(name: str) -> bool:
    """Whether a parameter or module is part of an encoder, or of what projects its rows."""
    return tower_of(name) is not None


def placeholder(array: mx.array) -> mx.array:
    """An array of this shape and dtype that takes a few bytes: NaN, or 0 of integers."""
    value = float("nan") if mx.issubdtype(array.dtype, mx.floating) else 0
    return mx.broadcast_to(mx.array(value, array.dtype), array.shape)


class Waiting:
    """The encoders of a model whose weights are not in memory yet.

    Args:
        n_bytes: kind of media -> bytes that its encoder's weights will take.
        load: brings those of one kind into memory; gets the model, which this does not keep alive.
    """

    def __init__(self, n_bytes: Mapping[str, int], load: Callable[[Any, str], None]):
        self._n_bytes, self._load = dict(n_bytes), load

    def nbytes(self, kind: str | None = None) -> int:
        """Bytes that one kind's encoder, or all for None, will take."""
        return sum(n for each, n in self._n_bytes.items() if kind in (None, each))

    def load(self, model: Any, kind: str) -> None:
        """Load the encoder of one kind, unless it is in memory."""
        if kind in self._n_bytes:
            self._load(model, kind)
            del self._n_bytes[kind]
