"""Models with towers, converted: what is written loads again here, under mlx-vlm's names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.convert import convert
from mlxkv.errors import UsageError
from mlxkv.media.reader import reader_of
from mlxkv.models.loader import load_model
from tests.convert.test_convert import mlx_lms
from tests.families.oracle import gemma3n_pictures as gemma3n
from tests.support import tiny, tiny_media

WRITERS: dict[str, Callable[[Path], Path]] = {
    "gemma3": tiny_media.write_gemma3,
    "gemma4": tiny_media.write_gemma4,
}


@pytest.fixture(scope="module", params=WRITERS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[request.param](tmp_path_factory.mktemp("towers") / request.param)


def outputs(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits of text, and rows of a picture."""
    model, reader = load_model(folder, dtype="float32"), reader_of(folder)
    assert reader is not None
    pixels = np.random.RandomState(0).randint(0, 256, (60, 80, 3), dtype=np.uint8)
    medium = reader.image(pixels)
    assert medium.data is not None
    data = {name: mx.array(array) for name, array in medium.data.items()}
    logits = model(mx.array([tiny.tokens(20)]))
    return np.array(logits)[0], np.array(model.media_rows("image", data))


def stored(folder: Path) -> dict[str, mx.array]:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    return weights


def test_a_converted_model_has_the_same_outputs_and_mlx_vlms_names(source: Path, tmp_path: Path):
    convert(source, tmp_path / "out")
    for got, expected in zip(outputs(tmp_path / "out"), outputs(source), strict=True):
        np.testing.assert_array_equal(got, expected)
    names = stored(tmp_path / "out")
    towers = ("vision_tower.", "audio_tower.", "embed_", "multi_modal_projector.")
    assert all(name.startswith(("language_model.", *towers)) for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == source.name
    assert (
        config["vision_config"] == json.loads((source / "config.json").read_text())["vision_config"]
    )
    assert (tmp_path / "out" / "processor_config.json").exists()


@pytest.mark.parametrize("towers", [False, True])
def test_towers_are_quantized_only_on_request(source: Path, tmp_path: Path, towers: bool):
    convert(source, tmp_path / "out", quantize="affine8", group_size=32, quantize_towers=towers)
    quantized = [name for name in stored(tmp_path / "out") if name.endswith(".scales")]
    assert any(name.startswith("language_model.") for name in quantized)
    assert any("vision_tower" in name for name in quantized) == towers
    # Tables, and what mlx-vlm multiplies in the dtype of the weight.
    assert not any(re.search("position|patch_embedder|relative_k", name) for name in quantized)
    logits, rows = outputs(tmp_path / "out")
    exact_logits, exact_rows = outputs(source)
    # 8 bits: a few percent of the spread at most.
    assert np.abs(logits - exact_logits).max() < 0.2 * exact_logits.std()
    error = np.abs(rows - exact_rows).max()
    assert (0 < error < 0.2 * exact_rows.std()) if towers else error == 0


def test_gemma_3ns_unread_keys_and_values_stay_where_mlx_vlm_wants_them(tmp_path: Path):
    """A checkpoint has them for layers that read another layer's."""
    manifest = json.loads((gemma3n.DIRECTORY / "manifest.json").read_text())
    shapes = manifest["tensors"] | {
        f"model.language_model.layers.{i}.self_attn.{name}.weight": shape
        for i in (2, 3)
        for name, shape in {"k_proj": [32, 48], "v_proj": [32, 48], "k_norm": [16]}.items()
    }
    weights = {name: gemma3n.weight(name, shape, 0) for name, shape in shapes.items()}
    config = json.loads((gemma3n.DIRECTORY / "config.hub.json").read_text())
    source = tiny.write_checkpoint(tmp_path / "hf", config, weights)
    expected = np.array(load_model(source)(mx.array([tiny.tokens(20, 60)])))
    for name, kept, options in (
        ("plain", 6, {}),
        ("q8", 6, {"quantize": "affine8", "group_size": 32}),
        ("text", 0, {"text_only": True}),
    ):
        convert(source, tmp_path / name, **options)
        unread = {n for n in stored(tmp_path / name) if re.search(r"layers\.[23].*\.[kv]_", n)}
        assert len({n for n in unread if n.endswith(".weight")}) == kept
        got = np.array(load_model(tmp_path / name)(mx.array([tiny.tokens(20, 60)])))
        assert np.abs(got - expected).max() <= 0.2 * expected.std() * (name == "q8")
    again = convert(tmp_path / "q8", tmp_path / "again").plan
    assert stored(tmp_path / "again").keys() == stored(tmp_path / "q8").keys()
    assert not again.skipped


def test_a_head_that_mlx_vlm_needs_twice_is_once_in_memory(tmp_path: Path):
    wide = tiny_media.gemma3_config()["text_config"] | {"hidden_size": 64}
    source = tiny_media.write_gemma3(tmp_path / "hf", text_config=wide)
    convert(source, tmp_path / "out", quantize="affine4", group_size=32)
    names = stored(tmp_path / "out")
    for kind in ("weight", "scales", "biases"):
        head, embedding = f"lm_head.{kind}", f"model.embed_tokens.{kind}"
        assert mx.array_equal(
            names[f"language_model.{head}"], names[f"language_model.{embedding}"]
        ).item()
    assert "lm_head" not in load_model(tmp_path / "out")
    again = convert(tmp_path / "out", tmp_path / "again").plan
    assert [name for name, _ in again.skipped] == ["language_model.lm_head.weight"]


def test_text_only_leaves_towers_and_their_files_out(source: Path, tmp_path: Path):
    plan = convert(source, tmp_path / "out", text_only=True).plan
    assert {why for _, why in plan.skipped} == {"not part of the language model"}
    model = load_model(tmp_path / "out")
    assert not model.media_kinds and not (tmp_path / "out" / "processor_config.json").exists()
    prompt = tiny.tokens(20)
    np.testing.assert_array_equal(np.array(model(mx.array([prompt])))[0], outputs(source)[0])
    assert np.isfinite(mlx_lms(tmp_path / "out", prompt)).all()


def test_options_for_towers_that_say_nothing_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="is for a model that is quantized"):
        convert(tmp_path, tmp_path / "out", quantize_towers=True)
    with pytest.raises(UsageError, match="a model of text alone has no towers"):
        convert(tmp_path, tmp_path / "out", quantize="q4", quantize_towers=True, text_only=True)
