"""Hugging Face checkpoints in, MLX directories out, which mlxkv and mlx-lm both load."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

import mlxkv
from mlxkv.checkpoint.quantization import Format
from mlxkv.convert import Progress, changes, convert, describe
from mlxkv.convert.config import output_config
from mlxkv.convert.plan import ConvertPlan
from mlxkv.convert.quantization import MIXED, NAMES
from mlxkv.errors import UnsupportedModel, UsageError, WeightsError
from tests.support import tiny


def new_style(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it."""
    config = dict(config)
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling", None)
    full = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    config["dtype"] = config.pop("torch_dtype")
    if config["model_type"].startswith("gemma3"):
        local = config.pop("rope_local_base_freq")
        pattern, n = config.pop("sliding_window_pattern"), config["num_hidden_layers"]
        config["layer_types"] = [
            "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(n)
        ]
        sliding = {"rope_type": "default", "rope_theta": local}
        full = {"full_attention": full, "sliding_attention": sliding}
        config["_sliding_window_pattern"] = 6
    config["rope_parameters"] = full
    return config


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
CONFIGS = {
    "llama": tiny.llama_config(),
    "llama, tied, biased": tiny.llama_config(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=32
    ),
    "llama 3.1": tiny.llama_config(rope_scaling=LLAMA3),
    "gemma3": tiny.gemma3_config(),
    "gemma3, pattern 3, scaled": tiny.gemma3_config(
        sliding_window_pattern=3, rope_scaling={"rope_type": "linear", "factor": 8.0}
    ),
}


def ours(folder: Path, prompt: list[int]) -> np.ndarray:
    return np.array(mlxkv.load_model(folder, dtype="float32")(mx.array([prompt])))[0]


def mlx_lms(folder: Path, prompt: list[int]) -> np.ndarray:
    """In float32 as ours are: 16-bit products on a CPU are a few percent off."""
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([prompt])))[0]


@pytest.mark.parametrize("style", ["hub", "new"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_has_the_inputs_logits_here_and_in_mlx_lm(tmp_path: Path, name: str, style: str):
    """float32 throughout: ours must be the same to the bit, mlx-lm differs in the order of sums
    and, for Gemma, rounds the embedding's scale to bfloat16, which is 1e-3 of it."""
    config = new_style(CONFIGS[name]) if style == "new" else CONFIGS[name]
    source = tiny.write_checkpoint(tmp_path / "hf", config, shards=2)
    convert(source, tmp_path / "out")
    prompt = tiny.tokens(80)
    expected = ours(source, prompt)
    np.testing.assert_array_equal(ours(tmp_path / "out", prompt), expected)
    theirs = mlx_lms(tmp_path / "out", prompt)
    tolerance = 2e-2 if name.startswith("gemma") else 1e-4
    np.testing.assert_allclose(theirs, expected, atol=tolerance * expected.std(), rtol=0)
    assert (theirs.argmax(-1) == expected.argmax(-1)).mean() > 0.98


def test_greedy_tokens_are_the_same_here_and_in_mlx_lm_after_quantizing(tmp_path: Path):
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())
    convert(source, tmp_path / "out", quantize="affine8", group_size=32)
    continuations = []
    for logits in (ours, mlx_lms):
        ids = tiny.tokens(12)
        for _ in range(12):
            ids.append(int(logits(tmp_path / "out", ids)[-1].argmax()))
        continuations.append(ids)
    assert continuations[0] == continuations[1]


def test_a_multimodal_gemma_becomes_its_language_model(tmp_path: Path):
    text = tiny.gemma3_config()
    weights = tiny.random_weights(tiny.tensor_shapes(text), 0, 0.0)
    nested = {f"language_model.{name}": array for name, array in weights.items()}
    nested["vision_tower.embeddings.weight"] = np.zeros((4, 4), np.float32)
    nested["multi_modal_projector.mm_input_projection_weight"] = np.zeros((4, 4), np.float32)
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "torch_dtype": "float32",
        "eos_token_id": [1, 7],
    }
    source = tiny.write_checkpoint(tmp_path / "hf", config, nested)
    plan = convert(source, tmp_path / "out").plan
    assert [name for name, _ in plan.skipped] == [
        "multi_modal_projector.mm_input_projection_weight",
        "vision_tower.embeddings.weight",
    ]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "gemma3_text"
    assert written["eos_token_id"] == [1, 7]  # what stops the whole model
    assert not {"text_config", "vision_config"} & set(written)
    prompt = tiny.tokens(50)
    np.testing.assert_array_equal(ours(tmp_path / "out", prompt), ours(source, prompt))
    assert np.isfinite(mlx_lms(tmp_path / "out", prompt)).all()


