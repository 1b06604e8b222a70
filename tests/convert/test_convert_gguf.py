"""GGUF files: types, names, transforms, and the config that is made of their metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

import mlxkv
from mlxkv.checkpoint.config import Fields
from mlxkv.checkpoint.rope_config import rope_config
from mlxkv.convert import convert
from mlxkv.convert.gguf.file import open_gguf, readable_types
from mlxkv.convert.gguf.model import default_dtype, gguf_config
from mlxkv.convert.gguf.rope import llama3_factors
from mlxkv.convert.gguf.weight import GGUFWeight
from mlxkv.errors import CheckpointError, ConfigError, UnsupportedModel, WeightsError
from mlxkv.nn.rope import inverse_frequencies
from tests.support import gguf_files, tiny
from tests.support.gguf_files import QUANTIZABLE, random_blocks, write_gguf, write_model

OTHERS = sorted(set(readable_types()) - {*QUANTIZABLE, "F32", "F64"})


def logits(folder: Path, prompt: list[int]) -> np.ndarray:
    model = mlxkv.load_model(folder, dtype="float32")
    return np.array(model(mx.array([prompt])))


@pytest.mark.parametrize("kind", [*QUANTIZABLE, *OTHERS])
def test_every_type_reads_as_the_gguf_package_dequantizes_it(tmp_path: Path, kind: str):
    shape = (6, 512)
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    name = "blk.0.ffn_up.weight"
    stored = None if kind in QUANTIZABLE else random_blocks(kind, shape)
    path = write_gguf(
        tmp_path / "a.gguf",
        {name: values if stored is None else stored},
        "llama",
        {},
        lambda _: kind,
    )
    if stored is None:
        stored = quants.quantize(values, GGMLQuantizationType[kind])
    expected = quants.dequantize(stored, GGMLQuantizationType[kind])
    file = open_gguf(path)
    weight = GGUFWeight(file, file.tensors[name], "up")
    assert weight.shape == shape
    np.testing.assert_array_equal(np.array(weight.rows(0, 6)), expected)
    np.testing.assert_array_equal(np.array(weight.rows(2, 5)), expected[2:5])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_llama_file_gives_the_logits_of_the_checkpoint_it_was_made_of(tmp_path: Path, kind: str):
    """A prompt of 300 tokens: q and k in llama.cpp's order look right on a short one.

    The reference is a Hugging Face checkpoint with the same rounded values, so both run the same
    float32 computation but for packed products: 1e-4 of logits of order 1.
    """
    config = tiny.llama_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    path = write_model(tmp_path / "a.gguf", config, lambda _: kind, weights=weights)
    convert(path, tmp_path / "out", dtype="float32")
    rounded = weights
    if kind != "F32":
        stored = GGMLQuantizationType[kind]
        rounded = {
            name: quants.dequantize(quants.quantize(w, stored), stored) if w.ndim > 1 else w
            for name, w in weights.items()
        }
    reference = tiny.write_checkpoint(tmp_path / "hf", config, rounded)
    prompt = tiny.tokens(300)
    got, expected = logits(tmp_path / "out", prompt), logits(reference, prompt)
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4 * expected.std(), rtol=0)


def test_packed_rows_of_q_and_k_are_unpermuted(tmp_path: Path):
    config = tiny.llama_config()
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    path = write_model(tmp_path / "a.gguf", config, lambda _: "Q8_0", weights=weights)
    convert(path, tmp_path / "out")
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for name in ("q_proj", "k_proj"):
        module = f"model.layers.1.self_attn.{name}"
        assert stored[f"{module}.scales"].dtype == mx.float16
        got = mx.dequantize(
            stored[f"{module}.weight"],
            stored[f"{module}.scales"].astype(mx.float32),
            stored[f"{module}.biases"].astype(mx.float32),
            group_size=32,
            bits=8,
        )
        kind = GGMLQuantizationType.Q8_0
        rows = quants.dequantize(quants.quantize(weights[f"{module}.weight"], kind), kind)
        np.testing.assert_array_equal(np.array(got), rows)


def test_a_gemma_file_gives_the_logits_of_the_checkpoint_it_was_made_of(tmp_path: Path):
    """F32; the norms' added 1 costs up to half a unit in the last place of float32."""
    config = tiny.gemma3_config(query_pre_attn_scalar=16)
    path = write_model(tmp_path / "a.gguf", config)
    convert(path, tmp_path / "out", dtype="float32")
    reference = tiny.write_checkpoint(tmp_path / "hf", config)
    prompt = tiny.tokens(100)
    got, expected = logits(tmp_path / "out", prompt), logits(reference, prompt)
    np.testing.assert_allclose(got, expected, atol=1e-4 * expected.std(), rtol=0)


