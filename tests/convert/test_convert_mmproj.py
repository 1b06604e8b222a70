"""GGUF files with a file of encoders beside them.

The reference is the Hugging Face checkpoint whose tensors both files hold under llama.cpp's names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.convert import convert
from mlxkv.errors import CheckpointError, MlxkvError, UnsupportedModel, UsageError, WeightsError
from mlxkv.terminal.spelling import RUN
from tests.support import tiny, tiny_media
from tests.support.gguf_files import write_model
from tests.support.mmproj_files import gemma3_tensors, keys, write_mmproj

GEMMA3 = tiny_media.gemma3_config()
TEXT = {**GEMMA3["text_config"], "query_pre_attn_scalar": 16, "num_hidden_layers": 2}
VISION = GEMMA3["vision_config"]
SCALE = {"vision.projector.scale_factor": 2}
"""56 x 56 in patches of 14 are 4 x 4, which become 2 x 2 rows."""


def encoder(seed: int = 1) -> dict[str, np.ndarray]:
    shapes = tiny_media.siglip_shapes(VISION, TEXT["hidden_size"])
    kernel = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    rows, *_ = shapes[kernel]
    shapes[kernel] = (rows, 3, 14, 14)  # as PyTorch has it, and with it llama.cpp
    return tiny.random_weights(shapes, seed, 0.0)


def mmproj(path: Path, **changes: Any) -> Path:
    tensors = gemma3_tensors(encoder(), VISION["num_hidden_layers"])
    return write_mmproj(path, tensors, keys(VISION, 48, "gemma3") | SCALE | changes)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a language model and its encoders."""
    (tmp_path / "in").mkdir()
    write_model(tmp_path / "in" / "model-Q8_0.gguf", TEXT)
    mmproj(tmp_path / "in" / "mmproj-model-f16.gguf")
    return tmp_path / "in"


def rows_of(folder: Path) -> np.ndarray:
    model = mlxkv.load_model(folder, dtype=mx.float32)
    pixels = np.random.RandomState(0).standard_normal((56, 56, 3)).astype(np.float32)
    return np.array(model.media_rows("image", {"pixels": mx.array(pixels)}))


