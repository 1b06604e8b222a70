"""What golden files do not say about Gemma 1, 2 and 3n: checkpoints of other shapes, and mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.checkpoint.config import with_towers
from mlxkv.convert import convert
from mlxkv.errors import ConfigError
from mlxkv.models import family_for, gemma3n
from tests.families.oracle.gemma3n_cases import UNUSED_KV
from tests.families.test_parity import TOLERANCE, Golden, mlx_lm_model
from tests.support.tiny import write_checkpoint

TOWERS = {
    "model.vision_tower.timm_model.conv_stem.conv.weight": (2, 3, 3, 3),
    "model.audio_tower.conformer.0.attention.attn.q_proj.weight": (4, 4),
    "model.embed_vision.embedding.weight": (4, 4),
    "model.embed_audio.soft_embedding_norm.weight": (4,),
}


def multimodal_config(golden: Golden) -> dict[str, Any]:
    """As gemma-3n-E2B-it's config.json nests it; its encoders have other tokens than this model."""
    return {
        "model_type": "gemma3n",
        "architectures": ["Gemma3nForConditionalGeneration"],
        "text_config": golden.config("hub"),
        "vision_config": {"model_type": "gemma3n_vision", "vocab_offset": 262144},
        "audio_config": {"model_type": "gemma3n_audio", "vocab_offset": 262272},
        "torch_dtype": "float32",
        "eos_token_id": [1, 106],
    }


def multimodal_weights(golden: Golden, prefix: str = "model.language_model.") -> dict[str, Any]:
    towers = {name: np.zeros(shape, np.float32) for name, shape in TOWERS.items()}
    text = {prefix + name.removeprefix("model."): array for name, array in golden.weights().items()}
    return {**text, **towers}


def logits(folder: Path, prompt: list[int]) -> np.ndarray:
    return np.array(mlxkv.load_model(folder, dtype=mx.float32)(mx.array([prompt])))[0]


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_a_multimodal_gemma3n_loads_as_its_language_model(tmp_path: Path, prefix: str):
    """Its encoders are left out where the weights lack them, and where config.json does."""
    golden = Golden.read("gemma3n-unused-kv")
    config, weights = multimodal_config(golden), multimodal_weights(golden, prefix)
    of_text = {name: array for name, array in weights.items() if name not in TOWERS}
    expected = logits(golden.write(tmp_path / "text", "new"), golden.prompt)
    for name, part in (
        ("config", (config, of_text)),
        ("weights", (with_towers(config, ()), weights)),
    ):
        folder = write_checkpoint(tmp_path / name, *part)
        np.testing.assert_array_equal(logits(folder, golden.prompt), expected)


def test_towers_and_unused_keys_and_values_are_named_as_skipped():
    golden = Golden.read("gemma3n-unused-kv")
    config = gemma3n.Config.from_dict(with_towers(multimodal_config(golden), ()))
    weights = {name: mx.array(array) for name, array in multimodal_weights(golden).items()}
    kept, skipped = gemma3n.remap(weights, config)
    unused = {name.replace("model.", "model.language_model.", 1) for name in UNUSED_KV}
    assert set(skipped) == unused | set(TOWERS)
    assert len(kept) + len(skipped) == len(weights)


def test_a_multimodal_gemma3n_converts_to_its_language_model(tmp_path: Path):
    golden = Golden.read("gemma3n-unused-kv")
    source = write_checkpoint(
        tmp_path / "hf", multimodal_config(golden), multimodal_weights(golden)
    )
    with pytest.raises(ConfigError, match="audio_config: vocab_offset 262272 and vocab_size 128"):
        convert(source, tmp_path / "all")
    plan = convert(source, tmp_path / "out", text_only=True).plan
    reasons = dict(plan.skipped)
    assert {reasons[name] for name in TOWERS} == {"not part of the language model"}
    assert len(reasons) == len(TOWERS) + len(UNUSED_KV)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "gemma3n_text"
    assert written["architectures"] == ["Gemma3nForCausalLM"]
    assert written["eos_token_id"] == [1, 106]
    np.testing.assert_array_equal(
        logits(tmp_path / "out", golden.prompt),
        logits(golden.write(tmp_path / "text", "new"), golden.prompt),
    )


