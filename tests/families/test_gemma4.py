"""Gemma 4's own rules; test_parity.py holds its logits against transformers.

Tolerance: both sides compute in float32 and differ in the order of their sums, 1e-4 of the logits'
standard deviation; a wrong name, size or mask shows over 1e-2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxkv
from mlxkv.convert import convert
from mlxkv.convert.quantization import is_raised
from mlxkv.errors import ConfigError
from mlxkv.models.gemma4 import Model, remap
from mlxkv.models.gemma4_config import Config
from tests.support import tiny

FULL, SLIDING = "full_attention", "sliding_attention"
TOLERANCE = 1e-4


def gemma4_config(**changes: Any) -> dict[str, Any]:
    """An E2B in the hub style: the last three of seven layers read earlier ones' KV."""
    return {
        "model_type": "gemma4_text",
        "vocab_size": 96,
        "vocab_size_per_layer_input": 96,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "sliding_window": 16,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 8.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **changes,
    }


def moe_config(**changes: Any) -> dict[str, Any]:
    """A 26B-A4B in the hub style: four experts, keys that are values in full layers."""
    experts = {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "enable_moe_block": True,
    }
    heads = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    plain = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    return gemma4_config(**{**experts, **heads, **plain, "use_double_wide_mlp": False, **changes})


BOTH = pytest.mark.parametrize("config", [gemma4_config(), moe_config()], ids=["e2b", "moe"])


def weights_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random tensors under mlx-lm's names, which are ours."""
    parameters = tree_flatten(Model(Config.from_dict(config)).parameters())
    return tiny.random_weights({name: array.shape for name, array in parameters}, 0, 0.5)


