"""Gemma 4's GGUF files: the language model, its tokenizer, and the encoder of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

import mlxkv
from mlxkv.convert import convert
from mlxkv.convert.gguf.file import open_gguf
from mlxkv.convert.gguf.tokenizer import gguf_tokenizer
from mlxkv.errors import ConfigError, WeightsError
from mlxkv.models.gemma4 import Model
from mlxkv.models.gemma4_config import Config
from tests.support import tiny, tiny_media
from tests.support.gguf_files import write_gguf
from tests.support.gguf_gemma4 import sound_keys, sound_tensors, vision_tensors, write_language
from tests.support.mmproj_files import keys, write_mmproj
from tests.support.paths import TOKENIZERS

GEMMA4 = tiny_media.gemma4_config()
TEXT = {**GEMMA4["text_config"], "torch_dtype": "float32"}
# As 31B: no embeddings per layer, no shared KV, keys that are values in full layers.
DENSE = {
    **TEXT,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": True,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "use_bidirectional_attention": "vision",
}


def weights_of(text: dict[str, Any]) -> dict[str, np.ndarray]:
    parameters = tree_flatten(Model(Config.from_dict(text)).parameters())
    return tiny.random_weights({name: array.shape for name, array in parameters}, 0, 1.0)


def logits(folder: Path, prompt: list[int]) -> np.ndarray:
    model = mlxkv.load_model(folder, dtype=mx.float32)
    return np.array(model(mx.array([prompt]))[0])


def rows_of(folder: Path) -> np.ndarray:
    """Rows of a picture of 6 x 3 patches of 16 x 16, which make 2 x 1 rows."""
    random = np.random.RandomState(0)
    y, x = np.divmod(np.arange(18), 6)
    data = {
        "patches": mx.array(random.random_sample((18, 768)).astype(np.float32)),
        "positions": mx.array(np.stack([x, y], axis=1).astype(np.int32)),
    }
    return np.array(mlxkv.load_model(folder, dtype=mx.float32).media_rows("image", data))


@pytest.mark.parametrize("clipped", [True, False])
def test_the_encoder_beside_it_gives_the_rows_of_its_checkpoint(tmp_path: Path, clipped: bool):
    vision = {**GEMMA4["vision_config"], "use_clipped_linears": clipped, "standardize": clipped}
    shapes = tiny_media.vit_shapes(vision, TEXT["hidden_size"])
    encoder = {name: bounded(name, array) for name, array in tiny.random_weights(shapes).items()}
    text = weights_of(TEXT)
    (tmp_path / "in").mkdir()
    write_language(tmp_path / "in" / "model.gguf", TEXT, text)
    metadata = keys(vision, TEXT["hidden_size"], "gemma4v")
    tensors = vision_tensors(encoder, vision["num_hidden_layers"])
    sound = {"a.blk.0.attn_q.weight": np.zeros((4, 4), np.float32)}
    write_mmproj(tmp_path / "in" / "mmproj.gguf", tensors | sound, metadata)
    plan = convert(tmp_path / "in", tmp_path / "out").plan
    assert dict(plan.skipped)["a.blk.0.attn_q.weight"] == "an encoder of sound of another kind"
    nested = {f"model.language_model.{name[6:]}": array for name, array in text.items()}
    config = {**GEMMA4, "text_config": TEXT, "vision_config": vision, "audio_config": None}
    reference = tiny.write_checkpoint(tmp_path / "hf", config, nested | encoder)
    got, expected = rows_of(tmp_path / "out"), rows_of(reference)
    assert got.shape == (2, 48)
    np.testing.assert_array_equal(got, expected)
    models = [mlxkv.load_model(folder) for folder in (tmp_path / "out", reference)]
    assert models[0].config == models[1].config


def test_the_encoder_of_sound_in_the_same_file_gives_the_rows_of_its_checkpoint(tmp_path: Path):
    """The softplus of a scale and back costs a few units in the last place of float32."""
    vision, sound = GEMMA4["vision_config"], GEMMA4["audio_config"]
    shapes = tiny_media.vit_shapes(vision, 48) | tiny_media.conformer_shapes(sound, 48)
    encoders = {name: bounded(name, array) for name, array in tiny.random_weights(shapes).items()}
    text = weights_of(TEXT)
    write_language(tmp_path / "model.gguf", TEXT, text)
    heard = {name: array for name, array in encoders.items() if "audio" in name}
    seen = {name: array for name, array in encoders.items() if name not in heard}
    tensors = vision_tensors(seen, 2) | sound_tensors(heard, 2)
    metadata = keys(vision, 48, "gemma4v") | sound_keys(sound)
    encoder = write_mmproj(tmp_path / "encoders.gguf", tensors, metadata)
    convert(tmp_path / "model.gguf", tmp_path / "out", mmproj=encoder)
    nested = {f"model.language_model.{name[6:]}": array for name, array in text.items()}
    config = {**GEMMA4, "text_config": TEXT}
    reference = tiny.write_checkpoint(tmp_path / "hf", config, nested | encoders)
    models = [
        mlxkv.load_model(folder, dtype=mx.float32) for folder in (tmp_path / "out", reference)
    ]
    assert models[0].config == models[1].config
    mel = np.random.RandomState(0).standard_normal((70, 128)).astype(np.float32)
    got, expected = (np.array(m.media_rows("audio", {"mel": mx.array(mel)})) for m in models)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {config[f"{kind}_token_id"] for kind in ("audio", "image")} == {0}


def bounded(name: str, array: np.ndarray) -> np.ndarray:
    """A bound of a clippable linear on its side of 0, near enough to clip."""
    if array.shape:
        return array
    return np.float32(-1 if name.endswith("min") else 1) * (1 + np.abs(array))


@pytest.mark.parametrize("text", [TEXT, DENSE], ids=["e2b", "dense"])
def test_a_language_model_gives_the_logits_of_its_checkpoint(tmp_path: Path, text: dict[str, Any]):
    weights = weights_of(text)
    convert(write_language(tmp_path / "a.gguf", text, weights), tmp_path / "out")
    reference = tiny.write_checkpoint(tmp_path / "hf", text, weights)
    prompt = tiny.tokens(80)  # past the window of 32
    got, expected = logits(tmp_path / "out", prompt), logits(reference, prompt)
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4 * expected.std(), rtol=0)
    models = [mlxkv.load_model(folder) for folder in (tmp_path / "out", reference)]
    assert models[0].config == models[1].config


def test_keys_and_values_that_no_layer_reads_are_left_out(tmp_path: Path):
    weights = weights_of(TEXT)
    unused = {
        f"model.layers.4.self_attn.{name}.weight": weights[
            f"model.layers.2.self_attn.{name}.weight"
        ]
        for name in ("k_proj", "v_proj", "k_norm")
    }
    path = write_language(tmp_path / "a.gguf", TEXT, weights | unused)
    plan = convert(path, tmp_path / "out").plan
    reasons = dict(plan.skipped)
    assert reasons["blk.4.attn_k.weight"] == "its layer reads another's KV"
    assert len(reasons) == 4  # and the rotary factors


def test_numbers_that_differ_by_layer_otherwise_are_refused(tmp_path: Path):
    changes = {"feed_forward_length": [64, 64, 96, 128, 128]}
    path = write_language(tmp_path / "a.gguf", TEXT, weights_of(TEXT), **changes)
    with pytest.raises(ConfigError, match="feed_forward_length differs by layer"):
        convert(path, tmp_path / "out")


def test_the_tokenizer_gives_the_ids_of_the_one_it_was_made_of(tmp_path: Path):
    """Gemma's form: visible spaces, bytes where a letter is unknown, merges by rank."""
    file = next((TOKENIZERS / "gemma").glob("tokenizer.json"))
    own = Tokenizer.from_file(str(file))
    model = json.loads(own.to_str())["model"]
    names = [token for token, _ in sorted(own.get_vocab().items(), key=lambda item: item[1])]
    types = [6 if len(n) == 6 and n.startswith("<0x") else 1 for n in names]
    for i, token in own.get_added_tokens_decoder().items():
        types[i] = 3 if token.special else 4
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.scores": [-1000.0] * len(names),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    path = write_gguf(tmp_path / "a.gguf", {"x": np.zeros((2, 2), "f4")}, "gemma4", metadata)
    made = gguf_tokenizer(open_gguf(path))
    for text in (
        "A sentence, with  two spaces.\n\n\tAnd a line: x=1",
        "héllo ☃ 日本",
        "<end_of_turn>a",
    ):
        ids = made.encode(text, add_special_tokens=False).ids
        assert ids == own.encode(text, add_special_tokens=False).ids
        assert made.decode(ids) == own.decode(ids)


def test_marks_that_llama_cpp_makes_visible_are_special_again(tmp_path: Path):
    names = ["<unk>", "<|channel>", "<tool_call|>", "plain", "a", "b", "ab"]
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [2, 4, 4, 4, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": False,
    }
    path = write_gguf(tmp_path / "a.gguf", {"x": np.zeros((2, 2), "f4")}, "gemma4", metadata)
    made = gguf_tokenizer(open_gguf(path))
    special = {t.content for t in made.get_added_tokens_decoder().values() if t.special}
    assert special == {"<unk>", "<|channel>", "<tool_call|>"}


def test_factors_of_full_layers_that_mean_something_else_are_refused(tmp_path: Path):
    path = write_language(tmp_path / "a.gguf", TEXT, weights_of(TEXT))
    file = open_gguf(path)
    tensor = file.tensors["rope_freqs.weight"]
    with path.open("r+b") as f:
        f.seek(tensor.offset)
        f.write(np.full(16, 2.0, np.float32).tobytes())
    with pytest.raises(WeightsError, match=r"rope_freqs\.weight must be ones and then infinite"):
        convert(path, tmp_path / "out")