@pytest.mark.parametrize("mode", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mode_packs_what_mlx_packs(tmp_path: Path, mode: str, dtype: str):
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())
    group = 32 if mode.startswith("affine") else None
    plan = convert(source, tmp_path / "out", quantize=mode, group_size=group, dtype=dtype).plan
    dense = mx.load(str(source / "model.safetensors"))
    packed = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for tensor in plan.tensors:
        values = dense[tensor.name].astype(getattr(mx, dtype))
        if tensor.quantization is None:
            assert mx.array_equal(packed[tensor.name], values)
            assert "norm" in tensor.name
            continue
        q = tensor.quantization
        expected = mx.quantize(values, q.group_size, q.bits, mode=q.mode)
        for array, stored in zip(expected, tensor.arrays, strict=True):
            assert mx.array_equal(packed[stored.name], array), stored.name
            assert (tuple(array.shape), f"mlx.core.{stored.dtype}") == (
                stored.shape,
                str(array.dtype),
            )
    prompt = tiny.tokens(30)
    mine, theirs = ours(tmp_path / "out", prompt), mlx_lms(tmp_path / "out", prompt)
    np.testing.assert_allclose(mine, theirs, atol=1e-3 * mine.std())


def test_the_mixed_recipe_writes_an_entry_for_each_module_with_more_bits(tmp_path: Path):
    config = tiny.llama_config(num_hidden_layers=8)
    source = tiny.write_checkpoint(tmp_path / "hf", config)
    plan = convert(source, tmp_path / "out", quantize="affine4", group_size=32, recipe="mixed").plan
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {key: entries.pop(key) for key in ("bits", "group_size", "mode")} == {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
    }
    expected = {"model.embed_tokens", "lm_head"}
    for layer in (0, 7):
        expected |= {f"model.layers.{layer}.{n}" for n in ("self_attn.v_proj", "mlp.down_proj")}
    assert set(entries) == expected
    assert {entry["bits"] for entry in entries.values()} == {6}
    assert 4 < plan.bits_per_weight < 6.5
    prompt = tiny.tokens(30)
    mine, theirs = ours(tmp_path / "out", prompt), mlx_lms(tmp_path / "out", prompt)
    np.testing.assert_allclose(mine, theirs, atol=1e-3 * mine.std())


def test_a_packed_checkpoint_is_copied_unpacked_or_packed_anew(tmp_path: Path):
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())
    first = convert(source, tmp_path / "q4", quantize="affine4", group_size=32)
    again = convert(tmp_path / "q4", tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (
        tmp_path / "q4" / "model.safetensors"
    ).read_bytes()
    assert again.plan.config == first.plan.config
    assert {t.action for t in again.plan.tensors} == {"copy"}

    convert(tmp_path / "q4", tmp_path / "dense", quantize="none")
    prompt = tiny.tokens(30)
    dense, packed = ours(tmp_path / "dense", prompt), ours(tmp_path / "q4", prompt)
    np.testing.assert_allclose(dense, packed, atol=1e-4 * packed.std())
    assert "quantization" not in json.loads((tmp_path / "dense" / "config.json").read_text())

    convert(tmp_path / "q4", tmp_path / "q8", quantize="mxfp8")
    one = mx.load(str(tmp_path / "dense" / "model.safetensors"))["lm_head.weight"]
    other = mx.load(str(tmp_path / "q8" / "model.safetensors"))
    weight, scales = mx.quantize(one, mode="mxfp8")
    assert mx.array_equal(other["lm_head.weight"], weight)
    assert mx.array_equal(other["lm_head.scales"], scales)


def test_rows_that_the_group_does_not_divide_get_a_smaller_group_and_are_listed(tmp_path: Path):
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())  # down_proj: 96 columns
    plan = convert(source, tmp_path / "out", quantize="affine4", group_size=64).plan
    down = {t.name: t.quantization for t in plan.tensors if t.note}
    assert down == {
        f"model.layers.{i}.mlp.down_proj.weight": Format("affine", 4, 32) for i in range(3)
    }
    assert "in smaller groups: 3 (model.layers.0.mlp.down_proj.weight, " in describe(plan)
    assert any("96 columns do not divide into groups of 64" in line for line in changes(plan, {}))
    prompt = tiny.tokens(30)
    np.testing.assert_allclose(
        ours(tmp_path / "out", prompt), mlx_lms(tmp_path / "out", prompt), atol=1e-3
    )


