"""Adapters against PEFT: golden files that tests/families/oracle/make_adapters.py wrote; no torch.

The tolerance is that of tests/families/test_parity.py, for its reasons.
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
from mlxkv.checkpoint.adapter import MLX_LM, PEFT
from mlxkv.checkpoint.adapter_files import open_adapter
from mlxkv.errors import ConfigError, UnsupportedModel, WeightsError
from mlxkv.models import family_for
from mlxkv.models.adapters import Weighted, attach, without_adapters
from mlxkv.models.adapters import adapted as beside
from mlxkv.nn import moe
from mlxkv.nn.batch import batch
from mlxkv.nn.lora_rows import RowChanges, merge_changes
from tests.families.oracle.adapter_cases import (
    CASES_OF_ADAPTERS,
    FOLDER,
    POSITIONS,
    AdapterCase,
    tensor,
)
from tests.families.test_parity import TOLERANCE, Golden
from tests.support.tiny import llama_config, tokens, write_checkpoint

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def write_adapter(
    folder: Path, file: str, config: dict[str, Any], arrays: dict[str, mx.array]
) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / file), arrays)
    return folder


def write_golden(folder: Path, case: AdapterCase) -> Path:
    entry = json.loads((FOLDER / f"{case.name}.json").read_text())
    arrays = {name: mx.array(tensor(name, shape)) for name, shape in entry["tensors"].items()}
    return write_adapter(folder, PEFT, entry["config"], arrays)


def adapted(model_dir: Path, *adapters: tuple[Path, float]) -> Any:
    raw = json.loads((model_dir / "config.json").read_text())
    model = mlxkv.load_model(model_dir, dtype=mx.float32)
    attach(model, family_for(raw, ""), [Weighted(open_adapter(a), w) for a, w in adapters])
    return model


def stored(file: Path) -> dict[str, mx.array]:
    """The arrays of one safetensors file."""
    found = mx.load(str(file))
    assert isinstance(found, dict)
    return found


def logits_of(model: Any, prompt: list[int]) -> np.ndarray:
    return np.array(model(mx.array([prompt]))[0])


@pytest.mark.parametrize("case", CASES_OF_ADAPTERS, ids=lambda case: case.name)
def test_logits_are_those_of_peft(case: AdapterCase, tmp_path: Path) -> None:
    golden = Golden.read(case.base)
    base, folder = golden.write(tmp_path / "base", "new"), write_golden(tmp_path / "a", case)
    expected = np.load(FOLDER / f"{case.name}.npz")["logits"]
    model = adapted(base, (folder, 1.0))
    got = logits_of(model, case.prompt())[list(POSITIONS)]
    assert abs(got - expected).max() / expected.std() < TOLERANCE
    # One token at a time takes other ways through fused products and experts.
    caches = mlxkv.make_caches(model)
    steps = [model(mx.array([[token]]), caches)[0, 0] for token in case.prompt()[:20]]
    step = np.array(mx.stack([steps[0], steps[19]]))
    assert abs(step - expected[[0, 2]]).max() / expected.std() < TOLERANCE


@pytest.mark.parametrize("case", CASES_OF_ADAPTERS, ids=lambda case: case.name)
def test_rows_of_a_batch_with_different_adapters_are_each_as_alone(
    case: AdapterCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them at weight 1, whose logits are PEFT's, one at -0.5, and the base; of different
    lengths. Experts are computed in the order of experts, where rows no longer follow each other.
    """
    monkeypatch.setattr(moe, "SORTED_ROWS", 4)
    golden = Golden.read(case.base)
    base_dir, folder = golden.write(tmp_path / "base", "new"), write_golden(tmp_path / "a", case)
    base = mlxkv.load_model(base_dir, dtype=mx.float32)
    family = family_for(json.loads((base_dir / "config.json").read_text()), "")
    one, other = (
        beside(base, family, [Weighted(open_adapter(folder), weight)]) for weight in (1.0, -0.5)
    )
    changes = RowChanges(3)
    merged = merge_changes([base, one, other], changes)
    changes.set([2, 1, 0])
    prompt, lengths = case.prompt(), (11, 19, 30)
    caches = [mlxkv.make_caches(base) for _ in lengths]
    alone = []
    for model, own, n in zip((other, one, base), caches, lengths, strict=True):
        model.last_logits(mx.array([prompt[:n]]), own)
        alone.append(logits_of(model, prompt[: n + 1])[-1])
    got = np.array(merged.last_logits(mx.array([[prompt[n]] for n in lengths]), batch(caches)))
    expected = np.load(FOLDER / f"{case.name}.npz")["logits"][POSITIONS.index(19)]
    for row, ref in zip((*got, got[1]), (*alone, expected), strict=True):
        assert abs(row - ref).max() / ref.std() < TOLERANCE
    # The base stays as it is, and is found again in what was made of it.
    assert one.plain is other.plain is base
    assert abs(logits_of(base, prompt[:31])[-1] - alone[2]).max() == 0


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", llama_config())


