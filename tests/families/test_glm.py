"""What is GLM's own: the latent that its caches hold, its router, and the layouts it is stored in.

Parity with the reference is in test_parity.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxkv
from mlxkv.base import device
from mlxkv.checkpoint.expert_stacks import expert_stacks
from mlxkv.convert import convert
from mlxkv.convert.hub.source import open_hub_source
from mlxkv.convert.hub.tensors import DenseTensor, StackedPart
from mlxkv.errors import ConfigError, WeightsError
from mlxkv.kv.types import KVFormat
from mlxkv.memory.needs import kv_bytes
from mlxkv.models import family_for
from mlxkv.nn import latent_attention, sigmoid_moe
from tests.support import tiny
from tests.support.loading import assert_rounded

EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    # The norms inside the projections have this one whatever is said; mlx-lm gives them what is.
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "torch_dtype": "float32",
}
MOE = {
    **SIZES,
    **EXPERTS,
    "model_type": "glm4_moe",
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
LITE = {
    **SIZES,
    **EXPERTS,
    "model_type": "glm4_moe_lite",
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
LATENT = 64 + 16
TOLERANCE = 1e-3
"""Of a logit, in standard deviations: float32 sums in another order show under 1e-5."""


def definition(config: dict[str, Any]) -> tuple[Any, Any]:
    family = family_for(config, "config.json")
    return family, family.config(config, "config.json")


def our_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors under the model's own names."""
    family, parsed = definition(config)
    parameters = dict(tree_flatten(family.build(parsed).parameters()))
    return tiny.random_weights({name: a.shape for name, a in parameters.items()}, seed)


