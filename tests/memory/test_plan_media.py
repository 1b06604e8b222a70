"""Plans of models that take pictures: tokens, rows, encoders and what they take while they run."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlxkv
from mlxkv.errors import MediaError, UsageError
from mlxkv.llm.plan import plan
from mlxkv.media.reader import reader_of
from mlxkv.memory.media import Rows, encoder_bytes, shapes_of
from mlxkv.memory.plan import Plan
from mlxkv.models.loader import lay_out, load_model
from mlxkv.terminal import plan_text
from tests.support import tiny_media


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_media.write_gemma4(tmp_path_factory.mktemp("plan") / "m")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    where = tmp_path_factory.mktemp("pictures")
    files = [str(where / name) for name in ("a.jpg", "b.png")]
    for file, shape in zip(files, [(90, 120, 3), (40, 200, 3)], strict=True):
        pixels = np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return files


@pytest.fixture(scope="module")
def plans(folder: Path, pictures: list[str]) -> tuple[Plan, Plan]:
    """Without pictures and with both."""
    return plan(folder, 256), plan(folder, 256, images=pictures)


def test_a_plan_counts_pictures_and_the_encoder_that_they_need(
    folder: Path, pictures: list[str], plans: tuple[Plan, Plan]
):
    layout, reader, (text, both) = lay_out(folder), reader_of(folder), plans
    assert reader is not None
    tokens = [reader.image(file).n_tokens for file in pictures]
    encoder = layout.encoder_bytes["image"]
    assert text.weights_bytes == layout.nbytes
    assert text.encoders == both.encoders == layout.encoder_bytes
    assert both.weights_bytes == text.weights_bytes + encoder
    assert [(m.name, m.kind, m.n_tokens) for m in both.media] == [
        ("a.jpg", "image", tokens[0]),
        ("b.png", "image", tokens[1]),
    ]
    assert both.rows_bytes == sum(tokens) * layout.checkpoint.config.hidden_size * 4
    workspaces = [m.workspace_bytes for m in both.media]
    assert both.workspace_bytes == max(text.workspace_bytes, *workspaces)
    assert both.total_bytes - text.total_bytes == (
        encoder + both.rows_bytes + both.workspace_bytes - text.workspace_bytes
    )
    # The encoder's own arrays at least: its input and its rows.
    medium = reader.image(pictures[0])
    assert medium.data is not None
    n_input = sum(array.nbytes for array in medium.data.values())
    assert workspaces[0] > n_input + tokens[0] * layout.checkpoint.config.hidden_size * 4


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_an_encoder_takes_no_more_than_is_planned(folder: Path, kind: str):
    """Measured, with all that MLX's CPU backend unfolds for a convolution; 5% as for all plans."""
    model, reader = load_model(folder, dtype="float32"), reader_of(folder)
    assert reader is not None
    pixels = np.random.RandomState(0).randint(0, 256, (300, 400, 3), dtype=np.uint8)
    sound = np.random.RandomState(0).standard_normal(8 * 16_000).astype(np.float32)
    medium = reader.image(pixels) if kind == "image" else reader.audio((sound, 16_000))[0]
    planned, largest = encoder_bytes(model, kind, shapes_of(medium)), 0
    for _ in range(3):
        mx.clear_cache()
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        Rows().encode(model, medium)
        mx.synchronize()
        largest = max(largest, mx.get_peak_memory() - before)
    assert 0.95 * largest < planned < 1.3 * largest


def test_a_plan_has_room_for_a_picture_that_is_computed_at_once(
    tmp_path: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mlxkv.memory.plan.encoder_bytes", lambda *_: 0)
    path = tiny_media.write_gemma3(tmp_path / "m")
    text, small, whole = (
        plan(path, 256, chunk=chunk, images=images)
        for chunk, images in ((1, []), (1, pictures), (tiny_media.N_GEMMA3, pictures))
    )
    assert text.workspace_bytes < small.workspace_bytes == whole.workspace_bytes
    assert small.chunk == 1


def test_a_plan_says_what_it_counts_of_media(plans: tuple[Plan, Plan]):
    text, both = plans
    shown = plan_text.text(both)
    assert " to encode pictures\n" in shown and "tokens: a.jpg, " in shown
    assert "to encode pictures, which are loaded when" in plan_text.text(text)
    assert plan_text.to_dict(both)["media"][1]["name"] == "b.png"


def test_media_that_fill_the_context_or_that_a_model_does_not_take_are_one_line(
    folder: Path, pictures: list[str], tmp_path: Path
):
    with pytest.raises(UsageError, match=r"must be more than the .* tokens of the pictures"):
        mlxkv.plan(folder, 64, images=pictures)
    with pytest.raises(MediaError, match=r"^b\.wav: this model takes no sound$"):
        mlxkv.plan(tiny_media.write_gemma3(tmp_path / "m"), 64, audio=["b.wav"])


def test_convolutions_of_sound_take_what_is_planned(folder: Path):
    """Their patches are twice as large as all else that Gemma 4's encoder holds here."""
    reader, samples = reader_of(folder), (np.zeros(32_000, np.float32), 16_000)
    assert reader is not None
    (sound,) = reader.audio(samples)
    (planned,) = plan(folder, 256, audio=[samples]).media
    model = mlxkv.load_model(folder)
    model.load_encoder("audio")
    data = {name: mx.array(value) for name, value in (sound.data or {}).items()}
    mx.eval(model.parameters(), data)
    mx.clear_cache()
    before = mx.get_active_memory() - sum(array.nbytes for array in data.values())
    mx.reset_peak_memory()
    mx.eval(model.media_rows("audio", data))
    taken = mx.get_peak_memory() - before
    # How much of two streams' work is alive at once differs from run to run: never more than said.
    assert 0.75 * planned.workspace_bytes < taken < 1.02 * planned.workspace_bytes