def mlx_lm(
    folder: Path, targets: dict[str, tuple[int, int]], scale: float = 2.0, rank: int = 3, **config
) -> Path:
    """An adapter as mlx-lm writes it: path -> (in, out)."""
    arrays = {}
    for path, (n_in, n_out) in targets.items():
        arrays[f"{path}.lora_a"] = mx.array(tensor(f"{path}.a", [n_in, rank]))
        arrays[f"{path}.lora_b"] = mx.array(tensor(f"{path}.b", [rank, n_out]))
    if config.get("fine_tune_type") == "dora":
        for path, (_, n_out) in targets.items():
            arrays[f"{path}.m"] = mx.array(1 + abs(tensor(f"{path}.m", [n_out])))
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    return write_adapter(
        folder, MLX_LM, {"lora_parameters": parameters, "num_layers": -1, **config}, arrays
    )


def test_adapters_with_weights_add_up_beside_packed_weights(base: Path, tmp_path: Path) -> None:
    """The sum of the weights themselves is the reference: packed ones are decoded for it."""
    raw = llama_config(quantization={"group_size": 32, "bits": 4})
    weights = stored(base / "model.safetensors")
    packed, plain = {}, dict(weights)
    for name in (f"{Q}.weight", f"{K}.weight"):
        arrays = mx.quantize(weights[name], group_size=32, bits=4)
        stem = name.removesuffix("weight")
        packed |= {
            stem + kind: a for kind, a in zip(("weight", "scales", "biases"), arrays, strict=True)
        }
        plain[name] = mx.dequantize(*arrays, group_size=32, bits=4)
    first = mlx_lm(tmp_path / "1", {Q: (64, 64), K: (64, 32)})
    second = mlx_lm(tmp_path / "2", {K: (64, 32)}, scale=0.5)
    for folder, weight in ((first, 0.5), (second, -2.0)):
        for path, target in open_adapter(folder).targets.items():
            change = target.scale * weight * (target.a @ target.b).T
            plain[f"{path}.weight"] = plain[f"{path}.weight"] + change
    packed_dir = write_checkpoint(tmp_path / "packed", raw, {**weights, **packed})
    sums = write_checkpoint(tmp_path / "sums", llama_config(), plain)
    got = logits_of(adapted(packed_dir, (first, 0.5), (second, -2.0)), tokens(20))
    expected = logits_of(mlxkv.load_model(sums, dtype=mx.float32), tokens(20))
    assert abs(got - expected).max() / expected.std() < TOLERANCE


