"""Pictures and sound whose processed values are stored in golden.npz."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from tests.support.paths import ROOT

MEDIA_GOLDEN = ROOT / "tests" / "media" / "golden.npz"
BUDGETS = (70, 140, 280, 560, 1120)
EVERY = 101
"""Of the values, one in so many is stored."""
PIXELS = ("wide", "high", "small", "exact")
SAMPLES = (513, 640, 4_000, 16_001, 32_100)


MANY = 10_000
"""Sizes, and lengths, whose counts of tokens are stored as a hash."""


def many_sizes() -> np.ndarray:
    """Widths and heights: any, of any aspect, multiples of 48 pixels, and one pixel beside them."""
    rng, n = np.random.RandomState(48), MANY // 4
    near = rng.randint(1, 30, (n, 2)) * 48 + rng.randint(-1, 2, (n, 2))
    return np.concatenate(
        [
            rng.randint(4, 2000, (n, 2)),
            np.exp(rng.uniform(np.log(4), np.log(3000), (n, 2))).astype(int),
            rng.randint(1, 30, (n, 2)) * 48,
            near,
        ]
    )


def many_lengths() -> np.ndarray:
    """Samples of recordings: the shortest one by one, and any up to 30 s."""
    rng = np.random.RandomState(160)
    shortest = np.arange(161, 161 + MANY // 4)
    return np.concatenate([shortest, rng.randint(161, 480_001, MANY - len(shortest))])


def hash_of(counts: Iterable[int]) -> np.ndarray:
    """SHA-256 of counts of tokens: uint8 `[32]`."""
    content = np.array(list(counts), np.int32).tobytes()
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)


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