def reference(folder: Path, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    text = tiny.random_weights(tiny.tensor_shapes(TEXT), 0, 0.0)
    config = {**GEMMA3, "text_config": TEXT}
    nested = {f"language_model.{name}": array for name, array in text.items()}
    return rows_of(tiny.write_checkpoint(folder, config, nested | dict(weights)))


def test_the_encoders_beside_a_gemma_3_give_the_rows_of_its_checkpoint(files: Path, tmp_path: Path):
    """F32; the norm's added 1 costs up to half a unit in the last place of float32."""
    result = convert(files / "model-Q8_0.gguf", tmp_path / "out")
    assert "with the encoders of mmproj-model-f16.gguf" in result.plan.notes
    got, expected = rows_of(tmp_path / "out"), reference(tmp_path / "hf", encoder())
    assert got.shape == (4, 48)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gemma3"
    assert config["mm_tokens_per_image"] == 4
    assert config["vision_config"]["image_size"] == 56


def test_a_folder_and_a_file_named_by_hand_give_the_same(files: Path, tmp_path: Path):
    convert(files, tmp_path / "folder")
    other = (files / "mmproj-model-f16.gguf").rename(tmp_path / "eyes.gguf")
    assert "vision_config" not in convert(files, tmp_path / "text").plan.config
    convert(files / "model-Q8_0.gguf", tmp_path / "named", mmproj=other)
    np.testing.assert_array_equal(rows_of(tmp_path / "named"), rows_of(tmp_path / "folder"))


def test_text_only_leaves_them_out(files: Path, tmp_path: Path):
    plan = convert(files, tmp_path / "out", text_only=True).plan
    assert plan.config["model_type"] == "gemma3_text"
    assert not any("vision" in tensor.name for tensor in plan.tensors)
    with pytest.raises(UsageError, match="a model of text alone has no encoders"):
        convert(files, tmp_path / "b", text_only=True, mmproj=files / "mmproj-model-f16.gguf")


def test_products_that_older_files_have_the_other_way_round_are_turned(files: Path, tmp_path: Path):
    swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    tensors = {}
    for name, array in gemma3_tensors(encoder(), 2).items():
        module = name.split(".")[-2]
        tensors[name.replace(module, swap.get(module, module))] = array
    write_mmproj(files / "mmproj-model-f16.gguf", tensors, keys(VISION, 48, "gemma3") | SCALE)
    convert(files, tmp_path / "out")
    expected = reference(tmp_path / "hf", encoder())
    got = rows_of(tmp_path / "out")
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_half_precision_and_quantized_encoders_are_read(files: Path, tmp_path: Path):
    tensors = gemma3_tensors(encoder(), 2)
    kinds = {"v.blk.0.ffn_up.weight": "Q8_0", "mm.input_projection.weight": "F16"}
    metadata = keys(VISION, 48, "gemma3") | SCALE
    path = files / "mmproj-model-f16.gguf"
    write_mmproj(path, tensors, metadata, lambda name: kinds.get(name, "F32"))
    convert(files, tmp_path / "out")
    expected = reference(tmp_path / "hf", encoder())
    # Q8_0 rounds to about 1/256 of a block's largest value.
    got = rows_of(tmp_path / "out")
    np.testing.assert_allclose(got, expected, atol=2e-2 * np.abs(expected).max(), rtol=0)


def test_a_picture_row_stands_for_a_token_of_the_vocabulary(files: Path, tmp_path: Path):
    """Some files' vocabularies end before `<image_soft_token>`."""
    convert(files, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_token_index"] < TEXT["vocab_size"]


OF_ANOTHER = {
    "architecture": ({"vision.projection_dim": 64}, CheckpointError, "makes rows of 64"),
    "projector": ({"projector_type": "pixtral"}, UnsupportedModel, "'pixtral' is not supported"),
    "pixels": ({"vision.image_mean": [0.4] * 3}, MlxkvError, "image_mean must be three times 0.5"),
}


@pytest.mark.parametrize("case", OF_ANOTHER)
def test_encoders_of_another_model_are_refused_where_they_are_asked_for(files, tmp_path, case):
    changes, error, message = OF_ANOTHER[case]
    other = mmproj(tmp_path / "other.gguf", **changes)
    with pytest.raises(error, match=message):
        convert(files / "model-Q8_0.gguf", tmp_path / "out", mmproj=other)


@pytest.mark.parametrize("case", ["architecture", "projector"])
def test_encoders_of_another_model_beside_it_are_left_out_with_a_note(files, tmp_path, case):
    changes, _, message = OF_ANOTHER[case]
    mmproj(files / "mmproj-model-f16.gguf", **changes)
    plan = convert(files, tmp_path / "out").plan
    assert plan.config["model_type"] == "gemma3_text"
    assert message in plan.notes[0]


def test_several_files_of_encoders_are_not_chosen_from(files: Path, tmp_path: Path):
    mmproj(files / "mmproj-model-bf16.gguf")
    plan = convert(files, tmp_path / "out").plan
    assert plan.config["model_type"] == "gemma3_text"
    assert plan.notes == ("2 files of encoders lie beside it: choose one with --mmproj",)


def test_what_is_no_file_of_encoders_is_refused(files: Path, tmp_path: Path):
    model, encoders = files / "model-Q8_0.gguf", files / "mmproj-model-f16.gguf"
    with pytest.raises(UnsupportedModel, match="holds the encoders of a model") as raised:
        convert(encoders, tmp_path / "out")
    assert "; --mmproj mmproj-model-f16.gguf adds" in raised.value.spelled(RUN)
    with pytest.raises(CheckpointError, match="its architecture is 'gemma3'"):
        convert(model, tmp_path / "out", mmproj=model)
    tensors = gemma3_tensors(encoder(), 2)
    metadata = keys(VISION, 48, "gemma3") | SCALE
    write_mmproj(encoders, {**tensors, "v.blk.0.extra.weight": np.zeros((4, 4), "f4")}, metadata)
    with pytest.raises(WeightsError, match=r"v\.blk\.0\.extra\.weight"):
        convert(model, tmp_path / "out", mmproj=encoders)
    del tensors["v.post_ln.bias"]
    write_mmproj(encoders, tensors, metadata)
    with pytest.raises(WeightsError, match=r"1 missing: vision_tower.vision_model.post_layernorm"):
        convert(model, tmp_path / "out", mmproj=encoders)


def test_a_checkpoint_with_its_own_encoders_takes_no_file_of_them(files: Path, tmp_path: Path):
    convert(files, tmp_path / "out")
    with pytest.raises(UsageError, match="is for a model in a GGUF file"):
        convert(tmp_path / "out", tmp_path / "b", mmproj=files / "mmproj-model-f16.gguf")