@pytest.mark.parametrize(
    ("case", "targets"),
    [
        ("qwen3-next-one-key-head", ("in_proj_qkvz", "in_proj_ba", "out_proj")),
        ("qwen3-5-equal-heads", ("in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj")),
    ],
)
def test_adapters_of_gated_delta_nets_are_added_to_their_rows(
    case: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    """Rows that loading puts in another order included; the sum of the weights is the reference."""
    base = Golden.read(case).write(tmp_path / "base", "new")
    weights = stored(base / "model.safetensors")
    names = [f"model.layers.0.linear_attn.{name}" for name in targets]
    shapes = {name: weights[f"{name}.weight"].shape for name in names}
    folder = mlx_lm(tmp_path / "a", {name: (n_in, out) for name, (out, n_in) in shapes.items()})
    for path, target in open_adapter(folder).targets.items():
        name = f"{path}.weight"
        weights[name] = weights[name] + target.scale * (target.a @ target.b).T
    config = json.loads((base / "config.json").read_text())
    sums = write_checkpoint(tmp_path / "sums", config, weights)
    got = logits_of(adapted(base, (folder, 1.0)), tokens(20))
    expected = logits_of(mlxkv.load_model(sums, dtype=mx.float32), tokens(20))
    assert abs(got - expected).max() / expected.std() < TOLERANCE


def test_rows_on_packed_weights_are_each_as_alone(base: Path, tmp_path: Path) -> None:
    """Adapters of other targets and ranks each, DoRA among them, and the base; two rows have one of
    them. More rows than the kernels take at a time."""
    raw = llama_config(quantization={"group_size": 32, "bits": 4})
    packed = {}
    for name, weight in stored(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        arrays = mx.quantize(weight, group_size=32, bits=4)
        for kind, array in zip(("weight", "scales", "biases"), arrays, strict=True):
            packed[name.removesuffix("weight") + kind] = array
    model = mlxkv.load_model(write_checkpoint(tmp_path / "packed", raw, packed), dtype=mx.float32)
    mlp, attention = "model.layers.1.mlp", "model.layers.1.self_attn"
    folders = [
        mlx_lm(tmp_path / "1", {f"{mlp}.up_proj": (64, 96), f"{mlp}.down_proj": (96, 64)}),
        mlx_lm(tmp_path / "2", {Q: (64, 64), K: (64, 32), f"{attention}.o_proj": (64, 64)}, rank=5),
        mlx_lm(tmp_path / "3", {K: (64, 32), f"{mlp}.gate_proj": (64, 96)}, fine_tune_type="dora"),
    ]
    family = family_for(raw, "")
    models = [model] + [beside(model, family, [Weighted(open_adapter(each))]) for each in folders]
    changes = RowChanges(len(models))
    merged = merge_changes(models, changes)
    of = [1, 2, 0, 3, 2, 1, 3, 3, 0]
    changes.set(of)
    prompt, caches, alone = tokens(20), [mlxkv.make_caches(model) for _ in of], []
    for i, own in zip(of, caches, strict=True):
        models[i].last_logits(mx.array([prompt[:-1]]), own)
        alone.append(logits_of(models[i], prompt)[-1])
    got = np.array(merged.last_logits(mx.array([[prompt[-1]]] * len(of)), batch(caches)))
    for row, ref in zip(got, alone, strict=True):
        assert abs(row - ref).max() / ref.std() < TOLERANCE
    assert min(abs(got[i] - got[2]).max() for i in (0, 1, 3)) > 0.1


def test_a_model_with_adapters_is_made_without_them_again(base: Path, tmp_path: Path) -> None:
    first = mlx_lm(tmp_path / "1", {Q: (64, 64)})
    model, plain = adapted(base, (first, 1.0)), mlxkv.load_model(base, dtype=mx.float32)
    found, expected = without_adapters(model), logits_of(plain, tokens(20))
    assert found is without_adapters(model) is model.plain
    assert abs(logits_of(found, tokens(20)) - expected).max() == 0
    assert abs(logits_of(model, tokens(20)) - expected).max() > 0.1


def test_what_does_not_fit_is_refused_by_its_key(base: Path, tmp_path: Path) -> None:
    other = "model.layers.3.self_attn.q_proj"  # the model has 3 layers
    unknown = mlx_lm(tmp_path / "unknown", {Q: (64, 64), other: (64, 64)}, model="org/other")
    with pytest.raises(WeightsError, match=rf"{other}.lora_a .* does not have.*org/other"):
        adapted(base, (unknown, 1.0))
    wide = mlx_lm(tmp_path / "wide", {Q: (128, 64)})
    with pytest.raises(WeightsError, match=rf"{Q}.lora_a is .*has 64 values to 64"):
        adapted(base, (wide, 1.0))
    norm = mlx_lm(tmp_path / "norm", {"model.norm": (64, 64)})
    with pytest.raises(UnsupportedModel, match="no projection"):
        adapted(base, (norm, 1.0))
    full = mlx_lm(tmp_path / "full", {}, fine_tune_type="full")
    with pytest.raises(UnsupportedModel, match="'full'"):
        open_adapter(full)


@pytest.mark.parametrize(
    ("key", "value"),
    [("modules_to_save", ["lm_head"]), ("init_lora_weights", "pissa"), ("bias", "all")],
)
def test_peft_keys_that_change_the_result_are_refused(key, value, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, key: value}
    arrays = {f"base_model.model.{Q}.lora_A.weight": mx.zeros((3, 64))}
    with pytest.raises(ConfigError, match=f"'{key}'"):
        open_adapter(write_adapter(tmp_path / "a", PEFT, config, arrays))


def shapes(model: Any) -> dict[str, list[int]]:
    """Of a model's parameters."""
    flat: Any = tree_flatten(model.parameters())
    return {name: list(array.shape) for name, array in flat}


QWEN_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_logits_are_those_of_mlx_lm_on_its_own_definitions(method: str, tmp_path: Path) -> None:
    """Experts included: mlx-lm has no DoRA of those."""
    pytest.importorskip("mlx_lm")
    from mlx_lm.models import qwen3_moe
    from mlx_lm.tuner.utils import linear_to_lora_layers

    theirs = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(QWEN_MOE))
    weights = {name: mx.array(tensor(name, shape)) for name, shape in shapes(theirs).items()}
    theirs.load_weights(list(weights.items()))
    base = write_checkpoint(tmp_path / "base", QWEN_MOE, weights)
    parameters = {"rank": 3, "scale": 2.0, "dropout": 0.0}
    keys = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
    if method == "lora":
        keys += ["mlp.gate", "mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj"]
    linear_to_lora_layers(theirs, 2, {**parameters, "keys": keys}, use_dora=method == "dora")
    arrays = {
        name: mx.array(tensor(name, shape))
        for name, shape in shapes(theirs).items()
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    theirs.load_weights(list(arrays.items()), strict=False)
    config = {"fine_tune_type": method, "num_layers": 2, "lora_parameters": parameters}
    adapter = write_adapter(tmp_path / "a", MLX_LM, config, arrays)
    expected = np.array(theirs.eval()(mx.array([tokens(20)]))[0])
    got = logits_of(adapted(base, (adapter, 1.0)), tokens(20))
    assert abs(got - expected).max() / expected.std() < TOLERANCE


def test_experts_that_an_adapter_names_are_changed_and_others_are_not(tmp_path: Path) -> None:
    golden = Golden.read("glm4-moe-plain")
    base, weights = golden.write(tmp_path / "base", "new"), golden.weights()
    arrays = {}
    for i in (0, 2):
        path = f"model.layers.1.mlp.experts.{i}.gate_proj"
        out, n_in = weights[f"{path}.weight"].shape
        a, b = tensor(f"{path}.a", [3, n_in]), tensor(f"{path}.b", [out, 3])
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + 2 * b @ a
        arrays |= {f"base_model.model.{path}.lora_A.weight": mx.array(a)}
        arrays |= {f"base_model.model.{path}.lora_B.weight": mx.array(b)}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    adapter = write_adapter(tmp_path / "a", PEFT, config, arrays)
    changed = write_checkpoint(tmp_path / "changed", golden.config("new"), weights)
    expected = logits_of(mlxkv.load_model(changed, dtype=mx.float32), tokens(20))
    got = logits_of(adapted(base, (adapter, 1.0)), tokens(20))
    assert abs(got - expected).max() / expected.std() < TOLERANCE
