"""Quantized checkpoints, packed by mlx itself as mlx-lm's converter does, are the models of their
dequantized weights.

Both compute in float32 from the same values, so they differ by rounding: 1e-4 of the standard
deviation, where a wrong scale or a swapped row shows at 1e-1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxkv.base import device
from mlxkv.cache import make_caches
from mlxkv.errors import UnsupportedModel, WeightsError
from mlxkv.models import family_for
from mlxkv.models.loader import lay_out, load_model
from mlxkv.nn import kernels, linear
from mlxkv.nn.layers import GatedMLP
from tests.support.loading import Arrays, assert_rounded, logits, refused, weights_of
from tests.support.tiny import gemma3_config, llama_config, tokens, write_checkpoint

# Quantized checkpoints

WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 2}


def quantized(
    default: dict[str, Any],
    by_path: dict[str, dict[str, Any] | bool] | None = None,
    config: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Arrays, Arrays]:
    """A config, its weights packed by mlx, and the weights that the packed ones stand for."""
    config = config or llama_config(**WIDE)
    by_path = by_path or {}
    packed: Arrays = {}
    dense: Arrays = {}
    for name, array in weights_of(config).items():
        path = name.removesuffix(".weight")
        entry = by_path.get(path, default)
        if array.ndim != 2 or entry is False:
            packed[name] = dense[name] = array
            continue
        assert isinstance(entry, dict)
        parts = mx.quantize(mx.array(array), **entry)
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):
            packed[f"{path}.{suffix}"] = part
        dense[name] = mx.dequantize(*parts, **entry, dtype=mx.float32)
    quantization = {**default, **by_path}
    return {**config, "quantization": quantization}, packed, dense


AFFINE = [{"group_size": g, "bits": b} for g, b in
          [(64, 2), (64, 3), (64, 4), (64, 5), (64, 6), (64, 8), (32, 4), (128, 4)]]  # fmt: skip
SCALED = [
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]


def check_quantized(
    tmp_path: Path, config: dict[str, Any], packed: Arrays, dense: Arrays, tolerance: float = 1e-4
) -> None:
    plain = {key: value for key, value in config.items() if key != "quantization"}
    model = load_model(write_checkpoint(tmp_path / "packed", config, packed), dtype="float32")
    reference = load_model(write_checkpoint(tmp_path / "dense", plain, dense), dtype="float32")
    prompt = tokens(40)
    expected = logits(reference, prompt)
    # Few rows and many take different products on the CPU backend.
    for got in (logits(model, prompt), chunked(model, prompt, 3), chunked(model, prompt, 1)):
        assert np.abs(got - expected).max() < tolerance * expected.std()


def chunked(model, prompt: list[int], chunk: int) -> np.ndarray:
    caches = make_caches(model)
    parts = [model(mx.array([prompt[i : i + chunk]]), caches) for i in range(0, len(prompt), chunk)]
    return np.array(mx.concatenate(parts, axis=1))


def entry_id(entry: dict[str, Any]) -> str:
    return f"{entry.get('mode', 'affine')}-{entry['bits']}-{entry['group_size']}"


@pytest.mark.parametrize("entry", [*AFFINE, *SCALED], ids=entry_id)
def test_a_quantized_checkpoint_is_the_model_of_its_dequantized_weights(tmp_path, entry):
    check_quantized(tmp_path, *quantized(entry))


@pytest.mark.parametrize("entry", [AFFINE[2], SCALED[0]], ids=entry_id)
def test_a_quantized_tied_embedding_serves_as_the_head(tmp_path, entry):
    check_quantized(
        tmp_path, *quantized(entry, config=llama_config(**WIDE, tie_word_embeddings=True))
    )


def test_a_quantized_gemma3_with_biases_in_its_projections(tmp_path):
    config = gemma3_config(**WIDE, attention_bias=True, sliding_window=7)
    check_quantized(tmp_path, *quantized(AFFINE[2], config=config))


def test_entries_per_layer_and_false_ones_win_over_the_global_entry(tmp_path):
    by_path = {
        "model.embed_tokens": {"group_size": 64, "bits": 8},
        "lm_head": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        "model.layers.0.self_attn.v_proj": {"group_size": 32, "bits": 6},
        "model.layers.1.mlp.down_proj": False,
        "model.layers.1.self_attn.q_proj": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    }
    check_quantized(tmp_path, *quantized({"group_size": 64, "bits": 4}, by_path))


def test_a_weight_that_is_not_packed_stays_as_it_is_without_an_entry(tmp_path):
    config, packed, dense = quantized(AFFINE[2], {"lm_head": False})
    del config["quantization"]["lm_head"]
    check_quantized(tmp_path, config, packed, dense)


def test_quantization_config_is_read_where_quantization_is_absent(tmp_path):
    config, packed, dense = quantized(AFFINE[2])
    config["quantization_config"] = config.pop("quantization")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    got = logits(load_model(write_checkpoint(tmp_path / "packed", config, packed)))
    expected = logits(load_model(write_checkpoint(tmp_path / "dense", plain, dense)))
    assert np.abs(got - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_a_mode_alone_means_its_only_bits_and_group_size(tmp_path, mode):
    entry = next(entry for entry in SCALED if entry["mode"] == mode)
    config, packed, dense = quantized(entry)
    check_quantized(tmp_path, {**config, "quantization": {"mode": mode}}, packed, dense)


def test_scales_in_sixteen_bits_compute_as_float32_on_request(tmp_path):
    config, packed, _ = quantized(AFFINE[2])
    half = {k: v.astype(mx.bfloat16) if k.endswith(("scales", "biases")) else v
            for k, v in packed.items()}  # fmt: skip
    model = load_model(write_checkpoint(tmp_path, config, half, dtype=mx.bfloat16), dtype="float32")
    down_proj = dict(model.named_modules())["model.layers.0.mlp.down_proj"]
    floats = {array.dtype for array in down_proj.parameters().values()}
    assert floats == {mx.uint32, held_dtype(mx.bfloat16, mx.float32)}
    x = mx.random.normal((1, 3, 128), key=mx.random.key(1))
    arrays = {name: mx.array(array) for name, array in half.items()}
    got = down_proj(x) - x @ unpacked(arrays, "model.layers.0.mlp.down_proj").T
    assert got.dtype == mx.float32 and mx.abs(got).max().item() < 1e-5


def held_dtype(scales: mx.Dtype, compute: mx.Dtype) -> mx.Dtype:
    """Of loaded scales: the kernels take 16 bits beside float32, MLX would round to them."""
    if scales == compute or (compute == mx.float32 and kernels.kernels()):
        return scales
    return mx.float32


FLOATS = [mx.float16, mx.bfloat16, mx.float32]
SIXTEEN = FLOATS[:2]


def mixed(
    path: Path, scales: mx.Dtype, values: mx.Dtype, config: dict[str, Any] | None = None
) -> tuple[Path, Arrays]:
    """A checkpoint whose affine scales are of another dtype than its values, and its arrays."""
    config, packed, _ = quantized(AFFINE[2], config=config)
    config["torch_dtype"] = str(values).rpartition(".")[2]
    arrays: Arrays = {}
    for name, array in packed.items():
        array = mx.array(array)
        if mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(scales if name.endswith(("scales", "biases")) else values)
        arrays[name] = array
    write_checkpoint(path, config, packed)
    mx.save_safetensors(str(path / "model.safetensors"), arrays, {"format": "pt"})
    return path, arrays


def unpacked(arrays: Arrays, module: str) -> mx.array:
    """The weight that a module's packed arrays stand for, exactly."""
    scales, biases = (arrays[f"{module}.{kind}"].astype(mx.float32) for kind in KINDS[1:])
    return mx.dequantize(arrays[f"{module}.weight"], scales, biases, **AFFINE[2])