def test_rows_that_no_group_divides_stay_as_they_are_and_are_named(tmp_path: Path):
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config(intermediate_size=80))
    plan = convert(source, tmp_path / "out", quantize="mixed_3_6").plan
    left = {t.name for t in plan.tensors if t.note and t.quantization is None}
    assert left == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    assert any(line.startswith("not quantized: 3 (model.") for line in changes(plan, {}))
    assert np.isfinite(ours(tmp_path / "out", tiny.tokens(8))).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", MIXED)
def test_mlx_lms_recipes_raise_the_weights_that_mlx_lm_raises(
    tmp_path: Path, recipe: str, tied: bool
):
    """But for an embedding that is the head, which mlx-lm leaves at fewer bits."""
    config = tiny.llama_config(num_hidden_layers=9, tie_word_embeddings=tied)
    source = tiny.write_checkpoint(tmp_path / "hf", config)
    plan = convert(source, tmp_path / "out", quantize=recipe, group_size=32, dry_run=True).plan
    model, _ = mlx_lm.utils.load_model(source)
    theirs = importlib.import_module("mlx_lm.convert").mixed_quant_predicate_builder(
        recipe, model, 32
    )
    modules = {path: module for path, module in model.named_modules() if "weight" in module}
    for tensor in plan.tensors:
        if tensor.quantization is None:
            assert "norm" in tensor.name
            continue
        bits = theirs(tensor.module, modules[tensor.module])["bits"]
        if tied and tensor.module == "model.embed_tokens":
            bits = MIXED[recipe][1]
        assert tensor.quantization == Format("affine", bits, 32), tensor.name


def test_dtype_casts_everything(tmp_path: Path):
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())
    convert(source, tmp_path / "out", dtype="bfloat16")
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {array.dtype for array in stored.values()} == {mx.bfloat16}
    dense = mx.load(str(source / "model.safetensors"))
    for name, array in stored.items():
        assert mx.array_equal(array, dense[name].astype(mx.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_copied_head_is_left_out_and_an_own_head_unties(tmp_path: Path):
    config = tiny.llama_config(tie_word_embeddings=True)
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    embedding = weights["model.embed_tokens.weight"]
    source = tiny.write_checkpoint(tmp_path / "a", config, {**weights, "lm_head.weight": embedding})
    plan = convert(source, tmp_path / "a-out").plan
    assert plan.skipped == (("lm_head.weight", "a copy of the embedding, which is the head"),)
    assert plan.config["tie_word_embeddings"] is True
    own = {**weights, "lm_head.weight": embedding[::-1].copy()}
    source = tiny.write_checkpoint(tmp_path / "b", config, own)
    plan = convert(source, tmp_path / "b-out").plan
    assert plan.config["tie_word_embeddings"] is False
    prompt = tiny.tokens(20)
    np.testing.assert_array_equal(ours(tmp_path / "b-out", prompt), ours(source, prompt))
    np.testing.assert_allclose(mlx_lms(tmp_path / "b-out", prompt), ours(source, prompt), atol=1e-4)


def test_unknown_and_missing_tensors_are_listed_and_counted(tmp_path: Path):
    config = tiny.llama_config()
    weights = tiny.random_weights(tiny.tensor_shapes(config))
    weights["model.layers.0.self_attn.extra.weight"] = np.zeros((2, 2), np.float32)
    del weights["lm_head.weight"]
    source = tiny.write_checkpoint(tmp_path / "hf", config, weights)
    listing = r"1 missing: lm_head\.weight; 1 unknown: model\.layers\.0\.self_attn\.extra\.weight"
    with pytest.raises(WeightsError, match=listing):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_foreign_quantization_is_named(tmp_path: Path):
    config = tiny.llama_config(quantization_config={"quant_method": "hqq", "bits": 4})
    source = tiny.write_checkpoint(tmp_path / "hf", config)
    with pytest.raises(UnsupportedModel, match="quant_method 'hqq' is not supported"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(("options", "message"), [
    ({"quantize": "affine7"}, r"quantize must be one of affine2, .*, auto, none; got 'affine7'"),
    ({"quantize": "affine4", "group_size": 16}, r"must be one of 32, 64, 128 for affine4; got 16"),
    ({"quantize": "nvfp4", "group_size": 32}, r"group_size must be one of 16 for nvfp4; got 32"),
    ({"group_size": 32}, r"group_size is for a model that is quantized"),
    ({"dtype": "float8"}, r"dtype must be one of float16, bfloat16, float32; got 'float8'"),
    ({"recipe": "mixed"}, r"recipe mixed is for a model that is quantized"),
    ({"recipe": "best", "quantize": "affine4"}, r"recipe must be one of mixed; got 'best'"),
    ({"recipe": "mixed", "quantize": "affine8"}, r"nothing has more than affine8"),
    ({"recipe": "mixed", "quantize": "mixed_3_6"}, r"recipe mixed_3_6 is a recipe itself"),
    ({"recipe": "mixed", "quantize": "auto"}, r"recipe auto chooses the bits itself"),
    ({"target_bits": 4.5, "quantize": "affine4"}, r"target_bits is for a model that is measured"),
    ({"target_bits": 0.5, "quantize": "auto"}, r"target_bits must be more than 1 .*; got 0\.5"),
    ({"calibrate": True, "quantize": "mxfp4"}, r"calibrate is for affine formats"),
])  # fmt: skip
def test_a_wrong_option_says_what_is_allowed(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        convert(tmp_path, tmp_path / "out", **options)


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path: Path):
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())
    dry = convert(source, tmp_path / "out", quantize="affine4", group_size=32, dry_run=True)
    assert dry.path is None
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    wet = convert(source, tmp_path / "out", quantize="affine4", group_size=32)
    assert dry.plan == wet.plan
    data = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert wet.plan.total_bytes == sum(array.nbytes for array in data.values())
    text = describe(dry.plan)
    assert "model.layers.*.mlp.down_proj.weight" in text
    assert "note: no tokenizer.json, and nothing to make one of" in text
    assert f"{wet.plan.n_parameters:,} parameters" in text
    assert f"{wet.plan.bits_per_weight:.2f} bits per weight" in text


def test_shards_are_cut_at_the_limit_and_indexed(tmp_path: Path):
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())
    convert(source, tmp_path / "out", quantize="affine8", group_size=32, max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert n > 2
    for file in files:
        names = {name for name, place in index["weight_map"].items() if place == file}
        assert set(mx.load(str(tmp_path / "out" / file))) == names
        modules = {name.rpartition(".")[0] for name in names if name.endswith("scales")}
        assert {f"{module}.weight" for module in modules} <= names
    prompt = tiny.tokens(20)
    np.testing.assert_allclose(
        ours(tmp_path / "out", prompt), mlx_lms(tmp_path / "out", prompt), atol=1e-3
    )


def test_files_beside_the_weights_are_copied(tmp_path: Path):
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())
    beside = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "generation_config.json": '{"eos_token_id": [1, 2]}',
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "as it is",
    }
    for name, text in {**beside, "modeling_evil.py": "boom", "README.md": "no"}.items():
        (source / name).write_text(text)
    tools = Path("additional_chat_templates") / "tool_use.jinja"
    (source / tools).parent.mkdir()
    (source / tools).write_text("{{ tools }}")
    (source / tools).with_name("rag.jinja").write_text("{{ documents }}")
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / tools).read_text() == "{{ tools }}"
    assert (tmp_path / "out" / tools).with_name("rag.jinja").read_text() == "{{ documents }}"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *beside,
        "additional_chat_templates",
        "config.json",
        "model.safetensors",
    }
    for name, text in beside.items():
        assert (tmp_path / "out" / name).read_text() == text


