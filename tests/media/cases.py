"""Pictures and sound whose processed values are stored in golden.npz."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.support.paths import ROOT

MEDIA_GOLDEN = ROOT / "tests" / "media" / "golden.npz"
BUDGETS = (70, 140, 280, 560, 1120)
EVERY = 101
"""Of the values, one in so many is stored."""
PIXELS = ("wide", "high", "small", "exact")
SAMPLES = (513, 640, 4_000, 16_001, 32_100)


def picture_of(name: str) -> Image.Image:
    """An RGB picture of noise over a gradient."""
    width, height = {
        "wide": (613, 201),
        "high": (97, 452),
        "small": (9, 7),
        "exact": (336, 480),
    }[name]
    rng = np.random.default_rng(width)
    slope = np.indices((height, width))[:, :, :, None] * [[[[1.0, 0.5, 0.0]]], [[[0.0, 0.5, 1.0]]]]
    levels = slope.sum(0) * 200 / (height + width) + rng.normal(0, 25, (height, width, 3))
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def sound_of(n_samples: int) -> np.ndarray:
    """A tone in noise, loud enough that rounding does not show in the logarithm of a mel."""
    rng = np.random.default_rng(n_samples)
    tone = 0.3 * np.sin(np.arange(n_samples) * 0.2)
    return (tone + rng.normal(0, 0.1, n_samples)).astype(np.float32)