KINDS = ("weight", "scales", "biases")
MODULES = ("model.embed_tokens", "model.layers.1.mlp.down_proj", "lm_head")


@pytest.mark.parametrize("compute", FLOATS, ids=str)
@pytest.mark.parametrize("scales", FLOATS, ids=str)
@pytest.mark.parametrize("module", MODULES)
def test_packed_weights_are_exact_whatever_is_computed_in(tmp_path, module, scales, compute):
    path, arrays = mixed(tmp_path, scales, mx.bfloat16)
    model = load_model(path, dtype=compute)
    held = dict(model.named_modules())[module]
    exact = unpacked(arrays, module)
    got = unpacked({f"{module}.{kind}": held[kind] for kind in KINDS}, module)
    assert mx.array_equal(got, exact).item()
    assert held.scales.dtype == held.biases.dtype
    assert held.scales.dtype == held_dtype(scales, compute)


@pytest.mark.parametrize(
    ("scales", "compute"), [(a, b) for a in FLOATS for b in SIXTEEN if a != b], ids=str
)
@pytest.mark.parametrize("n_rows", [1, 9])
@pytest.mark.parametrize("with_blas", [False, True])
def test_products_with_wider_scales_are_exact_up_to_their_last_rounding(
    tmp_path, monkeypatch, n_rows, scales, compute, with_blas
):
    monkeypatch.setattr(linear, "_dense_is_faster", lambda: with_blas)
    path, arrays = mixed(tmp_path, scales, mx.bfloat16)
    model = load_model(path, dtype=compute)
    module = dict(model.named_modules())[MODULES[1]]
    x = mx.random.normal((1, n_rows, 128), key=mx.random.key(1)).astype(compute)
    exact = x.astype(mx.float32) @ unpacked(arrays, MODULES[1]).T
    got = module(x)
    assert got.dtype == compute
    assert_rounded(got, exact)


