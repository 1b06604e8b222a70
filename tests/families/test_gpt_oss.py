"""GPT-OSS as it is released: MXFP4 experts in blocks and scales, gate and up in turns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.checkpoint.weights import open_weights
from mlxkv.convert import convert
from mlxkv.errors import ConfigError, UnsupportedModel, WeightsError
from mlxkv.models import reading
from mlxkv.models.gpt_oss import Config, remap
from mlxkv.nn.attention import attend
from mlxkv.nn.moe import QuantizedExpertLinear
from tests.support import tiny

CONFIG = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "initial_context_length": 64,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": None,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
RELEASED = {
    **CONFIG,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        "quant_method": "mxfp4",
    },
}
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# Packed and dense products sum in another order, nothing else differs.
TOLERANCE = 1e-3


def weights_of(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint in the released layout: what is not an expert's weight is float32."""
    E, I, H = config["num_local_experts"], config["intermediate_size"], config["hidden_size"]
    shapes = tiny.tensor_shapes({**config, "model_type": "llama", "attention_bias": True})
    random = np.random.RandomState(seed)
    found = tiny.random_weights({k: v for k, v in shapes.items() if ".mlp." not in k}, seed)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        rest = {
            "self_attn.sinks": (config["num_attention_heads"],),
            "mlp.router.weight": (E, H),
            "mlp.router.bias": (E,),
            "mlp.experts.gate_up_proj_bias": (E, 2 * I),
            "mlp.experts.down_proj_bias": (E, H),
        }
        found |= tiny.random_weights({layer + k: v for k, v in rest.items()}, seed)
        for part, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
            name, groups = f"{layer}mlp.experts.{part}", columns // 32
            found[f"{name}_blocks"] = random.randint(0, 256, (E, rows, groups, 16), np.uint8)
            found[f"{name}_scales"] = random.randint(121, 126, (E, rows, groups), np.uint8)
    return found


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 as its specification says: the lower nibble first, times a power of two."""
    values = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1)
    values = values.reshape(*blocks.shape[:-1], 32)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*blocks.shape[:-2], -1)


def dense(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same in the layout of unpacked checkpoints: [experts, in, out]."""
    found = {k: v for k, v in weights.items() if not k.endswith(("_blocks", "_scales"))}
    for name, blocks in weights.items():
        if name.endswith("_blocks"):
            module = name.removesuffix("_blocks")
            values = unpacked(blocks, weights[f"{module}_scales"])
            found[module] = np.ascontiguousarray(values.swapaxes(-1, -2))
    return found


def logits(folder: Path) -> np.ndarray:
    return np.array(mlxkv.load_model(folder, dtype=mx.float32)(mx.array([tiny.tokens(40)])))[0]


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() / want.std() < TOLERANCE


def remapped(folder: Path, config: Mapping[str, Any] = CONFIG) -> dict[str, mx.array]:
    return remap(open_weights(folder).arrays(), Config.from_dict(config))[0]


@pytest.fixture
def released(tmp_path) -> Path:
    return tiny.write_checkpoint(tmp_path / "released", RELEASED, weights_of(CONFIG))