def hugging_face(weights: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The same under the names of the published checkpoints, the experts' gates and ups fused."""
    renamed = {}
    for name, array in weights.items():
        name = name.replace("model.", prefix, 1)
        if name.endswith("switch_glu.down_proj.weight"):
            name = name.replace("switch_glu.down_proj.weight", "down_proj")
        elif name.endswith("switch_glu.up_proj.weight"):
            continue
        elif name.endswith("switch_glu.gate_proj.weight"):
            own = name.replace(prefix, "model.", 1)
            array = np.concatenate([array, weights[own.replace("gate_proj", "up_proj")]], axis=1)
            name = name.replace("switch_glu.gate_proj.weight", "gate_up_proj")
        renamed[name] = array
    return renamed


def load(folder: Path) -> Any:
    return mlxkv.load_model(folder, dtype=mx.float32)


def logits(folder: Path, n: int = 60) -> np.ndarray:
    return np.array(load(folder)(mx.array([tiny.tokens(n)])))[0]


def check_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() < TOLERANCE * expected.std()


# Layers without KV of their own


@BOTH
@pytest.mark.parametrize("chunk", [1, 5, 16, 60])
def test_the_last_tokens_logits_need_no_other_tokens_in_layers_without_kv(tmp_path, config, chunk):
    model = load(tiny.write_checkpoint(tmp_path, config, weights_of(config)))
    tokens = mx.array([tiny.tokens(60), tiny.tokens(60, seed=1)])
    expected = np.array(model(tokens))
    check_close(np.array(model.last_logits(tokens)), expected[:, -1])
    caches = mlxkv.make_caches(model)
    for start in range(0, 60, chunk):
        last = model.last_logits(tokens[:, start : start + chunk], caches)
        check_close(np.array(last), expected[:, min(start + chunk, 60) - 1])


def test_a_layer_reads_the_kv_of_the_last_layer_of_its_kind_that_has_its_own():
    config = Config.from_dict(gemma4_config())
    assert [heads.donor for heads in config.heads] == [None, None, None, None, 3, 3, 2]
    model = Model(config)
    assert [spec is None for spec in model.cache_specs()] == [False] * 4 + [True] * 3
    assert len(mlxkv.make_caches(model)) == 4
    for i, layer in enumerate(model.model.layers):
        own = {"k_proj", "v_proj", "k_norm"} & set(layer.self_attn)
        assert own == ({"k_proj", "v_proj", "k_norm"} if i < 4 else set())
        assert layer.mlp.gate_proj.weight.shape[0] == (64 if i < 4 else 128)


def test_full_layers_have_heads_of_their_own_and_use_keys_as_values_where_the_config_says_so():
    model = Model(Config.from_dict(moe_config()))
    shapes = {(s.n_kv_heads, s.k_dim, s.v_dim, s.window) for s in model.cache_specs() if s}
    assert shapes == {(2, 16, 16, 16), (1, 32, 32, None)}
    kinds = ["v_proj" in layer.self_attn for layer in model.model.layers]
    assert kinds == [True, True, False, True, True, True, False]


# Checkpoints


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
@BOTH
def test_every_prefix_that_checkpoints_have_loads_as_the_same_text_model(tmp_path, config, prefix):
    weights = weights_of(config)
    expected = logits(tiny.write_checkpoint(tmp_path / "ours", config, weights))
    outer = {"model_type": "gemma4", "text_config": config, "vision_config": {}, "audio_config": {}}
    published = hugging_face(weights, prefix)
    folder = tiny.write_checkpoint(
        tmp_path / "hf", config if prefix == "model." else outer, published
    )
    np.testing.assert_array_equal(logits(folder), expected)


def test_vision_audio_and_unused_kv_are_named_as_skipped():
    config = Config.from_dict(gemma4_config())
    unused = [
        "model.vision_tower.patch_embedder.input_proj.weight",
        "model.audio_tower.output_proj.bias",
        "model.embed_vision.embedding_projection.weight",
        "model.embed_audio.embedding_projection.weight",
        "model.vision_embedder.patch_dense.weight",
        "model.language_model.layers.4.self_attn.k_proj.weight",
        "model.language_model.layers.5.self_attn.v_proj.scales",
        "model.language_model.layers.6.self_attn.k_norm.weight",
        "model.language_model.rotary_emb.full_attention_inv_freq",
    ]
    used = ["model.language_model.layers.3.self_attn.k_proj.weight"]
    kept, skipped = remap({name: mx.zeros((1,)) for name in unused + used}, config)
    assert skipped == unused
    assert list(kept) == ["model.layers.3.self_attn.k_proj.weight"]


@pytest.mark.parametrize("mode", [None, "affine4"])
@pytest.mark.filterwarnings("ignore")
@BOTH
def test_published_names_convert_to_what_mlx_lm_loads(tmp_path, config, mode):
    utils = pytest.importorskip("mlx_lm.utils")
    weights = hugging_face(weights_of(config), "model.language_model.")
    outer = {"model_type": "gemma4", "text_config": config}
    vision = {"model.embed_vision.embedding_projection.weight": np.ones((4, 4), np.float32)}
    source = tiny.write_checkpoint(tmp_path / "hf", outer, {**weights, **vision})
    group_size = 32 if mode else None
    result = convert(source, tmp_path / "out", quantize=mode, group_size=group_size)
    assert [name for name, _ in result.plan.skipped] == list(vision)
    ours = logits(tmp_path / "out")
    theirs, _ = utils.load_model(tmp_path / "out")
    theirs.set_dtype(mx.float32)
    difference = np.array(theirs(mx.array([tiny.tokens(60)])))[0] - ours
    assert np.abs(difference).max() < 1e-3 * ours.std()
    if mode is None:
        np.testing.assert_array_equal(ours, logits(source))


@BOTH
def test_a_config_of_the_new_style_converts_to_the_one_of_the_hub_style(tmp_path, config):
    weights = weights_of(config)
    new = {key: value for key, value in config.items() if "global" not in key}
    full = {"head_dim": 32, "num_key_value_heads": config.get("num_global_key_value_heads", 2)}
    new["per_layer_config"] = {"2": full, "6": full}
    plans = [
        convert(tiny.write_checkpoint(tmp_path / style, c, weights), tmp_path / f"{style}-out").plan
        for style, c in (("new", new), ("hub", config))
    ]
    written = [{k: v for k, v in p.config.items() if k != "per_layer_config"} for p in plans]
    assert written[0] == written[1]
    assert written[0]["global_head_dim"] == 32


@pytest.mark.filterwarnings("ignore")
@BOTH
def test_what_mlx_lm_quantized_loads_with_its_own_formats_by_path(tmp_path, config):
    utils = pytest.importorskip("mlx_lm.utils")
    outer = {"model_type": "gemma4", "text_config": config, "vocab_size": 96}
    source = tiny.write_checkpoint(
        tmp_path / "hf", outer, hugging_face(weights_of(config), "model.language_model.")
    )
    theirs, raw = utils.load_model(source)
    theirs, raw = utils.quantize_model(theirs, raw, 32, 4)
    utils.save_model(tmp_path / "packed", theirs)
    utils.save_config(raw, tmp_path / "packed" / "config.json")
    expected = np.array(theirs(mx.array([tiny.tokens(60)])))[0]
    packed = load(tmp_path / "packed")
    if "num_experts" in config:
        router = packed.model.layers[0].router.proj
        assert (router.bits, router.group_size) == (8, 64)
    got = np.array(packed(mx.array([tiny.tokens(60)])))[0]
    assert np.abs(got - expected).max() < 1e-3 * expected.std()


def test_the_mixed_recipe_gives_per_layer_embeddings_more_bits():
    sensitive = ("embed_tokens_per_layer", "per_layer_model_projection")
    layers = ("per_layer_input_gate", "per_layer_projection")
    names = [*(f"model.{n}.weight" for n in sensitive)]
    names += [f"model.layers.3.{n}.weight" for n in layers]
    assert all(is_raised("mixed", name, 7) for name in names)


# Configs


def test_a_config_of_the_new_style_gives_each_layer_its_own_heads():
    new = gemma4_config()
    del new["global_head_dim"]
    new["per_layer_config"] = {"02": {"head_dim": 32}, "06": {"head_dim": 32}}
    assert Config.from_dict(new) == Config.from_dict(gemma4_config())


def test_kv_heads_of_full_layers_count_only_where_keys_are_values():
    config = Config.from_dict(gemma4_config(num_global_key_value_heads=1))
    assert {heads.n_kv_heads for heads in config.heads} == {2}


def test_the_last_layer_is_full_whatever_the_config_says():
    config = Config.from_dict(gemma4_config(layer_types=[SLIDING, FULL, *[SLIDING] * 5]))
    assert config.heads[-1].window is None


@pytest.mark.parametrize("value", [None, False, "vision"])
def test_attention_that_is_bidirectional_for_images_is_causal_for_text(value):
    Config.from_dict(gemma4_config(use_bidirectional_attention=value))


def nested_rope(**full: Any) -> dict[str, Any]:
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    return {SLIDING: sliding, FULL: {"rope_type": "proportional", "rope_theta": 1e6, **full}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_bidirectional_attention": "all"}, ["use_bidirectional_attention"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "4"]),
        ({"num_kv_shared_layers": 7}, ["num_kv_shared_layers", "7"]),
        ({"num_kv_shared_layers": 5}, ["num_kv_shared_layers", "5"]),
        ({"num_kv_shared_layers": 9}, ["num_kv_shared_layers", "9"]),
        ({"num_kv_shared_layers": -1}, ["num_kv_shared_layers", "-1"]),
        ({"per_layer_config": {"7": {"head_dim": 32}}}, ["per_layer_config", "7"]),
        ({"per_layer_config": {"x": {"head_dim": 32}}}, ["per_layer_config", "x"]),
        ({"per_layer_config": {"2": {"sliding_window": 32}}}, ["per_layer_config", "sliding_w"]),
        ({"per_layer_config": {"2": {"head_dim": 32}}}, ["per_layer_config", "heads"]),
        ({"rope_parameters": {"rope_theta": 1e4}}, ["rope_parameters", SLIDING]),
        ({"rope_parameters": {SLIDING: {"rope_theta": 1e4}}}, ["rope_parameters", FULL]),
        ({"rope_parameters": nested_rope(partial_rotary_factor=1.5)}, ["partial_rotary_factor"]),
        ({"rope_parameters": nested_rope(rope_type="default", partial_rotary_factor=0.5)}, [FULL]),
        ({"rope_parameters": nested_rope(rope_type="new")}, ["rope_type", "new"]),
        ({"enable_moe_block": True}, ["num_experts"]),
        ({"enable_moe_block": True, "num_experts": 2, "top_k_experts": 3}, ["top_k_experts"]),
        ({"qk_norm": True}, ["qk_norm"]),
        ({"hidden_activation": "swooosh"}, ["hidden_activation", "swooosh"]),
    ],
)
def test_a_config_that_cannot_be_right_is_an_error_naming_file_and_key(changes, words):
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(gemma4_config(**changes), "some/config.json")
    message = str(caught.value)
    assert "\n" not in message
    for word in ("some/config.json", *words):
        assert word in message
