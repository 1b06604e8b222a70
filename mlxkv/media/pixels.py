"""RGB pictures to what the encoders take: the arithmetic of transformers' image processors.

Pictures are resized by Pillow, as transformers' `...Pil` processors do. Its torchvision processors
resize in other arithmetic, which differs by a level of 255 here and there, two at most, and is not
the same on every processor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

from mlxkv.errors import MediaError
from mlxkv.media.pan_and_scan import PanAndScan

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

BUDGETS = (70, 140, 280, 560, 1120)
"""Tokens of a picture that Gemma 4 can be asked for, at most."""


@dataclass(frozen=True)
class Processed:
    """What an encoder takes, the rows that it makes of it, and a digest that tells it apart."""

    data: Mapping[str, np.ndarray]
    n_tokens: int
    digest: bytes


class ImageProcessor(Protocol):
    """The preprocessing of one model."""

    def n_tokens(self, width: int, height: int, budget: int | None = None) -> int:
        """Tokens of a picture of this size."""
        ...

    def __call__(self, picture: Image, budget: int | None = None) -> Processed:
        """Process an RGB picture."""
        ...

    @property
    def crops(self) -> PanAndScan | None:
        """Whether crops of a picture follow it, and which."""
        ...


@dataclass(frozen=True)
class Normalisation:
    """Levels 0 to 255 to what the encoder takes: (level * scale - mean) / std."""

    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __call__(self, levels: np.ndarray) -> np.ndarray:
        """uint8 `[..., 3]` to float32."""
        import numpy as np

        std = np.array(self.std)
        pixels = levels * (self.scale / std).astype(np.float32)
        if any(self.mean):
            pixels -= (np.array(self.mean) / std).astype(np.float32)
        return pixels


@dataclass(frozen=True)
class Squares:
    """Gemma 3 and 3n: every picture stretched to one size, with one number of tokens.

    Args:
        width, height: pixels that the encoder takes.
        tokens: rows that it makes of them.
        resample: Pillow's number of the filter.
        normalisation: of the levels.
        crops: of wide and high pictures, where the processor's config asks for them.
    """

    width: int
    height: int
    tokens: int
    resample: int
    normalisation: Normalisation
    crops: PanAndScan | None = None

    def n_tokens(self, width: int, height: int, budget: int | None = None) -> int:
        if budget is not None and budget != self.tokens:
            raise MediaError(
                f"this model gives every picture {self.tokens} tokens; got a budget of {budget}"
            )
        return self.tokens

    def __call__(self, picture: Image, budget: int | None = None) -> Processed:
        n_tokens = self.n_tokens(*picture.size, budget)
        levels = _levels(picture, self.width, self.height, self.resample)
        digest = _digest(levels, self.normalisation, n_tokens)
        return Processed({"pixels": self.normalisation(levels)}, n_tokens, digest)


@dataclass(frozen=True)
class Patches:
    """Gemma 4: aspect kept, as many patches as the budget of tokens has room for.

    Args:
        patch: pixels of a patch's side.
        pool: patches that become a token, along each axis.
        budget: tokens of a picture at most, where none is given with it.
        merged: whether a patch is what becomes a token (`gemma4_unified`).
        resample: Pillow's number of the filter.
        normalisation: of the levels.
    """

    patch: int
    pool: int
    budget: int
    merged: bool
    resample: int
    normalisation: Normalisation

    @property
    def crops(self) -> None:
        """None: the budget serves instead."""

    @property
    def side(self) -> int:
        """Pixels of the square that becomes a token, along each axis."""
        return self.patch * self.pool

    def n_tokens(self, width: int, height: int, budget: int | None = None) -> int:
        columns, rows = self.grid(width, height, budget)
        return columns * rows

    def grid(self, width: int, height: int, budget: int | None = None) -> tuple[int, int]:
        """Columns and rows of tokens.

        Args:
            width, height: of the picture, pixels.
            budget: one of `BUDGETS`; None for the model's own.
        """
        budget = self.budget if budget is None else budget
        if budget not in BUDGETS and budget != self.budget:
            among = ", ".join(map(str, BUDGETS))
            raise MediaError(f"a picture's budget of tokens must be one of {among}; got {budget}")
        # In the order of the reference: a side that is a multiple within a rounding error counts.
        factor = math.sqrt(budget * self.pool**2 * self.patch**2 / (height * width))
        rows = math.floor(factor * height / self.side)
        columns = math.floor(factor * width / self.side)
        if not rows:
            return max(1, min(width // height, budget)), 1
        if not columns:
            return 1, max(1, min(height // width, budget))
        return columns, rows

    def __call__(self, picture: Image, budget: int | None = None) -> Processed:
        columns, rows = self.grid(*picture.size, budget)
        levels = _levels(picture, columns * self.side, rows * self.side, self.resample)
        digest = _digest(levels, self.normalisation, columns * rows)
        side, n = (self.side, 1) if self.merged else (self.patch, self.pool)
        patches = _cut(self.normalisation(levels), side)
        data = {"patches": patches, "positions": _positions(columns * n, rows * n)}
        return Processed(data, columns * rows, digest)


def _levels(picture: Image, width: int, height: int, resample: int) -> np.ndarray:
    """uint8 `[height, width, 3]`."""
    import numpy as np
    from PIL.Image import Resampling

    if picture.size != (width, height):
        picture = picture.resize((width, height), Resampling(resample))
    return np.asarray(picture)


def _cut(pixels: np.ndarray, side: int) -> np.ndarray:
    """`[H, W, 3]` to squares `[n, side * side * 3]`, row by row; each as row, column, channel."""
    height, width, channels = pixels.shape
    squares = pixels.reshape(height // side, side, width // side, side, channels)
    return squares.transpose(0, 2, 1, 3, 4).reshape(-1, side * side * channels)


def _positions(columns: int, rows: int) -> np.ndarray:
    """`[rows * columns, 2]`: x and y of each patch, row by row."""
    import numpy as np

    y, x = np.indices((rows, columns), dtype=np.int32)
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def _digest(levels: np.ndarray, normalisation: Normalisation, n_tokens: int) -> bytes:
    hashed = sha256(repr((levels.shape, normalisation, n_tokens)).encode())
    hashed.update(levels.data)
    return hashed.digest()