def test_progress_ends_at_the_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Which is no sum over all tensors at each step."""
    source = tiny.write_checkpoint(tmp_path / "hf", tiny.llama_config())
    events: list[Progress] = []
    summed = Mock(side_effect=ConvertPlan.total_bytes.fget)  # pyright: ignore
    monkeypatch.setattr(ConvertPlan, "total_bytes", property(lambda plan: summed(plan)))
    plan = convert(source, tmp_path / "out", progress=events.append).plan
    assert len(events) > 5 > summed.call_count
    assert [event.phase for event in events[-2:]] == ["files", "done"]
    assert all(event.total_bytes == plan.total_bytes for event in events)
    done = [event.done_bytes for event in events]
    assert done == sorted(done)
    assert done[-1] == plan.total_bytes


def test_new_style_keys_are_added_in_the_older_form():
    config = new_style(tiny.gemma3_config(rope_scaling={"rope_type": "linear", "factor": 8.0}))
    written = output_config(config, native=True, tied=True, dtype="bfloat16", quantization=None)
    assert written["rope_theta"] == 1000000.0
    assert written["rope_local_base_freq"] == 10000.0
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert written["sliding_window_pattern"] == 6
    assert written["rope_parameters"] == config["rope_parameters"]
    assert written["torch_dtype"] == "bfloat16"
    assert "dtype" not in written


def test_layer_types_count_before_the_pattern_that_transformers_writes_beside_them():
    config = new_style(tiny.gemma3_config(sliding_window_pattern=2))
    assert config["_sliding_window_pattern"] == 6
    written = output_config(config, native=True, tied=True, dtype="bfloat16", quantization=None)
    assert written["sliding_window_pattern"] == 2