@pytest.mark.parametrize("scales", FLOATS, ids=str)
@pytest.mark.parametrize("compute", SIXTEEN, ids=str)
def test_a_model_computes_in_its_dtype_beside_wider_scales(tmp_path, scales, compute):
    model = load_model(mixed(tmp_path, scales, mx.bfloat16)[0], dtype=compute)
    caches = make_caches(model)
    logits = model(mx.array([tokens(9)]), caches)
    assert logits.dtype == compute
    assert {x.dtype for cache in caches for x in cache.state} == {compute}


@pytest.mark.parametrize(
    ("scales", "values", "chosen"),
    [
        (mx.float16, mx.bfloat16, mx.float16),
        (mx.bfloat16, mx.float16, mx.bfloat16),
        (mx.float32, mx.bfloat16, mx.bfloat16),
        (mx.bfloat16, mx.bfloat16, mx.bfloat16),
    ],
    ids=str,
)
def test_a_gpu_computes_in_the_dtype_of_16_bit_scales(
    tmp_path, monkeypatch, scales, values, chosen
):
    monkeypatch.setattr(device, "default_dtype", lambda checkpoint: checkpoint)
    layout = lay_out(mixed(tmp_path, scales, values)[0])
    assert layout.dtype == chosen


def test_a_gpu_computes_in_the_configs_dtype_where_scales_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "default_dtype", lambda checkpoint: checkpoint)
    config, packed, _ = quantized(SCALED[0])
    path = write_checkpoint(tmp_path, {**config, "torch_dtype": "bfloat16"}, packed)
    assert lay_out(path).dtype == mx.bfloat16


@pytest.mark.parametrize("scales", FLOATS, ids=str)
@pytest.mark.parametrize("compute", SIXTEEN, ids=str)
def test_mlx_lms_definitions_compute_in_what_holds_their_scales(tmp_path, scales, compute):
    """Their layers go on in the dtype of a product, and so would the KV, which is counted."""
    pytest.importorskip("mlx_lm")
    olmo = {**WIDE, "architectures": ["OlmoForCausalLM"], "model_type": "olmo2"}
    config = llama_config(**WIDE)
    config.update(olmo)
    raw = {key: value for key, value in config.items() if value is not None}
    definition = family_for(raw, "config.json")
    assert not definition.native
    model = definition.build(definition.config(raw, "config.json"))
    nn.quantize(model.weights_root(), **AFFINE[2])
    arrays = dict(tree_flatten(model.weights_root().parameters()))
    arrays = {
        name: x.astype(scales if name.endswith(("scales", "biases")) else mx.bfloat16)
        if mx.issubdtype(x.dtype, mx.floating)
        else x
        for name, x in arrays.items()
    }
    raw["quantization"] = AFFINE[2]
    write_checkpoint(tmp_path, raw, {"x": mx.zeros((1,))})
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    loaded = load_model(tmp_path, dtype=compute)
    assert loaded.compute_dtype == (compute if scales == compute else mx.float32)
    caches = make_caches(loaded)
    loaded(mx.array([tokens(5)]), caches)
    assert {x.dtype for cache in caches for x in cache.state} == {loaded.compute_dtype}
    held = dict(loaded.weights_root().named_modules())["model.layers.0.mlp.down_proj"]
    assert mx.array_equal(
        held.scales.astype(mx.float32),
        arrays["model.layers.0.mlp.down_proj.scales"].astype(mx.float32),
    ).item()


