"""Towers of pictures and sound: which models get them, and when their weights are read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.base.stepwise import finished
from mlxkv.errors import WeightsError
from mlxkv.media.reader import reader_of
from mlxkv.media.types import Medium
from mlxkv.memory.media import Rows
from mlxkv.models.loader import lay_out, load_model, loading
from mlxkv.store.info import describe, to_dict
from tests.support import tiny, tiny_media

WRITERS = {"gemma3": tiny_media.write_gemma3, "gemma4": tiny_media.write_gemma4}


@pytest.fixture(scope="module", params=WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp(request.param) / "hf")


def picture(folder: Path) -> Medium:
    reader = reader_of(folder)
    assert reader is not None
    return reader.image(np.random.RandomState(0).randint(0, 256, (60, 80, 3), dtype=np.uint8))


def edited(source: Path, folder: Path, keep: Callable[[str], bool]) -> Path:
    """A copy whose weights are those with such names."""
    shutil.copytree(source, folder)
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    kept = {name: array for name, array in weights.items() if keep(name)}
    mx.save_safetensors(str(folder / "model.safetensors"), kept)
    return folder


def is_tower(name: str) -> bool:
    return any(part in name for part in ("vision", "audio", "multi_modal"))


def logits(model: Callable[[mx.array], mx.array]) -> np.ndarray:
    return np.array(model(mx.array([tiny.tokens(20)])))[0]


def test_a_text_only_export_that_kept_its_vision_config_is_a_text_model(
    folder: Path, tmp_path: Path
):
    text = load_model(edited(folder, tmp_path / "text", lambda name: not is_tower(name)))
    assert not text.media_kinds
    whole = load_model(folder)
    assert "image" in whole.media_kinds
    np.testing.assert_array_equal(logits(text), logits(whole))


def test_without_towers_on_request_they_are_named_as_skipped(folder: Path):
    layout = lay_out(folder, text_only=True)
    assert not layout.model.media_kinds and not layout.encoder_bytes
    assert all(is_tower(name) for name in layout.checkpoint.skipped)
    assert any("vision" in name for name in layout.checkpoint.skipped)
    assert not any("vision" in name for name in lay_out(folder).checkpoint.skipped)


def test_half_a_tower_is_one_line_that_names_what_is_missing(folder: Path, tmp_path: Path):
    broken = edited(folder, tmp_path / "half", lambda name: "vision" not in name or "0" in name)
    with pytest.raises(WeightsError, match=r"tensors? \(.*vision.* missing") as failed:
        load_model(broken)
    assert "\n" not in str(failed.value)
    assert not lay_out(broken, text_only=True).model.media_kinds


def test_weights_of_an_encoder_are_read_and_counted_at_the_first_picture(folder: Path):
    medium = picture(folder)
    with mlxkv.load(folder) as llm:
        waiting = llm.model.waiting_bytes("image")
        assert waiting == lay_out(folder).encoder_bytes["image"] > 0
        assert medium.data is not None
        data = {name: mx.array(array) for name, array in medium.data.items()}
        assert np.isnan(np.array(llm.model.media_rows("image", data))).all()
        text_bytes = llm.budget.weights_bytes
        assert text_bytes == lay_out(folder).nbytes
        llm.generate("a", max_tokens=2)
        assert llm.model.waiting_bytes("image") == waiting
        before = llm.budget.encoders.of(medium)
        assert llm.budget.encoders.load("image") == waiting
        assert llm.model.waiting_bytes("image") == llm.budget.encoders.load("image") == 0
        assert before == llm.budget.encoders.of(medium) + waiting
        rows = np.array(Rows().encode(llm.model, medium))
    expected = load_model(folder).media_rows("image", data)
    np.testing.assert_array_equal(rows, np.array(expected))


def test_an_encoder_is_not_read_from_files_that_have_changed(folder: Path, tmp_path: Path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    model = finished(loading(copy, encoders_wait=True))
    weights = copy / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    with pytest.raises(WeightsError, match="files changed after it was loaded"):
        model.load_encoder("image")
    stat = (folder / "model.safetensors").stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    model.load_encoder("image")
    assert model.waiting_bytes("image") == 0


def test_a_tower_without_its_config_is_left_out(folder: Path, tmp_path: Path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    raw = json.loads((copy / "config.json").read_text())
    del raw["vision_config"]
    (copy / "config.json").write_text(json.dumps(raw))
    layout = lay_out(copy)
    assert "image" not in layout.model.media_kinds
    assert any("vision" in name for name in layout.checkpoint.skipped)


def test_a_card_tells_what_a_model_takes_beside_text(folder: Path):
    card = describe("m", folder)
    assert "image" in card.media and card.media["image"] > lay_out(folder).encoder_bytes["image"]
    assert "text, pictures (encoder " in card.text()
    assert to_dict(card)["media"] == card.media
    assert not any("vision" in name for name in card.skipped)