def test_a_format_for_one_module_under_its_multimodal_name_counts(tmp_path: Path):
    """mlx-lm writes such entries where it packs modules with different numbers of bits."""
    golden = Golden.read("gemma3n-unused-kv")
    weights = {name: mx.array(array) for name, array in multimodal_weights(golden).items()}
    modules = {"model.language_model.layers.0.mlp.down_proj": 8}
    modules["model.language_model.layers.1.mlp.down_proj"] = 4
    unpacked = dict(weights)
    for module, bits in modules.items():
        w, scales, biases = mx.quantize(weights.pop(f"{module}.weight"), 32, bits)
        unpacked[f"{module}.weight"] = mx.dequantize(w, scales, biases, 32, bits)
        weights |= {
            f"{module}.weight": w,
            f"{module}.scales": scales,
            f"{module}.biases": biases,
        }
    config = with_towers(multimodal_config(golden), ())
    first = next(iter(modules))
    packing = {"group_size": 32, "bits": 4, first: {"group_size": 32, "bits": 8}}
    packed = write_checkpoint(tmp_path / "q", {**config, "quantization": packing}, weights)
    plain = write_checkpoint(tmp_path / "plain", config, unpacked)
    difference = logits(packed, golden.prompt) - logits(plain, golden.prompt)
    assert np.abs(difference).max() < TOLERANCE * golden.std


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers of 5 leaves no layer of each kind"),
        ({"num_kv_shared_layers": 7}, "must be a whole number from 0 to 6; got 7"),
        ({"num_kv_shared_layers": True}, "must be a whole number from 0 to 6; got True"),
        ({"altup_active_idx": 4}, "altup_active_idx must be a whole number from 0 to 3; got 4"),
        ({"intermediate_size": [64, 64]}, "intermediate_size must be a number or a list of 6"),
        ({"intermediate_size": [64] * 5 + ["a"]}, "intermediate_size must be a whole number"),
        ({"activation_sparsity_pattern": [0.5]}, "must be a list of 6 numbers"),
        ({"activation_sparsity_pattern": [1.0] * 6}, "holds 1.0; allowed are numbers from 0"),
        ({"activation_sparsity_pattern": 0.5}, "must be a list of 6 numbers"),
        ({"use_bidirectional_attention": True}, "is for embeddings; not supported"),
        ({"attn_logit_softcapping": 5.0}, "attn_logit_softcapping changes the mathematics"),
    ],
)
def test_a_wrong_gemma3n_config_is_one_line_naming_file_and_key(
    changes: dict[str, Any], message: str
):
    raw = {**Golden.read("gemma3n-text").config("hub"), **changes}
    with pytest.raises(ConfigError) as caught:
        family_for(raw, "dir/config.json").config(raw, "dir/config.json")
    text = str(caught.value)
    assert text.startswith("dir/config.json: ")
    assert message in text
    assert "\n" not in text


def test_a_gemma3n_of_more_than_ten_layers_is_sparse_in_ten_unless_it_says_else():
    raw = Golden.read("gemma3n-text").config("hub")
    raw |= {"num_hidden_layers": 11, "intermediate_size": 64, "activation_sparsity_pattern": None}
    del raw["layer_types"]
    config = gemma3n.Config.from_dict(raw)
    assert config.activation_sparsity_pattern == (0.95,) * 10 + (0.0,)
    assert [heads.window for heads in config.heads] == ([24] * 4 + [None]) * 2 + [24]
    assert [heads.donor for heads in config.heads] == [None] * 9 + [4, 8]


@pytest.mark.parametrize("name", ["gemma-plain", "gemma2-text"])
def test_a_gemma_that_looks_ahead_is_refused(name: str):
    raw = {**Golden.read(name).config("hub"), "use_bidirectional_attention": True}
    with pytest.raises(ConfigError, match="use_bidirectional_attention is for embeddings"):
        family_for(raw, "config.json").config(raw, "config.json")


def test_a_gemma2_without_a_cap_differs_from_one_that_leaves_the_key_out():
    raw = Golden.read("gemma2-text").config("hub")
    family = family_for(raw, "config.json")
    null = {**raw, "attn_logit_softcapping": None}
    absent = {key: value for key, value in raw.items() if key != "attn_logit_softcapping"}
    assert family.config(null, "config.json").attn_logit_softcapping is None
    assert family.config(absent, "config.json").attn_logit_softcapping == 50.0


# Whose prompts stay within the window: mlx-lm's Gemma 2 has none.
@pytest.mark.parametrize("name", ["gemma-plain", "gemma-mqa", "gemma2-defaults"])
@pytest.mark.parametrize("style", ["new", "hub"])
@pytest.mark.filterwarnings("ignore")
def test_mlx_lm_computes_the_same_from_the_converted_model(tmp_path: Path, name: str, style: str):
    golden = Golden.read(name)
    config = golden.config(style)
    if name == "gemma2-defaults":
        # Left out it is 256, and 144 in mlx-lm.
        config["query_pre_attn_scalar"] = 256
    convert(write_checkpoint(tmp_path / "hf", config, golden.weights()), tmp_path / "out")
    theirs = mlx_lm_model(tmp_path / "out")
    difference = np.array(theirs(mx.array([golden.prompt])))[0][golden.positions] - golden.logits
    # mlx-lm rounds the embedding's scale to bfloat16.
    assert np.abs(difference).max() < 1e-2 * golden.std


@pytest.mark.filterwarnings("ignore")
def test_mlx_lm_computes_the_same_gemma3n(tmp_path: Path):
    """On the tensors it wants: those that nothing reads as well, under the multimodal names."""
    golden = Golden.read("gemma3n-unused-kv")
    weights = {
        name: array for name, array in multimodal_weights(golden).items() if name not in TOWERS
    }
    theirs: Any = mlx_lm_model(
        write_checkpoint(tmp_path / "hf", multimodal_config(golden), weights)
    )
    # Without caches its shared layers compute keys and values of their own.
    out = np.array(theirs(mx.array([golden.prompt]), theirs.make_cache()))[0]
    assert np.abs(out[golden.positions] - golden.logits).max() < TOLERANCE * golden.std