def every_block() -> tuple[np.ndarray, np.ndarray]:
    """Every byte under every scale that names a float32 and a bfloat16: [1, 252, 16, 16]."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 252, 16, 16))
    scales = np.broadcast_to(np.arange(1, 253, dtype=np.uint8).reshape(1, 252, 1), (1, 252, 16))
    return np.ascontiguousarray(blocks), np.ascontiguousarray(scales)


def in_mlx(blocks: np.ndarray, scales: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """What the model computes with, through the names of the released layout."""
    name = "model.layers.0.mlp.experts.down_proj"
    arrays = {f"{name}_blocks": mx.array(blocks), f"{name}_scales": mx.array(scales)}
    kept, _ = remap(arrays, Config.from_dict(CONFIG))
    weight, packed_scales = kept[f"{name}.weight"], kept[f"{name}.scales"]
    return mx.dequantize(weight, packed_scales, group_size=32, bits=4, mode="mxfp4", dtype=dtype)


def test_every_byte_and_scale_means_what_the_specification_says():
    blocks, scales = every_block()
    got = np.array(in_mlx(blocks, scales, mx.float32))
    np.testing.assert_array_equal(got, unpacked(blocks, scales))


def test_the_bits_are_those_that_transformers_unpacks():
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = every_block()
    # It gives [experts, in, out].
    want = reference.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    want = want.transpose(-1, -2).contiguous().view(torch.int16).numpy()
    got = np.array(in_mlx(blocks, scales, mx.bfloat16).view(mx.int16))
    np.testing.assert_array_equal(got, want)


def test_gate_and_up_rows_take_turns_in_the_blocks_the_scales_and_the_biases(released):
    stored, kept = weights_of(CONFIG), remapped(released)
    experts = "model.layers.1.mlp.experts."
    whole = unpacked(
        stored[f"{experts}gate_up_proj_blocks"], stored[f"{experts}gate_up_proj_scales"]
    )
    for first, part in enumerate(("gate_proj", "up_proj")):
        name = f"{experts}{part}"
        weight, scales = kept[f"{name}.weight"], kept[f"{name}.scales"]
        got = mx.dequantize(weight, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
        np.testing.assert_array_equal(np.array(got), whole[:, first::2])
        bias = stored[f"{experts}gate_up_proj_bias"][:, first::2]
        np.testing.assert_array_equal(np.array(kept[f"{name}.bias"]), bias)


def test_released_layout_computes_what_its_unpacked_values_do(tmp_path, released):
    plain = tiny.write_checkpoint(tmp_path / "dense", CONFIG, dense(weights_of(CONFIG)))
    assert_same(logits(released), logits(plain))
    backbone: Any = mlxkv.load_model(released).model
    experts = backbone.layers[0].mlp.experts
    assert isinstance(experts["gate_up_proj"], QuantizedExpertLinear)
    assert isinstance(experts["down_proj"], QuantizedExpertLinear)


def test_mlx_communitys_layout_is_the_same_model(tmp_path, released):
    kept = remapped(released)
    quantization = {"group_size": 64, "bits": 8, "mode": "affine"}
    router = "model.layers.0.mlp.router"
    experts = {n.removesuffix(".scales") for n in kept if n.endswith(".scales")}
    packed = {name: {"group_size": 32, "bits": 4, "mode": "mxfp4"} for name in experts}
    values = mx.array(weights_of(CONFIG)[f"{router}.weight"])
    weight, scales, biases = mx.quantize(values, 32, 8)
    packed[router] = {"group_size": 32, "bits": 8}
    kept |= {f"{router}.weight": weight, f"{router}.scales": scales, f"{router}.biases": biases}
    config = {**CONFIG, "quantization": {**quantization, **packed}}
    folder = tiny.write_checkpoint(tmp_path / "community", config, kept)
    stored = weights_of(CONFIG)
    stored[f"{router}.weight"] = np.array(mx.dequantize(weight, scales, biases, 32, 8))
    same = tiny.write_checkpoint(tmp_path / "released8", RELEASED, stored)
    assert_same(logits(folder), logits(same))


def test_packed_experts_are_never_unpacked_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_BYTES", 1)  # layer after layer
    config = {**RELEASED, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
              "layer_types": None, "num_local_experts": 8}  # fmt: skip
    stored = weights_of(config)
    n_bytes = sum(array.nbytes for array in stored.values())
    one_layer = sum(a.nbytes for name, a in stored.items() if ".layers.0.mlp.experts." in name)
    folder = tiny.write_checkpoint(tmp_path / "large", config, stored)
    del stored
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = mlxkv.load_model(folder, dtype=mx.float32)
    # A layer's gate and up lie in memory twice while they are sorted; unpacked experts are 7.5
    # times as large.
    assert mx.get_peak_memory() - before < 1.05 * n_bytes + one_layer
    assert mx.get_active_memory() - before < 1.05 * n_bytes
    del model


def test_convert_without_quantize_keeps_the_released_bits(tmp_path, released):
    out = tmp_path / "out"
    convert(released, out)
    want, got = remapped(released), open_weights(out).arrays()
    assert set(want) == set(got)
    for name, array in want.items():
        assert got[name].dtype == array.dtype and mx.array_equal(got[name], array), name
    written = json.loads((out / "config.json").read_text())
    assert written["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    np.testing.assert_array_equal(logits(out), logits(released))


@pytest.mark.parametrize("mode", ["affine8", "mxfp4", "mxfp8"])
def test_convert_packs_the_rest_as_asked_and_computes_the_same(tmp_path, released, mode):
    out = tmp_path / "out"
    plan = convert(released, out, quantize=mode, group_size=32).plan
    kinds = {t.name: t.quantization for t in plan.tensors}
    assert kinds["model.layers.0.mlp.router.weight"] is None
    assert kinds["model.layers.0.self_attn.sinks"] is None
    assert kinds["model.layers.0.mlp.experts.gate_proj.bias"] is None
    assert kinds["model.layers.0.mlp.experts.gate_proj.weight"] is not None
    stored = dict(open_weights(out).arrays())
    quantization = kinds["lm_head.weight"]
    assert quantization is not None
    for name in [n for n in stored if n.endswith(".scales")]:
        module = name.removesuffix(".scales")
        stored[f"{module}.weight"] = mx.dequantize(
            stored[f"{module}.weight"],
            stored.pop(name),
            stored.pop(f"{module}.biases", None),
            group_size=quantization.group_size,
            bits=quantization.bits,
            mode=quantization.mode,
            dtype=mx.float32,
        )
    plain = tiny.write_checkpoint(tmp_path / "plain", CONFIG, stored)
    assert_same(logits(out), logits(plain))


def test_mlx_lm_loads_what_is_converted_and_agrees(tmp_path):
    from mlx_lm.utils import load_model

    # Its YaRN always rounds the correction range, so this is without.
    config = {**RELEASED, "rope_scaling": {"rope_type": "default"}}
    released = tiny.write_checkpoint(tmp_path / "released", config, weights_of(config))
    convert(released, tmp_path / "out")
    model, _ = load_model(tmp_path / "out")
    theirs = np.array(model(mx.array([tiny.tokens(40)])))[0]
    assert_same(logits(tmp_path / "out"), theirs)


def test_bfloat16_is_close_to_float32(tmp_path):
    plain = tiny.write_checkpoint(tmp_path / "dense", CONFIG, dense(weights_of(CONFIG)))
    tokens = mx.array([tiny.tokens(40)])
    got = mlxkv.load_model(plain, dtype=mx.bfloat16)(tokens)
    assert got.dtype == mx.bfloat16
    want = logits(plain)
    # 8 bits of mantissa through two layers; another expert's choice would be off by 1.
    assert np.abs(np.array(got.astype(mx.float32))[0] - want).mean() / want.std() < 0.05


def test_mxfp4_of_another_family_is_refused_with_its_name(tmp_path):
    config = tiny.llama_config(quantization_config={"quant_method": "mxfp4"})
    folder = tiny.write_checkpoint(tmp_path / "other", config)
    with pytest.raises(UnsupportedModel, match=r"quant_method 'mxfp4' is not supported"):
        mlxkv.load_model(folder)


def test_blocks_of_another_layout_are_one_line_naming_the_tensor(tmp_path):
    stored = weights_of(CONFIG)
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    stored[name] = stored[name].reshape(*stored[name].shape[:2], -1)
    folder = tiny.write_checkpoint(tmp_path / "flat", RELEASED, stored)
    with pytest.raises(WeightsError, match=rf"{name} is mlx.core.uint8 \[4, 96, 32\]"):
        mlxkv.load_model(folder)


def test_a_missing_scale_is_named(tmp_path):
    stored = weights_of(CONFIG)
    del stored["model.layers.1.mlp.experts.down_proj_scales"]
    folder = tiny.write_checkpoint(tmp_path / "missing", RELEASED, stored)
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        mlxkv.load_model(folder)


def test_config_defaults_are_the_references():
    bare = {k: v for k, v in CONFIG.items() if k not in (
        "rope_theta", "rope_scaling", "sliding_window", "layer_types", "head_dim", "swiglu_limit",
        "num_experts_per_tok")}  # fmt: skip
    config = Config.from_dict(bare)
    assert config.windows == (128, None) and config.head_dim == 64
    assert (config.swiglu_alpha, config.swiglu_limit) == (1.702, 7.0)
    assert config.num_experts_per_tok == 2
    assert (config.rope.rope_type, config.rope.factor, config.rope.theta) == (
        "yarn",
        32.0,
        150000.0,
    )
    assert not config.rope.truncate and config.rope.original_max_position_embeddings == 4096


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"sliding_window": None}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_local_experts": None}, "num_local_experts"),
        ({"swiglu_limit": 0}, "swiglu_limit"),
    ],
)
def test_a_config_that_is_wrong_names_its_key(change, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({**CONFIG, **change})


@pytest.mark.parametrize("L", [1, 5])
@pytest.mark.parametrize("n_heads, n_kv_heads", [(8, 2), (4, 4), (6, 1)])
def test_a_sink_takes_its_share_of_every_softmax(n_heads, n_kv_heads, L):
    mx.random.seed(3)
    S, D = 37, 16
    q = mx.random.normal((2, n_heads, L, D))
    k, v = (mx.random.normal((2, n_kv_heads, S, D)) for _ in range(2))
    sinks = 2 * mx.random.normal((n_heads,))
    got = np.array(attend(q, k, v, 0.3, None if L == 1 else "causal", sinks=sinks))
    keys, values = (np.repeat(np.array(x), n_heads // n_kv_heads, axis=1) for x in (k, v))
    scores = 0.3 * np.einsum("bhld,bhsd->bhls", np.array(q), keys)
    visible = np.arange(S) <= np.arange(S - L, S)[:, None]
    weights = np.exp(scores) * visible
    total = weights.sum(-1, keepdims=True) + np.exp(np.array(sinks)).reshape(1, -1, 1, 1)
    want = np.einsum("bhls,bhsd->bhld", weights / total, values)
    # float32 rounding of sums of 37.
    np.testing.assert_allclose(got, want, atol=1e-5)