BAD_QUANTIZATION = {
    "mode": {"group_size": 64, "bits": 4, "mode": "int4"},
    "mode-list": {"group_size": 64, "bits": 4, "mode": ["affine"]},
    "bits-7": {"group_size": 64, "bits": 7},
    "bits-text": {"group_size": 64, "bits": "4"},
    "bits-list": {"group_size": 64, "bits": [4]},
    "bits-float": {"group_size": 64, "bits": 4.5},
    "no-bits": {"group_size": 64},
    "group": {"group_size": 48, "bits": 4},
    "group-0": {"group_size": 0, "bits": 4},
    "text": "4bit",
    "list": [4],
    "path": {"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 9}},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 64},
    "fp8": {"quant_method": "fp8"},
}


@pytest.mark.parametrize("entry", BAD_QUANTIZATION.values(), ids=BAD_QUANTIZATION)
@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_a_quantization_that_cannot_be_run_is_refused_by_name(tmp_path, key, entry):
    config, packed, _ = quantized(AFFINE[2])
    del config["quantization"]
    path = write_checkpoint(tmp_path, {**config, key: entry}, packed)
    refused(path, "config.json", "quant", error=UnsupportedModel)


def test_a_whole_float_counts_as_its_number(tmp_path):
    config, packed, _ = quantized(AFFINE[2])
    config["quantization"] = {"group_size": 64.0, "bits": 4.0}
    path = write_checkpoint(tmp_path, config, packed)
    try:
        load_model(path)
    except UnsupportedModel as error:
        assert "bits" in str(error) or "group_size" in str(error)


def test_packed_weights_without_a_word_in_the_config_are_refused(tmp_path):
    config, packed, _ = quantized(AFFINE[2])
    del config["quantization"]
    refused(write_checkpoint(tmp_path, config, packed), "quantization", error=UnsupportedModel)


def change(name: str, how: Callable[[mx.array], mx.array] | None) -> Callable[[Arrays], None]:
    def apply(arrays: Arrays) -> None:
        if how is None:
            del arrays[name]
        else:
            arrays[name] = how(arrays[name])

    return apply


DAMAGED_PACKING = {
    "no-weight": change("lm_head.weight", None),
    "no-scales": change("lm_head.scales", None),
    "no-biases": change("lm_head.biases", None),
    "scales-shape": change("lm_head.scales", lambda a: a[:, :-1]),
    "weight-shape": change("lm_head.weight", lambda a: a[:, :-1]),
    "weight-float": change("lm_head.weight", lambda a: a.astype(mx.float32)),
    "weight-int": change("lm_head.weight", lambda a: a.astype(mx.int32)),
    "scales-int": change("lm_head.scales", lambda a: a.astype(mx.int32)),
    "embedding-weight-int": change("model.embed_tokens.weight", lambda a: a.astype(mx.int32)),
}


@pytest.mark.parametrize("damage", DAMAGED_PACKING.values(), ids=DAMAGED_PACKING)
def test_packed_parts_that_do_not_fit_are_refused_by_name(tmp_path, damage):
    config, packed, _ = quantized(AFFINE[2])
    whole = dict(packed)
    damage(packed)
    (name,) = {name for name in whole if packed.get(name) is not whole[name]}
    module = name.rpartition(".")[0]
    refused(write_checkpoint(tmp_path, config, packed), module, error=WeightsError)


@pytest.mark.parametrize("entry", SCALED, ids=entry_id)
def test_scales_of_another_dtype_than_the_modes_are_refused(tmp_path, entry):
    config, packed, _ = quantized(entry)
    packed["lm_head.scales"] = packed["lm_head.scales"].astype(mx.float32)
    refused(write_checkpoint(tmp_path, config, packed), "lm_head.scales", error=WeightsError)


@pytest.mark.parametrize("told", [{"group_size": 64, "bits": 8}, {"group_size": 32, "bits": 4},
                                  SCALED[0]], ids=entry_id)  # fmt: skip
def test_a_config_that_tells_another_packing_is_refused(tmp_path, told):
    config, packed, _ = quantized(AFFINE[2])
    refused(
        write_checkpoint(tmp_path, {**config, "quantization": told}, packed), error=WeightsError
    )


def test_projections_that_differ_in_format_are_not_fused(tmp_path):
    config, arrays, _ = quantized(
        {"group_size": 64, "bits": 4}, {"model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 8}}
    )
    model = load_model(write_checkpoint(tmp_path, config, arrays))
    mlps = {name: mlp for name, mlp in model.named_modules() if isinstance(mlp, GatedMLP)}
    fused = {name: "gate_up_proj" in mlp for name, mlp in mlps.items()}
    assert fused == {"model.layers.0.mlp": False, "model.layers.1.mlp": True}
