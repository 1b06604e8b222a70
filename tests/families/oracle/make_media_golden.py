"""Make tests/media/golden.npz: what transformers' processors make of pictures and of sound.

    pip install -e '.[oracle]' torchvision
    python -m tests.families.oracle.make_media_golden

Counts are what the processors give, not what a formula of theirs says: rows that are no padding,
and frames of the mask of sound after the encoder's two strides. Pixels are those of the processors
that resize with Pillow; of the large arrays every 101st value is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import PIL
import transformers
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4_unified.image_processing_gemma4_unified import (
    Gemma4UnifiedImageProcessor,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.media import cases

N = 200


def sizes() -> np.ndarray:
    """Widths and heights: any, of any aspect, near the multiples of 48 pixels, and the extremes."""
    rng = np.random.default_rng(48)
    drawn = [
        rng.integers(4, 2000, (N // 4, 2)),
        np.exp(rng.uniform(np.log(4), np.log(3000), (N // 4, 2))).astype(int),
        rng.integers(1, 30, (N // 4, 2)) * 48,
        np.maximum(4, rng.integers(1, 30, (N // 4, 2)) * 48 + rng.integers(-1, 2, (N // 4, 2))),
        [[4, 30_000], [30_000, 4], [64, 64], [1920, 1080], [4032, 3024]],
    ]
    return np.concatenate(drawn).astype(np.int32)


def picture_tokens(all_sizes: np.ndarray) -> np.ndarray:
    """`[n, budgets]`: tokens of each size."""
    tokens = np.zeros((len(all_sizes), len(cases.BUDGETS)), np.int32)
    for i, (width, height) in enumerate(all_sizes):
        image = Image.new("RGB", (int(width), int(height)))
        for j, budget in enumerate(cases.BUDGETS):
            made = Gemma4ImageProcessorPil(max_soft_tokens=budget)(images=image)
            real = (made["image_position_ids"][0] >= 0).all(-1).sum()
            assert real == 9 * made["num_soft_tokens_per_image"][0]
            tokens[i, j] = real // 9
    return tokens


def sound_tokens(lengths: np.ndarray) -> np.ndarray:
    """`[n]`: tokens of Gemma 4 of so many samples."""
    extract = transformers.Gemma4AudioFeatureExtractor()
    tokens = np.zeros(len(lengths), np.int32)
    for i, length in enumerate(lengths):
        mask = extract([np.zeros(length, np.float32)])["input_features_mask"][0]
        tokens[i] = mask[::2][::2].sum()
    return tokens


def many() -> dict[str, np.ndarray]:
    """Hashes of 10,000 counts of each kind: an hour, since every picture is resized."""
    kinds = {
        "gemma4": (Gemma4ImageProcessorPil, sound_tokens),
        "gemma4_unified": (Gemma4UnifiedImageProcessor, _samples_tokens),
    }
    found = {}
    for family, (processor, sound) in kinds.items():
        found[f"{family}/many_sizes"] = cases.hash_of(_many_pictures(processor))
        found[f"{family}/many_lengths"] = cases.hash_of(sound(cases.many_lengths()))
    return found


def _many_pictures(processor: type) -> Iterator[int]:
    made = {budget: processor(max_soft_tokens=budget) for budget in cases.BUDGETS}
    for (width, height), budget in zip(
        cases.many_sizes(), itertools.cycle(cases.BUDGETS), strict=False
    ):
        image = Image.new("RGB", (int(width), int(height)))
        yield int(made[budget](images=image)["num_soft_tokens_per_image"][0])


def _samples_tokens(lengths: np.ndarray) -> np.ndarray:
    extract = transformers.Gemma4UnifiedAudioFeatureExtractor()
    masks = [extract([np.zeros(n, np.float32)])["input_features_mask"][0] for n in lengths]
    return np.array([mask.sum() for mask in masks], np.int32)


def pixels() -> dict[str, np.ndarray]:
    """Name of a picture and a family -> values."""
    half = [0.5] * 3
    three = Gemma3ImageProcessorPil(
        size={"height": 56, "width": 42}, image_mean=half, image_std=half
    )
    three_n = SiglipImageProcessorPil(
        size={"height": 48, "width": 48}, resample=2, do_normalize=False
    )
    four = Gemma4ImageProcessorPil(max_soft_tokens=70)
    found = {}
    for name in cases.PIXELS:
        image = cases.picture_of(name)
        for family, processor in (("gemma3", three), ("gemma3n", three_n)):
            values = processor(images=image)["pixel_values"][0].transpose(1, 2, 0)
            found[f"{family}/{name}"] = values.ravel()[:: cases.EVERY]
        made = four(images=image)
        n = 9 * made["num_soft_tokens_per_image"][0]
        found[f"gemma4/{name}"] = made["pixel_values"][0][:n].ravel()[:: cases.EVERY]
        found[f"gemma4/{name}/positions"] = made["image_position_ids"][0][:n].ravel()[
            :: cases.EVERY
        ]
    return found


def features() -> dict[str, np.ndarray]:
    """Name of a recording and a family -> values."""
    families = {
        "gemma3n": transformers.Gemma3nAudioFeatureExtractor(),
        "gemma4": transformers.Gemma4AudioFeatureExtractor(),
        "gemma4_unified": transformers.Gemma4UnifiedAudioFeatureExtractor(),
    }
    found = {}
    for length in cases.SAMPLES:
        for family, extract in families.items():
            made = extract([cases.sound_of(length)])
            real = made["input_features"][0][made["input_features_mask"][0]]
            found[f"{family}/{length}"] = np.concatenate([real.shape, real.ravel()[:: cases.EVERY]])
    return found


def main() -> None:
    """Write the file."""
    rng = np.random.default_rng(160)
    lengths = np.concatenate([np.arange(161, 161 + N), rng.integers(161, 480_001, N)])
    arrays = {"sizes": sizes(), "lengths": lengths.astype(np.int32), **pixels(), **features()}
    arrays |= many()
    arrays["picture_tokens"] = picture_tokens(arrays["sizes"])
    arrays["sound_tokens"] = sound_tokens(arrays["lengths"])
    small = {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in arrays.items()}
    np.savez_compressed(cases.MEDIA_GOLDEN, pillow=np.array(PIL.__version__), **small)


if __name__ == "__main__":
    main()
