"""Equal to transformers' processors: pixels, features and counts of tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import __version__ as pillow_version

from mlxkv.media.reader import MediaReader, reader_of
from mlxkv.media.sound import RATE
from tests.media import cases

FAMILIES = {
    "gemma3": {"size": {"height": 56, "width": 42}},
    "gemma3n": {"size": {"height": 48, "width": 48}},
    "gemma4": {"max_soft_tokens": 70},
    "gemma4_unified": {},
}
TOLERANCE = 1e-5
"""Of values within -1 to 1, and of the logarithms of mels: the same arithmetic in float32."""
OTHER_PILLOW = 6 / 255
"""Of pixels, between versions of Pillow: 11.3 resizes by up to 5 levels otherwise than 13.0."""


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(cases.MEDIA_GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MediaReader]:
    return {family: _reader(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def _reader(folder: Path, family: str) -> MediaReader:
    config: dict[str, Any] = {"model_type": family, "vision_config": {"a": 1}}
    (folder / "config.json").write_text(json.dumps({**config, "audio_config": {"a": 1}}))
    (folder / "preprocessor_config.json").write_text(json.dumps(FAMILIES[family]))
    reader = reader_of(folder)
    assert reader is not None
    return reader


def differ(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.dtype == np.float32
    return float(np.abs(ours.ravel()[:: cases.EVERY] - theirs).max())


@pytest.mark.parametrize("name", cases.PIXELS)
def test_pixels_equal_the_processors(
    golden: dict[str, np.ndarray], readers: dict[str, MediaReader], name: str
) -> None:
    image = cases.picture_of(name)
    tolerance = TOLERANCE if str(golden["pillow"]) == pillow_version else OTHER_PILLOW
    for family in ("gemma3", "gemma3n"):
        data = readers[family].image(image).data
        assert data is not None
        assert differ(data["pixels"], golden[f"{family}/{name}"]) < tolerance
    data = readers["gemma4"].image(image).data
    assert data is not None
    assert differ(data["patches"], golden[f"gemma4/{name}"]) < tolerance
    positions = data["positions"].ravel()[:: cases.EVERY]
    assert np.array_equal(positions, golden[f"gemma4/{name}/positions"])


def test_merged_patches_are_the_patches_of_their_squares(readers: dict[str, MediaReader]) -> None:
    image = cases.picture_of("wide")
    small = readers["gemma4"].image(image, 280).data
    whole = readers["gemma4_unified"].image(image, 280).data
    assert small is not None and whole is not None
    places = map(tuple, small["positions"].tolist())
    squares = dict(zip(places, small["patches"], strict=True))
    for (x, y), square in zip(whole["positions"].tolist(), whole["patches"], strict=True):
        pixels = square.reshape(3, 16, 3, 16, 3)
        for j in range(3):
            for i in range(3):
                part = squares[3 * x + i, 3 * y + j].reshape(16, 16, 3)
                assert np.array_equal(pixels[j, :, i], part)


@pytest.mark.parametrize("n_samples", cases.SAMPLES)
def test_features_equal_the_extractors(
    golden: dict[str, np.ndarray], readers: dict[str, MediaReader], n_samples: int
) -> None:
    for family in ("gemma3n", "gemma4", "gemma4_unified"):
        (medium,) = readers[family].audio((cases.sound_of(n_samples), RATE))
        assert medium.data is not None
        (values,) = medium.data.values()
        stored = golden[f"{family}/{n_samples}"]
        assert values.shape == tuple(stored[:2].astype(int))
        assert differ(values, stored[2:]) < TOLERANCE


def test_tokens_of_pictures_equal_the_processors(
    golden: dict[str, np.ndarray], readers: dict[str, MediaReader]
) -> None:
    for family in ("gemma4", "gemma4_unified"):
        tokens = [
            [readers[family].image_tokens(width, height, budget) for budget in cases.BUDGETS]
            for width, height in golden["sizes"].tolist()
        ]
        assert np.array_equal(tokens, golden["picture_tokens"])


def test_tokens_of_sound_equal_the_extractors(
    golden: dict[str, np.ndarray], readers: dict[str, MediaReader]
) -> None:
    lengths = golden["lengths"].tolist()
    assert [readers["gemma4"].audio_tokens(n) for n in lengths] == golden["sound_tokens"].tolist()
    assert {readers["gemma3n"].audio_tokens(n) for n in lengths} == {188}


@pytest.mark.parametrize("family", ["gemma4", "gemma4_unified"])
def test_tokens_of_ten_thousand_sizes_and_lengths_equal_the_processors(
    golden: dict[str, np.ndarray], readers: dict[str, MediaReader], family: str
) -> None:
    reader, budgets = readers[family], itertools.cycle(cases.BUDGETS)
    sizes = zip(cases.many_sizes().tolist(), budgets, strict=False)
    of_sizes = cases.hash_of(reader.image_tokens(w, h, budget) for (w, h), budget in sizes)
    assert np.array_equal(of_sizes, golden[f"{family}/many_sizes"])
    of_lengths = cases.hash_of(map(reader.audio_tokens, cases.many_lengths().tolist()))
    assert np.array_equal(of_lengths, golden[f"{family}/many_lengths"])
