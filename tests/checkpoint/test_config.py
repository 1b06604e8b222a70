"""Configs are read once, in both styles, and what is not understood is refused by name."""

from __future__ import annotations

import json

import pytest

from mlxkv.checkpoint.config import Fields, read_config, text_config
from mlxkv.errors import ConfigError, MlxkvError, ModelNotFound, UnsupportedModel
from mlxkv.models import family_for
from tests.support.tiny import gemma3_config, llama_config, mistral_config

SOURCE = "model/config.json"
MAKERS = {"llama": llama_config, "mistral": mistral_config, "gemma3": gemma3_config}
every_family = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def read(raw: dict):
    return family_for(raw, SOURCE).config(raw, SOURCE)


def without(raw: dict, *keys: str) -> dict:
    return {key: value for key, value in raw.items() if key not in keys}


def refused(raw: dict, *words: str, error: type[MlxkvError] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        read(raw)
    message = str(caught.value)
    assert message.startswith(SOURCE)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# Missing keys and wrong values

REQUIRED = ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers"]
REQUIRED_OF_LLAMA = [
    *REQUIRED, "vocab_size", "num_attention_heads", "rms_norm_eps", "max_position_embeddings",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED_OF_LLAMA)
@pytest.mark.parametrize("make", [llama_config, mistral_config])
def test_a_missing_key_of_a_llama_is_an_error_naming_file_and_key(make, key):
    refused(without(make(), key), key)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_of_a_gemma3_is_an_error_naming_file_and_key(key):
    refused(without(gemma3_config(), key), key)


@pytest.mark.parametrize("key", REQUIRED)
@every_family
def test_a_null_is_a_missing_key(make, key):
    refused(make(**{key: None}), key)


NUMBERS = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
]  # fmt: skip


@pytest.mark.parametrize("value", ["64", -1, 0, 1.5, True, [], {}, float("nan")])
@pytest.mark.parametrize("key", NUMBERS)
@every_family
def test_a_size_that_cannot_be_right_is_an_error_naming_file_and_key(make, key, value):
    refused(make(**{key: value}), key)


@pytest.mark.parametrize("key", [key for key in NUMBERS if key != "max_position_embeddings"])
@every_family
def test_a_size_beyond_reason_is_an_error_before_anything_of_that_size_is_made(make, key):
    # MLX's sizes are 32 bits wide; a million layers would fill the memory with their modules.
    refused(make(**{key: 10**6 if key == "num_hidden_layers" else 2**40}), key)