def test_gemma_keeps_packed_scales_in_float32_beside_bfloat16(tmp_path: Path):
    path = write_model(tmp_path / "a.gguf", tiny.gemma3_config(hidden_size=64), lambda _: "Q8_0")
    convert(path, tmp_path / "out")
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert stored["model.embed_tokens.scales"].dtype == mx.float32
    assert stored["model.norm.weight"].dtype == mx.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def gguf_of(tmp_path: Path, config: dict[str, Any], **changes: Any) -> Path:
    return write_model(tmp_path / "a.gguf", config, **changes)


def test_keys_that_a_gemma_file_lacks_are_the_familys_defaults(tmp_path: Path):
    file = open_gguf(gguf_of(tmp_path, tiny.gemma3_config()))
    config = gguf_config(file)
    assert config["sliding_window_pattern"] == 6
    assert config["rope_local_base_freq"] == 10000.0
    assert config["query_pre_attn_scalar"] == 16  # head_dim
    assert config["tie_word_embeddings"] is True


def test_the_gemma_of_62_layers_scales_queries_by_its_share_of_the_hidden_size(tmp_path: Path):
    config = tiny.gemma3_config(hidden_size=64)
    file = open_gguf(gguf_of(tmp_path, config, keys={"block_count": 62}))
    assert gguf_config(file)["query_pre_attn_scalar"] == 64 // 4


@pytest.mark.parametrize(("kind", "llama", "gemma"), [
    ("F32", "float32", "float32"),
    ("F16", "float16", "bfloat16"),
    ("BF16", "bfloat16", "bfloat16"),
    ("Q8_0", "float16", "bfloat16"),
])  # fmt: skip
def test_the_default_dtype_is_the_files_own_or_what_the_family_can_hold(
    tmp_path: Path, kind: str, llama: str, gemma: str
):
    for config, expected in (
        (tiny.llama_config(), llama),
        (tiny.gemma3_config(hidden_size=64), gemma),
    ):
        file = open_gguf(write_model(tmp_path / "a.gguf", config, lambda _: kind))
        assert default_dtype(file) == expected


def freqs_file(tmp_path: Path, factors: np.ndarray) -> Path:
    config = tiny.llama_config(hidden_size=256, max_position_embeddings=131072, rope_theta=500000.0)
    return gguf_of(tmp_path, config, extra={"rope_freqs.weight": factors.astype(np.float32)})


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (4.0, 2048)])
def test_llama_3_frequencies_become_the_four_numbers_they_came_from(
    tmp_path: Path, factor: float, original: int
):
    path = freqs_file(tmp_path, llama3_factors(500000.0, 64, factor, original))
    assert gguf_config(open_gguf(path))["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def test_frequencies_of_another_origin_are_kept_as_they_are(tmp_path: Path):
    factors = np.linspace(1.0, 9.0, 32)
    config = gguf_config(open_gguf(freqs_file(tmp_path, factors)))
    rope = rope_config(Fields(config, "config.json"), 64, default_theta=None)
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    for n_tokens in (10, 200_000):
        np.testing.assert_allclose(inverse_frequencies(rope, n_tokens), plain / factors, rtol=1e-6)


def test_linear_and_yarn_scaling_are_read(tmp_path: Path):
    config = tiny.llama_config()
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    found = gguf_config(open_gguf(gguf_of(tmp_path, config, keys=linear)))
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 512,
    }
    found = gguf_config(open_gguf(gguf_of(tmp_path, config, keys=yarn)))
    assert found["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
    }
    none = {"rope.scaling.type": "none"}
    assert gguf_config(open_gguf(gguf_of(tmp_path, config, keys=none)))["rope_scaling"] is None


def test_an_array_by_layer_is_read_where_it_is_constant_and_refused_where_not(tmp_path: Path):
    config = tiny.llama_config()
    same = open_gguf(gguf_of(tmp_path, config, keys={"attention.head_count_kv": [2, 2, 2]}))
    assert gguf_config(same)["num_key_value_heads"] == 2
    mixed = open_gguf(gguf_of(tmp_path, config, keys={"attention.head_count_kv": [2, 4, 2]}))
    with pytest.raises(
        ConfigError, match=r"a\.gguf: llama\.attention\.head_count_kv differs by layer"
    ):
        gguf_config(mixed)


def test_a_window_makes_it_a_mistral(tmp_path: Path):
    path = gguf_of(tmp_path, tiny.llama_config(), keys={"attention.sliding_window": 24})
    config = gguf_config(open_gguf(path))
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 24)


