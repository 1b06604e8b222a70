"""A checkpoint loads whole, or fails with one line that lists what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cache import make_caches
from mlxkv.checkpoint.weights import open_weights
from mlxkv.errors import UsageError, WeightsError
from mlxkv.models.loader import load_model
from mlxkv.store.info import describe
from tests.support.command_line import chat_model
from tests.support.loading import FILE, NORM, ONE_LAYER, logits, refused, weights_of
from tests.support.tiny import gemma3_config, llama_config, tensor_shapes, tokens, write_checkpoint

# What loads


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_sharded_checkpoint_is_the_same_model(tmp_path, shards):
    one = write_checkpoint(tmp_path / "one", ONE_LAYER)
    many = write_checkpoint(tmp_path / "many", ONE_LAYER, shards=shards)
    np.testing.assert_array_equal(logits(load_model(many)), logits(load_model(one)))


def test_one_file_of_any_name_is_enough(tmp_path):
    expected = logits(load_model(write_checkpoint(tmp_path, ONE_LAYER)))
    (tmp_path / FILE).rename(tmp_path / "weights.safetensors")
    np.testing.assert_array_equal(logits(load_model(tmp_path)), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("make", [llama_config, gemma3_config])
def test_a_model_computes_in_the_dtype_that_was_asked_for(tmp_path, make, stored, dtype):
    config = make(num_hidden_layers=2)
    path = write_checkpoint(tmp_path, config, dtype=stored)
    model = load_model(path, dtype=dtype)
    out = model(mx.array([tokens(12)]), make_caches(model))
    assert out.dtype == getattr(mx, dtype)
    reference = logits(load_model(path, dtype="float32"), tokens(12))
    difference = np.abs(np.array(out.astype(mx.float32)) - reference).max() / reference.std()
    # bfloat16 has 8 bits: some 0.4% a step, over a dozen steps.
    assert difference < {"float32": 1e-6, "float16": 0.03, "bfloat16": 0.25}[dtype]


def test_auto_keeps_to_a_dtype_that_is_fast_here(tmp_path):
    model = load_model(write_checkpoint(tmp_path, ONE_LAYER, dtype=mx.bfloat16))
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    assert model(mx.array([[1]])).dtype == (mx.float32 if on_cpu else mx.bfloat16)


@pytest.mark.parametrize("dtype", ["float64", "q4", "", mx.int32, mx.complex64])
def test_an_unknown_dtype_is_refused_before_anything_is_read(tmp_path, dtype):
    path = write_checkpoint(tmp_path, ONE_LAYER)
    (path / FILE).write_bytes(b"not read")
    with pytest.raises(UsageError, match="float32"):
        load_model(path, dtype=dtype)


def test_rotary_frequencies_in_a_checkpoint_are_left_out(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    path = write_checkpoint(tmp_path / "a", ONE_LAYER, {**weights_of(ONE_LAYER), **extra})
    plain = write_checkpoint(tmp_path / "b", ONE_LAYER)
    np.testing.assert_array_equal(logits(load_model(path)), logits(load_model(plain)))


TIED = llama_config(num_hidden_layers=1, tie_word_embeddings=True)


def test_a_tied_model_keeps_a_head_of_its_own(tmp_path):
    own = weights_of(ONE_LAYER)
    tied = write_checkpoint(tmp_path / "tied", TIED, own)
    untied = write_checkpoint(tmp_path / "untied", ONE_LAYER, own)
    np.testing.assert_array_equal(logits(load_model(tied)), logits(load_model(untied)))


def test_a_tied_model_drops_a_head_that_is_a_copy_of_its_embedding(tmp_path):
    own = weights_of(TIED)
    copy = {**own, "lm_head.weight": own["model.embed_tokens.weight"]}
    model = load_model(write_checkpoint(tmp_path / "copy", TIED, copy))
    plain = load_model(write_checkpoint(tmp_path / "plain", TIED, own))
    np.testing.assert_array_equal(logits(model), logits(plain))
    assert "lm_head" not in model


@pytest.mark.parametrize("make", [llama_config, gemma3_config])
def test_a_fused_projection_gives_what_its_parts_give(tmp_path, monkeypatch, make):
    changes = {"attention_bias": True}
    if make is llama_config:
        changes["mlp_bias"] = True
    path = write_checkpoint(tmp_path, make(**changes))
    fused = load_model(path)
    monkeypatch.setattr("mlxkv.nn.layers.Fusing.prepare", lambda self: None)
    parts = load_model(path)
    assert any("qkv_proj" in name for name, _ in fused.named_modules())
    assert not any("qkv_proj" in name for name, _ in parts.named_modules())
    for prompt in (tokens(1), tokens(3), tokens(40)):
        got, expected = logits(fused, prompt), logits(parts, prompt)
        # The same rows in one product: only its blocking may round differently.
        assert np.abs(got - expected).max() < 1e-5 * expected.std()


# Tensors that do not fit the config

Q = "model.layers.0.self_attn.q_proj.weight"


def test_missing_tensors_are_listed(tmp_path):
    arrays = weights_of(ONE_LAYER)
    del arrays[NORM], arrays[Q]
    refused(write_checkpoint(tmp_path, ONE_LAYER, arrays), "2 tensors", NORM, Q, error=WeightsError)


def test_unknown_tensors_are_listed(tmp_path):
    arrays = {**weights_of(ONE_LAYER), "model.layers.0.mystery.weight": np.ones(3, np.float32)}
    path = write_checkpoint(tmp_path, ONE_LAYER, arrays)
    refused(path, "1 tensor", "model.layers.0.mystery.weight", error=WeightsError)


def test_a_bias_that_the_config_does_not_announce_is_not_dropped(tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    arrays = {**weights_of(ONE_LAYER), name: np.ones(64, np.float32)}
    refused(write_checkpoint(tmp_path, ONE_LAYER, arrays), name, error=WeightsError)


def test_layers_beyond_those_of_the_config_are_unknown(tmp_path):
    two = llama_config(num_hidden_layers=2)
    path = write_checkpoint(tmp_path, ONE_LAYER, weights_of(two))
    refused(path, "model.layers.1.", error=WeightsError)
    path = write_checkpoint(tmp_path, llama_config(), weights_of(two))
    refused(path, "9 tensors", "model.layers.2.", error=WeightsError)


@pytest.mark.parametrize("shape", [(), (0,), (63,), (65,), (64, 1), (1, 64)])
def test_a_wrong_shape_is_told_with_the_one_expected(tmp_path, shape):
    arrays = {**weights_of(ONE_LAYER), NORM: np.ones(shape, np.float32)}
    path = write_checkpoint(tmp_path, ONE_LAYER, arrays)
    refused(path, NORM, str(list(shape)), "[64]", error=WeightsError)


def test_a_transposed_weight_is_told(tmp_path):
    arrays = weights_of(ONE_LAYER)
    name = "model.layers.0.mlp.up_proj.weight"
    arrays[name] = arrays[name].T.copy()
    path = write_checkpoint(tmp_path, ONE_LAYER, arrays)
    refused(path, name, "[64, 96]", "[96, 64]", error=WeightsError)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.uint8, np.int8, np.bool_, np.int64])
@pytest.mark.parametrize("name", [NORM, Q, "model.embed_tokens.weight"])
def test_a_weight_of_whole_numbers_is_refused_by_name(tmp_path, name, dtype):
    arrays = weights_of(ONE_LAYER)
    arrays[name] = arrays[name].astype(dtype)
    refused(write_checkpoint(tmp_path, ONE_LAYER, arrays), name)


def test_a_head_of_another_size_than_the_vocabulary_is_refused(tmp_path):
    arrays = {**weights_of(ONE_LAYER), "lm_head.weight": np.ones((95, 64), np.float32)}
    path = write_checkpoint(tmp_path, ONE_LAYER, arrays)
    refused(path, "lm_head.weight", "[95, 64]", "[96, 64]", error=WeightsError)


# Headers without weights


def test_open_weights_tells_names_shapes_and_bytes_without_loading(tmp_path):
    path = write_checkpoint(tmp_path, ONE_LAYER, shards=2, dtype=mx.bfloat16)
    weights = open_weights(path)
    shapes = tensor_shapes(ONE_LAYER)
    assert {name: info.shape for name, info in weights.infos.items()} == shapes
    assert {info.dtype for info in weights.infos.values()} == {"BF16"}
    assert weights.nbytes == 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert weights.dtype == mx.bfloat16
    assert [file.name for file in weights.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def random_state() -> list[Any]:
    return list(cast(Any, mx.random.state))


def n_drawn(folder: Path) -> int:
    """Steps in the graph that MLX's random state waits for."""
    mx.export_to_dot(str(folder / "state.dot"), *random_state())
    return (folder / "state.dot").read_text().count("->")


def test_loads_leave_nothing_behind_in_the_random_state(tmp_path):
    path = chat_model(tmp_path / "m")
    mx.random.seed(7)
    key = random_state()[0].tolist()
    before = n_drawn(tmp_path)
    for _ in range(3):
        load_model(path, "float32")
        describe("m", path)
    assert n_drawn(tmp_path) == before
    assert random_state()[0].tolist() == key