@pytest.mark.parametrize("value", ["1e-5", -1.0, 0, True, [], float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@every_family
def test_a_number_that_cannot_be_right_is_an_error_naming_file_and_key(make, key, value):
    refused(make(**{key: value}), key)


@pytest.mark.parametrize("value", ["yes", 1, []])
@every_family
def test_a_flag_is_true_or_false(make, value):
    refused(make(tie_word_embeddings=value), "tie_word_embeddings")


def test_a_whole_number_written_as_a_float_is_that_number():
    assert read(llama_config(hidden_size=64.0)).hidden_size == 64


def test_heads_must_divide():
    refused(llama_config(num_key_value_heads=3), "num_key_value_heads", "3", "4")
    refused(llama_config(num_attention_heads=6, num_key_value_heads=2), "num_attention_heads")
    refused(gemma3_config(num_key_value_heads=3), "num_key_value_heads")


def test_an_unknown_activation_is_an_error_that_lists_what_is_known():
    refused(llama_config(hidden_act="swoosh"), "hidden_act", "swoosh", "silu")
    refused(gemma3_config(hidden_activation="silu"), "hidden_activation", "gelu_pytorch_tanh")


def test_gelu_in_a_gemma_config_means_the_tanh_form():
    config = read(without(gemma3_config(hidden_act="gelu"), "hidden_activation"))
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert read(llama_config(hidden_act="gelu")).hidden_act == "gelu"


# Architectures


@pytest.mark.parametrize("value", ["mamba99", "../../llama", "os.path", "llama\n", " llama"])
def test_an_unknown_model_type_is_named_and_nothing_is_imported(value):
    message = refused(llama_config(model_type=value), error=UnsupportedModel)
    assert repr(value) in message


@pytest.mark.parametrize("value", [None, 3, "", ["llama"], {}])
def test_a_model_type_that_is_no_text_is_an_error(value):
    refused(llama_config(model_type=value), "model_type")


# Maths that is not understood

FOREIGN_TO_LLAMA = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 224,
    "logit_scale": 0.06,
    "logits_scaling": 8.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078,
    "num_local_experts": 8,
    "no_rope_layers": [1, 1, 0],
    "clip_qkv": 8.0,
    "use_qk_norm": True,
    "rope_local_base_freq": 10000.0,
    "alibi": True,
}


@pytest.mark.parametrize(("key", "value"), FOREIGN_TO_LLAMA.items())
@pytest.mark.parametrize("make", [llama_config, mistral_config])
def test_a_key_that_changes_the_maths_and_is_not_understood_is_refused(make, key, value):
    refused(make(**{key: value}), key)


@pytest.mark.parametrize(("key", "value"), [("num_local_experts", 8), ("logit_scale", 0.5)])
def test_a_gemma3_with_foreign_maths_is_refused(key, value):
    refused(gemma3_config(**{key: value}), key)


def test_foreign_maths_inside_text_config_is_refused_too():
    inner = gemma3_config(logit_scale=0.5)
    refused({"model_type": "gemma3", "text_config": inner}, "logit_scale")


@pytest.mark.parametrize("key", FOREIGN_TO_LLAMA)
def test_a_null_or_false_key_says_nothing(key):
    assert read(llama_config(**{key: None})) == read(llama_config())


def test_keys_that_change_no_maths_are_ignored():
    noise = {"use_cache": True, "transformers_version": "4.40", "pretraining_tp": 2, "x": [1]}
    assert read(llama_config(**noise)) == read(llama_config())


def test_bidirectional_attention_is_refused_but_for_embeddings():
    changes = {"use_bidirectional_attention": True, "sliding_window": 512}
    refused(gemma3_config(model_type="gemma3", **changes), "use_bidirectional_attention")
    for window in (512, 257):  # which transformers before 5 made of 512
        raw = gemma3_config(**changes | {"sliding_window": window})
        config = family_for(raw, "config.json").config(raw, "config.json")
        assert config.windows == (256,) * 5 + (None,)


# Windows


def test_a_llama_does_not_slide_and_every_layer_of_a_mistral_does():
    assert read(llama_config()).windows == (None, None, None)
    assert read(mistral_config(sliding_window=24)).windows == (24, 24, 24)
    assert read(mistral_config(sliding_window=None)).windows == (None, None, None)


def test_a_mistral_that_does_not_name_its_window_has_the_documented_one():
    assert read(without(mistral_config(), "sliding_window")).windows == (4096,) * 3


def test_layer_types_say_which_layers_slide():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = read(mistral_config(model_type="ministral", layer_types=types))
    assert config.windows == (24, None, 24)


def test_gemma3s_sixth_layer_is_full_unless_the_config_says_otherwise():
    assert read(gemma3_config()).windows == (32,) * 5 + (None,)
    config = read(without(gemma3_config(num_hidden_layers=7), "sliding_window_pattern"))
    assert config.windows == (32,) * 5 + (None, 32)
    assert read(gemma3_config(sliding_window_pattern=2)).windows == (32, None) * 3


def test_layer_types_win_over_the_pattern_that_transformers_writes_beside_them():
    types = ["full_attention", "sliding_attention"] * 3
    config = read(gemma3_config(layer_types=types, _sliding_window_pattern=6))
    assert config.windows == (None, 32) * 3


@pytest.mark.parametrize(
    "value",
    [[], ["full_attention"], ["chunked_attention"] * 6, [["a"]] * 6, "full_attention", {"0": "x"}],
)
def test_layer_types_that_do_not_fit_are_an_error(value):
    refused(gemma3_config(layer_types=value), "layer_types")


@pytest.mark.parametrize("value", [0, -5, "32", 1.5])
@pytest.mark.parametrize("make", [mistral_config, gemma3_config])
def test_a_window_must_be_a_positive_whole_number(make, value):
    refused(make(sliding_window=value), "sliding_window")


def test_sliding_layers_without_a_window_are_an_error():
    raw = mistral_config(sliding_window=None, layer_types=["sliding_attention"] * 3)
    refused(raw, "sliding_window")


# Rope of Gemma 3


def test_gemma3s_two_kinds_of_layers_have_their_own_rope():
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = read(gemma3_config(rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=scaling))
    assert (config.rope.theta, config.sliding_rope.theta) == (5e5, 2e4)
    assert (config.rope.rope_type, config.rope.factor) == ("linear", 8.0)
    assert config.sliding_rope.rope_type == "default"


def test_gemma3s_nested_rope_parameters_mean_the_same():
    raw = without(gemma3_config(), "rope_theta", "rope_local_base_freq", "rope_scaling")
    raw["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert read(raw) == read(gemma3_config())


def test_a_nested_text_config_means_the_same_as_a_flat_one():
    inner = without(gemma3_config(), "architectures")
    nested = {"model_type": "gemma3", "text_config": inner, "vision_config": None}
    assert read(nested) == read(gemma3_config())


def test_a_text_config_takes_the_outer_quantization_and_dtype_with_it():
    quantization = {"group_size": 64, "bits": 4}
    raw = {"text_config": {"hidden_size": 8}, "quantization": quantization, "dtype": "bfloat16"}
    got = text_config(raw)
    assert got == {"hidden_size": 8, "quantization": quantization, "dtype": "bfloat16"}


# The file


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": 1} x', b"<html>"],
)
def test_a_config_that_is_no_json_object_is_one_line_naming_the_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_config_is_not_a_model(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelNotFound, match=str(path)):
            read_config(path)


def test_a_config_is_read_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama_config(note="grüße")), "utf-8")
    assert read_config(tmp_path) == llama_config(note="grüße")


# Fields


def test_fields_name_file_and_key_and_say_what_was_given():
    fields = Fields({"n": "three"}, SOURCE)
    with pytest.raises(ConfigError, match=r"^model/config\.json: n must be .*; got 'three'$"):
        fields.int("n")
    with pytest.raises(ConfigError, match=r"^model/config\.json: key 'm' is missing"):
        fields.int("m")


def test_a_default_stands_in_for_absent_and_null_only():
    fields = Fields({"zero": 0, "null": None, "no": False}, SOURCE)
    assert fields.int("absent", 7) == fields.int("null", 7) == 7
    assert fields.opt_float("zero", zero=True) == 0
    assert fields.bool("no", True) is False


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ConfigError) as caught:
        Fields({"names": list(range(10_000))}, SOURCE).strings("names", 2, ("a",))
    assert len(str(caught.value)) < 200