def test_a_key_that_is_not_understood_is_an_error_that_names_it(tmp_path: Path):
    path = gguf_of(tmp_path, tiny.llama_config(), keys={"logit_scale": 0.5})
    with pytest.raises(ConfigError, match=r"a\.gguf: llama\.logit_scale is not understood"):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_key_is_an_error_that_names_it(tmp_path: Path):
    path = gguf_of(tmp_path, tiny.llama_config(), keys={"feed_forward_length": None})
    with pytest.raises(ConfigError, match=r"a\.gguf: llama\.feed_forward_length must be"):
        convert(path, tmp_path / "out")


def test_an_unknown_architecture_is_named_with_those_that_are_known(tmp_path: Path):
    path = write_gguf(tmp_path / "a.gguf", {"x": np.zeros((2, 32), np.float32)}, "mamba", {})
    with pytest.raises(
        UnsupportedModel, match=r"architecture 'mamba' .* gemma3n, .* llama, .* smollm3$"
    ):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["chatglm", "deepseek2"])
def test_a_family_of_others_is_named(name, tmp_path: Path):
    path = write_gguf(tmp_path / "a.gguf", {"x": np.zeros((2, 32), np.float32)}, name, {})
    with pytest.raises(UnsupportedModel, match=r"(ChatGLM|DeepSeek).* none of mlxkv's families"):
        convert(path, tmp_path / "out")


def test_experts_are_refused_by_name(tmp_path: Path):
    extra = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 32, 32), np.float32)}
    path = gguf_of(tmp_path, tiny.llama_config(), extra=extra)
    with pytest.raises(UnsupportedModel, match=r"Mixtral or another mixture .*ffn_gate_exps"):
        convert(path, tmp_path / "out")


def test_unknown_and_missing_tensors_are_listed(tmp_path: Path):
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    path = gguf_of(tmp_path, tiny.llama_config(), extra=extra)
    with pytest.raises(WeightsError, match=r"a\.gguf: 1 tensors .*: blk\.0\.attn_sinks\.weight"):
        convert(path, tmp_path / "out")
    config = tiny.llama_config()
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    del weights["model.layers.2.mlp.up_proj.weight"], weights["model.norm.weight"]
    path = gguf_of(tmp_path, config, weights=weights)
    missing = r"2 missing: model\.layers\.2\.mlp\.up_proj\.weight, model\.norm\.weight"
    with pytest.raises(WeightsError, match=missing):
        convert(path, tmp_path / "out")


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path):
    config = tiny.llama_config()
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((80, 64), np.float32)
    path = gguf_of(tmp_path, config, weights=weights)
    with pytest.raises(WeightsError, match=r"up_proj\.weight is \[80, 64\], .* says \[96, 64\]"):
        convert(path, tmp_path / "out")


def test_more_tokens_than_rows_are_refused(tmp_path: Path):
    path = gguf_of(tmp_path, tiny.llama_config(), keys=gguf_files.tokens(97))
    with pytest.raises(CheckpointError, match="97 tokens and an embedding of 96 rows"):
        convert(path, tmp_path / "out")


def test_a_requantized_file_equals_what_mlx_makes_of_its_values(tmp_path: Path):
    config = tiny.llama_config()
    path = write_model(tmp_path / "a.gguf", config, lambda _: "Q5_0")
    convert(path, tmp_path / "dense", dtype="float32", quantize="none")
    convert(path, tmp_path / "out", dtype="float32", quantize="affine4", group_size=32)
    dense = mx.load(str(tmp_path / "dense" / "model.safetensors"))
    packed = mx.load(str(tmp_path / "out" / "model.safetensors"))
    module = "model.layers.0.mlp.down_proj"
    expected = mx.quantize(dense[f"{module}.weight"], group_size=32, bits=4)
    for suffix, array in zip(("weight", "scales", "biases"), expected, strict=True):
        assert mx.array_equal(packed[f"{module}.{suffix}"], array)


def test_a_packed_tensor_that_has_the_wanted_packing_already_is_not_packed_again(tmp_path: Path):
    path = write_model(tmp_path / "a.gguf", tiny.llama_config(), lambda _: "Q4_1")
    plan = convert(path, tmp_path / "x", quantize="affine4", group_size=32, dry_run=True).plan
    actions = {t.name: t.action for t in plan.tensors}
    assert actions["model.layers.0.mlp.up_proj.weight"] == "copy"
    plan = convert(path, tmp_path / "x", quantize="affine8", group_size=32, dry_run=True).plan
    assert {t.action for t in plan.tensors if t.quantization} == {"requantize"}
    plan = convert(path, tmp_path / "x", quantize="none", dry_run=True).plan
    assert {t.quantization for t in plan.tensors} == {None}