def hub_weights(config: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors as Hugging Face stores them: experts one by one, `kv_b_proj` whole."""
    found: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        if ".switch_mlp." in name:
            for i, expert in enumerate(array):
                found[name.replace("switch_mlp", f"experts.{i}")] = expert
        elif name.endswith("embed_q.weight"):
            values = weights[name.replace("embed_q", "unembed_out")]
            heads = np.concatenate([array.swapaxes(1, 2), values], axis=1)
            found[name.replace("embed_q", "kv_b_proj")] = heads.reshape(-1, heads.shape[-1])
        elif not name.endswith("unembed_out.weight"):
            found[name] = array
    return found


def logits(folder: Path, dtype: mx.Dtype = mx.float32) -> np.ndarray:
    return np.array(mlxkv.load_model(folder, dtype=dtype)(mx.array([tiny.tokens(40)])))[0]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / b.std())


@pytest.fixture(scope="module")
def lite(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("lite")
    return mlxkv.load_model(tiny.write_checkpoint(folder, LITE, our_weights(LITE)), mx.float32)


# The latent


def test_a_token_leaves_one_latent_in_each_layer_and_no_values(lite):
    caches = mlxkv.make_caches(lite)
    for n, L in ((1, 1), (300, 299), (301, 1), (600, 299)):
        mx.eval(lite(mx.array([tiny.tokens(L)]), caches))
        for cache, spec in zip(caches, lite.cache_specs(), strict=True):
            assert [a.shape for a in cache.state] == [(1, 1, n, LATENT), (1, 1, n, 0)]
            assert cache.nbytes == spec.nbytes(n, KVFormat("native", 4))
            assert cache.nbytes == -(-n // 256) * 256 * LATENT * 4


def test_the_planner_prices_the_latent_once(lite):
    assert kv_bytes(lite.cache_specs(), 256, KVFormat("native", 2)) == 2 * 256 * LATENT * 2


def test_latents_read_from_a_cache_and_written_to_another_continue_as_if_uninterrupted(lite):
    prompt = tiny.tokens(300)
    caches = mlxkv.make_caches(lite)
    whole = lite(mx.array([prompt]), caches)[0, -1]
    restored = mlxkv.make_caches(lite)
    for cache, new in zip(caches, restored, strict=True):
        assert cache.rewind(290)
        piece = cache.read(0, 290)
        assert (piece.k.shape, piece.v.shape) == ((1, 1, 290, LATENT), (1, 1, 290, 0))
        new.update(piece.k, piece.v)
    for some in (caches, restored):
        last = lite(mx.array([prompt[290:]]), some)[0, -1]
        assert apart(np.array(last), np.array(whole)) < TOLERANCE


@pytest.mark.parametrize(("L", "S"), [(1, 1), (1, 9), (5, 5), (5, 300), (40, 41)])
@pytest.mark.parametrize("mode", ["dense", "affine", "mxfp8"])
def test_absorbed_and_expanded_attention_are_the_same(lite, L, S, mode):
    attention = lite.model.layers[0].self_attn
    embed_q, unembed_out = attention.embed_q, attention.unembed_out
    if mode != "dense":
        bits, group = (8, 32)
        attention.embed_q = embed_q.to_quantized(group, bits, mode)
        attention.unembed_out = unembed_out.to_quantized(group, bits, mode)
    mx.random.seed(L * S)
    q = mx.random.normal((2, 4, L, 32))
    q_rope, kv = mx.random.normal((2, 4, L, 16)), mx.random.normal((2, 1, S, LATENT))
    mask = "causal" if L > 1 else None
    a, b = (form(q, q_rope, kv, mask) for form in (attention._absorbed, attention._expanded))
    attention.embed_q, attention.unembed_out = embed_q, unembed_out
    assert a.shape == b.shape == (2, 4, L, 32)
    np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("L", [1, 40])
def test_heads_with_scales_in_float32_keep_them_and_the_dtype_of_their_rows(lite, dtype, L):
    packed = lite.model.layers[0].self_attn.unembed_out.to_quantized(32, 8, "affine")
    H, D, _ = packed.weight.shape
    weight = mx.dequantize(packed.weight, packed.scales, packed.biases, 32, 8)
    for product, columns, exact in (
        (packed, weight.shape[-1], lambda x: x @ weight.swapaxes(-1, -2)),
        (packed.back, D, lambda x: x @ weight),
    ):
        x = mx.random.normal((2, H, L, columns), key=mx.random.key(L)).astype(dtype)
        got, want = product(x), exact(x.astype(mx.float32))
        assert got.dtype == dtype
        assert_rounded(got, want)


def test_single_tokens_are_absorbed_and_a_first_chunk_is_expanded():
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64}
    config = definition({**LITE, **sizes, "v_head_dim": 256})[1]
    cheaper = latent_attention.expanding_is_cheaper
    assert cheaper(config, 256, 256)
    assert not cheaper(config, 1, 2)
    assert not cheaper(config, 1, 100_000)
    assert not cheaper(config, 256, 100_000)
    assert cheaper(config, 512, 100_000)


def test_the_norms_inside_the_projections_have_their_own_eps():
    family, parsed = definition({**LITE, "rms_norm_eps": 0.01})
    layer = family.build(parsed).model.layers[0]
    assert layer.self_attn.q_a_layernorm.eps == layer.self_attn.kv_a_layernorm.eps == 1e-6
    assert layer.input_layernorm.eps == 0.01


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("L", [3, 80])
def test_packed_matrices_of_heads_give_what_dense_ones_do(monkeypatch, on_cpu, L):
    packed = latent_attention.HeadLinear(32, 64, 2)
    packed.weight = mx.random.normal(packed.weight.shape, key=mx.random.key(0))
    packed = packed.to_quantized(32, 4)
    dense = mx.dequantize(packed.weight, packed.scales, packed.biases, 32, 4)
    products, product = [], mx.quantized_matmul

    def counted(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        products.append(x)
        return product(x, *args, **kwargs)

    monkeypatch.setattr(mx, "quantized_matmul", counted)
    monkeypatch.setattr(device, "on_cpu", lambda: on_cpu)
    latents = mx.random.normal((1, 1, L, 64), key=mx.random.key(1))
    # The same values summed in another order.
    assert mx.allclose(packed.back(latents), latents @ dense, atol=1e-4)
    queries = mx.random.normal((1, 2, 1, 32), key=mx.random.key(2))
    assert mx.allclose(packed(queries), queries @ dense.swapaxes(-1, -2), atol=1e-4)
    # On a GPU many latents meet an unpacked matrix; queries, one a head, never do.
    assert on_cpu or len(products) == (1 if L == 80 else 2)


# The router


def router(bias: list[float], logit: list[float], **options: Any) -> dict[int, float]:
    """Expert -> weight for one token whose logits are these."""
    config = definition({**MOE, "n_routed_experts": len(logit), **options})[1].moe
    block = sigmoid_moe.Router(len(logit), config)
    block.weight, block.e_score_correction_bias = mx.eye(len(logit)), mx.array(bias)
    experts, weights = block(mx.array([[logit]]))
    pairs = zip(np.array(experts)[0, 0], np.array(weights)[0, 0], strict=True)
    return {int(expert): float(weight) for expert, weight in sorted(pairs)}


def sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def test_the_correction_bias_chooses_and_does_not_weigh():
    found = router([0, 0, 5, 0], [3.0, 2.0, -1.0, 1.0], routed_scaling_factor=2.0)
    total = sigmoid(3.0) + sigmoid(-1.0)
    assert found == pytest.approx({0: 2 * sigmoid(3.0) / total, 2: 2 * sigmoid(-1.0) / total})


def test_weights_are_left_as_they_are_where_the_config_says_so():
    found = router([0] * 4, [3.0, 2.0, -1.0, 1.0], norm_topk_prob=False, routed_scaling_factor=0.5)
    assert found == pytest.approx({0: 0.5 * sigmoid(3.0), 1: 0.5 * sigmoid(2.0)})


def test_experts_come_from_the_best_groups_also_where_every_score_is_negative():
    # Scores below 0: the experts of a group that lost must not win by being set to 0.
    bias, logit = [-9.0] * 6, [5.0, -5.0, 1.0, 1.0, 0.0, 0.0]
    # Two best of each group add up to 1.00, 1.46, 1.00 (less 18).
    found = router(bias, logit, n_group=3, topk_group=1)
    assert list(found) == [2, 3]


def test_the_router_computes_in_float32_and_keeps_the_correction_bias(tmp_path):
    weights = our_weights(MOE)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    weights[name] = (8 + np.arange(4) / 1024).astype(np.float32)
    folder = tiny.write_checkpoint(tmp_path / "hf", MOE, weights)
    model: Any = mlxkv.load_model(folder, dtype=mx.bfloat16)
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.dtype == mx.float32
    assert np.array_equal(np.array(gate.e_score_correction_bias), weights[name])
    convert(folder, tmp_path / "out", dtype="bfloat16")
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(stored, dict)
    assert np.array_equal(np.array(stored[name]), weights[name])
    assert stored["model.layers.1.mlp.gate.weight"].dtype == mx.bfloat16


# Layouts


@pytest.mark.parametrize("config", [MOE, LITE], ids=lambda c: c["model_type"])
def test_hugging_faces_layout_loads_and_converts_to_ours(tmp_path, config):
    ours = our_weights(config)
    expected = logits(tiny.write_checkpoint(tmp_path / "ours", config, ours))
    hub = tiny.write_checkpoint(tmp_path / "hf", config, hub_weights(config, ours), shards=3)
    np.testing.assert_array_equal(logits(hub), expected)
    convert(hub, tmp_path / "out")
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(stored, dict)
    assert set(stored) == set(ours)
    for name, array in ours.items():
        np.testing.assert_array_equal(np.array(stored[name]), array, err_msg=name)
    np.testing.assert_array_equal(logits(tmp_path / "out"), expected)


@pytest.mark.parametrize("config", [MOE, LITE], ids=lambda c: c["model_type"])
@pytest.mark.filterwarnings("ignore")
def test_mlx_lm_loads_what_is_converted(tmp_path, config):
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    hub = {**config, "mlp_layer_types": ["dense", "sparse"]} if config is LITE else config
    source = tiny.write_checkpoint(tmp_path / "hf", hub, hub_weights(config, our_weights(config)))
    convert(source, tmp_path / "out", quantize="affine8", group_size=32)
    theirs = mlx_lm.load_model(tmp_path / "out")[0](mx.array([tiny.tokens(40)]))
    assert apart(np.array(theirs)[0], logits(tmp_path / "out")) < TOLERANCE


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_a_packed_kv_b_proj_is_taken_apart_without_another_rounding(tmp_path, mode):
    group, bits = {"affine": (32, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    ours = our_weights(LITE)
    weights: dict[str, Any] = hub_weights(LITE, ours)
    unpacked = dict(weights)
    for name in [name for name in weights if name.endswith("kv_b_proj.weight")]:
        parts = mx.quantize(mx.array(weights[name]), group, bits, mode=mode)
        for kind, array in zip(("weight", "scales", "biases"), parts, strict=False):
            weights[name.replace("weight", kind)] = array
        unpacked[name] = mx.dequantize(
            *parts, group_size=group, bits=bits, mode=mode, dtype=mx.float32
        )
    entry = {"group_size": group, "bits": bits, "mode": mode}
    packed = tiny.write_checkpoint(tmp_path / "p", {**LITE, "quantization": entry}, weights)
    expected = logits(tiny.write_checkpoint(tmp_path / "u", LITE, unpacked))
    assert apart(logits(packed), expected) < TOLERANCE
    convert(packed, tmp_path / "out", quantize="none", dtype="float32")
    assert apart(logits(tmp_path / "out"), expected) < TOLERANCE


def test_the_layer_that_predicts_the_token_after_next_is_left_out_by_name():
    extra = {
        "model.layers.2.eh_proj.weight": mx.zeros((1,)),
        # One expert of many: it must not be stacked with others, nor missed.
        "model.layers.2.mlp.experts.3.up_proj.weight": mx.zeros((1,)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros((1,)),
    }
    for config in (MOE, LITE):
        family, parsed = definition(config)
        weights = hub_weights(config, our_weights(config))
        arrays = {name: mx.array(array) for name, array in weights.items()}
        kept, skipped = family.remap({**arrays, **extra}, parsed)
        assert sorted(skipped) == sorted(extra)
        assert set(kept) == set(our_weights(config))


def test_the_layer_that_is_left_out_is_named_by_the_converter(tmp_path):
    weights = hub_weights(MOE, our_weights(MOE))
    weights["model.layers.2.mlp.experts.1.up_proj.weight"] = np.zeros((32, 32), np.float32)
    source = tiny.write_checkpoint(tmp_path / "hf", MOE, weights)
    plan = convert(source, tmp_path / "out", dry_run=True).plan
    expert = "model.layers.2.mlp.experts.1.up_proj.weight"
    assert plan.skipped == ((expert, "predicts the token after next"),)


def test_experts_are_stacked_in_the_order_of_their_numbers():
    names = [f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in (10, 2, 0, 1, *range(3, 10))]
    assert expert_stacks([*names, "model.layers.1.mlp.gate.weight"]) == {
        "model.layers.1.mlp.switch_mlp.up_proj.weight": tuple(
            f"model.layers.1.mlp.experts.{i}.up_proj.weight" for i in range(11)
        )
    }


def test_a_missing_expert_is_one_line_that_names_it(tmp_path):
    weights = hub_weights(MOE, our_weights(MOE))
    del weights["model.layers.1.mlp.experts.2.down_proj.weight"]
    folder = tiny.write_checkpoint(tmp_path / "hf", MOE, weights)
    with pytest.raises(WeightsError, match=r"down_proj\.weight: expert 2 of 4 is missing"):
        mlxkv.load_model(folder)
    with pytest.raises(WeightsError, match=r"down_proj\.weight: expert 2 of 4 is missing"):
        convert(folder, tmp_path / "out")


def test_an_expert_of_another_shape_is_one_line_that_names_it(tmp_path):
    weights = hub_weights(MOE, our_weights(MOE))
    weights["model.layers.1.mlp.experts.2.down_proj.weight"] = np.zeros((8, 32), np.float32)
    folder = tiny.write_checkpoint(tmp_path / "hf", MOE, weights)
    with pytest.raises(WeightsError, match=r"experts\.2\.down_proj\.weight is .*\[8, 32\]"):
        mlxkv.load_model(folder)


def test_a_kv_b_proj_of_another_shape_is_one_line_that_names_it(tmp_path):
    weights = hub_weights(LITE, our_weights(LITE))
    weights["model.layers.0.self_attn.kv_b_proj.weight"] = np.zeros((8, 64), np.float32)
    with pytest.raises(
        WeightsError, match=r"kv_b_proj\.weight is \[8, 64\]; it must have 256 rows"
    ):
        mlxkv.load_model(tiny.write_checkpoint(tmp_path, LITE, weights))


class CountedPart:
    """Rows of an array, counting how many are asked for."""

    dtype, row_step = "float32", 1

    def __init__(self, array: np.ndarray):
        self.array, self.n_read = array, 0
        self.shape = array.shape

    def rows(self, start: int, stop: int) -> mx.array:
        self.n_read += stop - start
        return mx.array(self.array[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(0, 15), (0, 5), (4, 6), (5, 10), (7, 8), (3, 14)])
def test_rows_of_stacked_experts_are_read_from_the_experts_they_lie_in(start, stop):
    arrays = np.random.RandomState(0).standard_normal((3, 5, 4)).astype(np.float32)
    parts = tuple(CountedPart(array) for array in arrays)
    tensor = DenseTensor("x", "y", StackedPart(parts))
    assert tensor.shape == (3, 5, 4)
    rows = np.array(tensor.rows(start, stop))
    np.testing.assert_array_equal(rows, arrays.reshape(15, 4)[start:stop])
    assert sum(part.n_read for part in parts) == stop - start


def test_the_converter_reads_stacked_experts_row_by_row(tmp_path):
    source = tiny.write_checkpoint(tmp_path, MOE, hub_weights(MOE, our_weights(MOE)), shards=2)
    tensors = open_hub_source(source).tensors
    stacked = [tensor for name, tensor in tensors.items() if "switch_mlp" in name]
    assert len(stacked) == 3
    assert all(tensor.row_step == 1 for tensor in stacked)


# Configs


def test_a_glm_without_the_keys_has_the_familys_defaults():
    config = {**SIZES, "model_type": "glm4", "num_key_value_heads": 2}
    del config["rope_theta"]
    parsed = definition(config)[1]
    assert parsed.attention_bias
    assert parsed.rope_traditional
    assert (parsed.head_dim, parsed.rope.dims, parsed.rope.theta) == (128, 64, 10000.0)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (MOE, {"scoring_func": "softmax"}, "scoring_func"),
        (MOE, {"topk_method": "greedy"}, "topk_method"),
        (MOE, {"n_group": 3}, "n_group"),
        (MOE, {"n_group": 2, "topk_group": 3}, "topk_group"),
        (MOE, {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        (MOE, {"routed_scaling_factor": None}, "routed_scaling_factor"),
        (MOE, {"rope_theta": None}, "rope_theta"),
        (MOE, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LITE, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (LITE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LITE, {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        (LITE, {"kv_lora_rank": 0}, "kv_lora_rank"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) and len(x) < 3 else "",
)
def test_a_config_that_is_not_understood_names_its_key(config, changes, words):
    with pytest.raises(ConfigError, match=rf"config\.json.*{words}"):
        definition({**config, **changes})


def test_the_first_layers_are_dense_and_the_number_may_be_0():
    for n, types in ((0, ["sparse", "sparse"]), (1, ["dense", "sparse"]), (2, ["dense", "dense"])):
        by_number = definition({**LITE, "first_k_dense_replace": n})[1]
        by_type = definition({**LITE, "first_k_dense_replace": None, "mlp_layer_types": types})[1]
        assert by_number.dense_layers == by_type.dense_layers == tuple(t == "dense" for t in types)


def test_the_converted_config_says_which_layers_are_dense_as_mlx_lm_reads_it(tmp_path):
    config = {**LITE, "mlp_layer_types": ["dense", "dense"], "num_hidden_layers": 2}
    source = tiny.write_checkpoint(tmp_path / "hf", config, our_weights(config))
    convert(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["first_k_dense_replace"] == 2
