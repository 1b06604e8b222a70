"""What each family's config gives: placeholders, sizes, tokens and digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxkv.errors import ConfigError, MediaError
from mlxkv.media.reader import MediaReader, reader_of
from mlxkv.media.sound import RATE

PIXELS = np.random.default_rng(16).integers(0, 256, (60, 100, 3), dtype=np.uint8)

WIDE = np.random.default_rng(17).integers(0, 256, (260, 601, 3), dtype=np.uint8)


def reader(folder: Path, model: dict[str, Any], **files: dict[str, Any]) -> MediaReader | None:
    for name, content in {"config": model, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return reader_of(folder)


def vision(model_type: str, **keys: Any) -> dict[str, Any]:
    return {"model_type": model_type, "vision_config": {"hidden_size": 8}, **keys}


def made(folder: Path, model: dict[str, Any], **files: dict[str, Any]) -> MediaReader:
    found = reader(folder, model, **files)
    assert found is not None
    return found


def test_a_model_without_encoders_has_no_reader(tmp_path: Path) -> None:
    assert reader_of(tmp_path) is None
    assert reader(tmp_path, {"model_type": "gemma3_text"}) is None
    assert reader(tmp_path, {"model_type": "gemma4", "vision_config": None}) is None
    assert reader(tmp_path, vision("qwen3_vl")) is None


def test_a_picture_stands_as_its_family_writes_it(tmp_path: Path) -> None:
    three = made(tmp_path, vision("gemma3", boi_token_index=5)).placeholders["image"]
    assert (three.text, three.before, three.after) == ("<start_of_image>", "\n\n", "\n\n")
    assert (three.begin, three.token, three.end) == (5, 262144, 256000)
    four = made(tmp_path, vision("gemma4", image_token_id=7)).placeholders["image"]
    assert (four.text, four.before, four.after) == ("<|image|>", "", "")
    assert (four.begin, four.token, four.end) == (255999, 7, 258882)


def test_sizes_come_from_the_config_and_its_processor(tmp_path: Path) -> None:
    model = vision("gemma3", mm_tokens_per_image=4)
    model["vision_config"]["image_size"] = 56
    medium = made(tmp_path, model).image(PIXELS)
    assert medium.n_tokens == 4 and medium.data is not None
    assert medium.data["pixels"].shape == (56, 56, 3)
    assert medium.data["pixels"].min() < -0.5
    flat = {"size": {"height": 28, "width": 42}, "do_normalize": False, "image_mean": None}
    medium = made(tmp_path, model, preprocessor_config=flat).image(PIXELS)
    assert medium.data is not None and medium.data["pixels"].shape == (28, 42, 3)
    assert medium.data["pixels"].min() >= 0
    nested = {"image_processor": {"size": {"height": 14, "width": 14}}}
    medium = made(tmp_path, model, processor_config=nested).image(PIXELS)
    assert medium.data is not None and medium.data["pixels"].shape == (14, 14, 3)


def test_crops_follow_where_the_processor_asks_for_them(tmp_path: Path) -> None:
    model = vision("gemma3")
    plain = made(tmp_path, model)
    assert plain.image_parts(WIDE) == [plain.image(WIDE)]
    found = made(tmp_path, model, preprocessor_config={"do_pan_and_scan": True})
    before, whole, between, left, space, right = found.image_parts(WIDE, name="a.png")
    assert (before, space) == ("Here is the original image ", " ")
    assert between == " and here are some crops to help you see better "
    assert whole == found.image(WIDE)
    assert (left, right) == (found.image(WIDE[:, :301]), found.image(WIDE[:, 301:]))
    turned = found.image_parts(WIDE.transpose(1, 0, 2))
    assert turned[3] == found.image(WIDE.transpose(1, 0, 2)[:301])
    assert len(found.image_parts(WIDE[:, :300])) == 1  # crops would be too small


def test_patches_keep_the_aspect_within_the_budget(tmp_path: Path) -> None:
    found = made(tmp_path, vision("gemma4"))
    assert found.image_tokens(1920, 1080) == 264 and found.image_tokens(64, 64) == 256
    assert found.image_tokens(1, 30_000) == 280 == found.image_tokens(30_000, 1)
    for budget in (70, 140, 280, 560, 1120):
        medium = found.image(PIXELS, budget)
        assert budget * 0.8 < medium.n_tokens <= budget and medium.data is not None
        assert medium.data["patches"].shape == (medium.n_tokens * 9, 768)
        columns, rows = medium.data["positions"].max(0) + 1
        assert columns * rows == medium.n_tokens * 9 and 1.3 < columns / rows < 2
    with pytest.raises(MediaError, match="one of 70, 140, 280, 560, 1120; got 100"):
        found.image(PIXELS, 100)
    whole = made(tmp_path, vision("gemma4_unified")).image(PIXELS)
    assert whole.data is not None
    assert whole.data["patches"].shape == (whole.n_tokens, 48 * 48 * 3)
    assert whole.data["positions"][1].tolist() == [1, 0]


def hears(model_type: str, **keys: Any) -> dict[str, Any]:
    return {"model_type": model_type, "audio_config": {"hidden_size": 8}, **keys}


def test_sound_stands_as_its_family_writes_it(tmp_path: Path) -> None:
    three = made(tmp_path, {**vision("gemma3n"), **hears("gemma3n")})
    assert three.kinds == {"image", "audio"}
    sound = three.placeholders["audio"]
    assert (sound.text, sound.before, sound.after) == ("<audio_soft_token>", "\n\n", "\n\n")
    assert (sound.begin, sound.token, sound.end) == (256000, 262273, 262272)
    four = made(tmp_path, hears("gemma4", audio_token_id=9, eoa_token_index=8))
    assert four.kinds == {"audio"}
    sound = four.placeholders["audio"]
    assert (sound.text, sound.begin, sound.token, sound.end) == ("<|audio|>", 256000, 9, 8)
    with pytest.raises(MediaError, match=r"a\.png: this model takes no pictures"):
        four.image(PIXELS, name="a.png")
    with pytest.raises(MediaError, match="this model takes no sound"):
        made(tmp_path, vision("gemma3")).audio((np.zeros(9), RATE))


@pytest.mark.parametrize(
    ("model_type", "key", "shape", "tokens"),
    [
        ("gemma3n", "mel", (2997, 128), 188),
        ("gemma4", "mel", (2999, 128), 750),
        ("gemma4_unified", "samples", (750, 640), 750),
    ],
)
def test_long_sound_comes_in_windows(
    tmp_path: Path, model_type: str, key: str, shape: tuple[int, int], tokens: int
) -> None:
    found = made(tmp_path, hears(model_type))
    samples = np.random.default_rng(3).normal(0, 0.1, 30 * RATE + 5).astype(np.float32)
    first, last = found.audio((samples, RATE), name="talk.wav")
    assert first.data is not None and last.data is not None and first.name == "talk.wav"
    assert first.data[key].shape == shape and first.data[key].dtype == np.float32
    assert first.n_tokens == tokens and last.n_tokens == (tokens if tokens == 188 else 1)
    assert found.audio_tokens(len(samples)) == first.n_tokens + last.n_tokens
    (again,) = found.audio((samples[: 30 * RATE], RATE), name="other.wav")
    assert again == first and again.digest != last.digest


def test_the_width_of_features_is_the_encoders(tmp_path: Path) -> None:
    model = {"model_type": "gemma4", "audio_config": {"input_feat_size": 16}}
    (medium,) = made(tmp_path, model).audio((np.zeros(1000), RATE))
    assert medium.data is not None and medium.data["mel"].shape[1] == 16
    model = {"model_type": "gemma4_unified", "audio_config": {"audio_embed_dim": 100}}
    (medium,) = made(tmp_path, model).audio((np.zeros(1001), RATE))
    assert medium.data is not None and medium.data["samples"].shape == (11, 100)


def test_a_click_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"a\.wav: 0\.005 s of sound, and at least 0\.010 s"):
        made(tmp_path, hears("gemma4")).audio((np.zeros(80), RATE), "a.wav")


def test_the_digest_is_of_content_and_size_not_of_name(tmp_path: Path) -> None:
    found = made(tmp_path, vision("gemma4"))
    first = found.image(PIXELS, name="a.png")
    assert first == found.image(PIXELS.copy(), name="b.png") and first.ids == first.ids
    other = PIXELS.copy()
    other[0, 0] ^= 255
    digests = {first.digest, found.image(other).digest, found.image(PIXELS, 70).digest}
    assert len(digests) == 3
    assert len(set(first.ids)) == first.n_tokens and max(first.ids) < 0


def test_a_config_that_is_not_understood_is_named(tmp_path: Path) -> None:
    for key, value in {"image_token_id": "x", "boi_token_id": -3, "eoi_token_id": True}.items():
        with pytest.raises(ConfigError, match=f"config.json: key '{key}' must be"):
            reader(tmp_path, vision("gemma4", **{key: value}))
    with pytest.raises(ConfigError, match="image_mean"):
        reader(tmp_path, vision("gemma3"), preprocessor_config={"image_mean": [1]})
    for wrong in ({"resample": 6}, {"rescale_factor": "x"}, {"max_soft_tokens": 0}):
        with pytest.raises(ConfigError, match=f"key '{next(iter(wrong))}' must be"):
            reader(tmp_path, vision("gemma4"), preprocessor_config=wrong)
    for wrong in ({"sampling_rate": 8000}, {"min_frequency": "x"}, {"frame_length_ms": 0}):
        with pytest.raises(ConfigError, match=f"key '{next(iter(wrong))}' must be"):
            reader(tmp_path, hears("gemma4"), preprocessor_config=wrong)
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: a JSON object"):
        reader_of(tmp_path)
