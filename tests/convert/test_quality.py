"""Quantizing well: rounding by moments, bits by measured divergence, and the comparison."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

import mlxkv
from mlxkv.checkpoint.quantization import Format
from mlxkv.convert import convert
from mlxkv.convert.quality import calibration
from mlxkv.convert.quality import compare as compare_module
from mlxkv.convert.quality.allocate import Choice, allocate
from mlxkv.convert.quality.calibration import parts_of
from mlxkv.convert.quality.compare import compare
from mlxkv.convert.quality.measure import compare_paths
from mlxkv.convert.quality.rounding import moments_of, rounded
from mlxkv.convert.quality.sensitivity import units_of
from mlxkv.convert.quality.texts import CALIBRATION, HELD_OUT
from mlxkv.convert.quantization import is_next_token, is_raised
from mlxkv.errors import UsageError
from mlxkv.nn.model import POSITIONS
from tests.support.command_line import chat_model
from tests.support.tiny_embedder import write_embedder


def silent(what: str, done: int, total: int) -> None:
    pass


def correlated(columns: int, seed: int = 0) -> np.ndarray:
    """Second moments of inputs that mostly lie in a quarter of their dimensions."""
    random = np.random.RandomState(seed)
    mixing = random.standard_normal((columns // 4, columns))
    inputs = random.standard_normal((512, columns // 4)) @ mixing
    inputs += 0.3 * random.standard_normal(inputs.shape)
    return inputs.T @ inputs / len(inputs)


def result_error(
    arrays: tuple[mx.array, ...], weight: mx.array, of: Format, M: np.ndarray
) -> float:
    """E|(W - Q) x|^2."""
    values = mx.dequantize(*arrays, group_size=of.group_size, bits=of.bits)
    off = np.array(values.astype(mx.float32) - weight, np.float64)
    return float(((off @ M) * off).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rounding_by_moments_more_than_halves_the_error_of_the_results(bits: int):
    """In float16 scales, which are rounded before codes are chosen: all six widths are packed."""
    of, M = Format("affine", bits, 32), correlated(96)
    weight = mx.random.normal((40, 96), key=mx.random.key(1)).astype(mx.float16).astype(mx.float32)
    plain = mx.quantize(weight.astype(mx.float16), group_size=32, bits=bits)
    own = rounded(weight, of, mx.float16, moments_of(M))
    assert [(a.shape, a.dtype) for a in own] == [(a.shape, a.dtype) for a in plain]
    assert result_error(own, weight, of, M) < 0.5 * result_error(plain, weight, of, M)


def test_rounding_without_moments_is_no_further_off_than_mlxs():
    of = Format("affine", 3, 64)
    weight = mx.random.normal((40, 128), key=mx.random.key(2))
    plain = mx.quantize(weight, group_size=64, bits=3)
    own = rounded(weight, of, mx.float32, None)
    M = np.eye(128)
    assert result_error(own, weight, of, M) < 0.95 * result_error(plain, weight, of, M)


def test_inputs_that_are_always_0_and_groups_of_one_value_round_to_finite_values():
    weight = mx.concatenate([mx.zeros((2, 32)), mx.full((2, 32), 0.5)], axis=1)
    arrays = rounded(weight, Format("affine", 4, 32), mx.float16, moments_of(np.zeros((64, 64))))
    values = mx.dequantize(*arrays, group_size=32, bits=4)
    np.testing.assert_allclose(np.array(values), np.array(weight), atol=1e-3)


def test_bits_go_where_the_divergence_falls_most_for_each_byte():
    """Beside every allocation of four units, the sum is the least, or within one step of it."""
    random = np.random.RandomState(0)
    choices = {
        name: [
            Choice(Format("affine", bits, 64), size * bits, scale * 4.0**-bits)
            for bits in (2, 3, 4, 6)
        ]
        for name, size, scale in zip(
            "abcd", (10, 40, 20, 30), random.lognormal(0, 3, 4), strict=True
        )
    }
    for budget in (280, 330, 400, 600):
        found = allocate(choices, budget)
        every = [
            (sum(c.kl for c in each), sum(c.n_bytes for c in each))
            for each in itertools.product(*choices.values())
        ]
        least = min(kl for kl, n_bytes in every if n_bytes <= budget)
        looser = min(kl for kl, n_bytes in every if n_bytes <= budget - 80)
        assert found is not None
        assert sum(c.n_bytes for c in found.values()) <= budget
        assert least <= sum(c.kl for c in found.values()) <= looser
    assert allocate(choices, 199) is None


def test_weights_that_are_fused_are_one_unit_and_share_moments():
    layer = "model.layers.0.self_attn."
    shapes = {f"{layer}{n}_proj.weight": (64, 64) for n in "qkvo"}
    assert [unit.weights for unit in units_of(shapes)] == [
        tuple(f"{layer}{n}_proj.weight" for n in "qkv"),
        (f"{layer}o_proj.weight",),
    ]
    assert [len(part) for part in parts_of(shapes, 4 * 64 * 64)] == [3, 1]


def test_a_layer_that_guesses_the_next_token_gets_no_more_bits():
    name = "model.layers.4.mlp.down_proj.weight"
    assert is_raised("mixed_3_6", name, 5) and not is_raised("mixed_3_6", name, 4)
    assert is_next_token(name, 4) and not is_next_token(name, 5)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch):
    """Short texts: a tiny model needs no more."""
    monkeypatch.setattr(calibration, "MOMENT_WINDOWS", (4, 4))
    monkeypatch.setattr(calibration, "MOMENT_LENGTH", 128)
    monkeypatch.setattr(compare_module, "N_WINDOWS", 4)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("quality") / "hf", num_hidden_layers=2)


@pytest.mark.usefixtures("brief")
def test_auto_keeps_within_its_bits_is_nearer_than_affine_and_loads_in_mlx_lm(
    tiny_model: Path, tmp_path: Path
):
    made = convert(
        tiny_model, tmp_path / "auto", quantize="auto", target_bits=5.5, dtype="float16",
        group_size=32, evaluate=True,
    )  # fmt: skip
    plain = convert(tiny_model, tmp_path / "plain", quantize="affine4", group_size=32,
                    dtype="float16", evaluate=True)  # fmt: skip
    assert made.plan.bits_per_weight <= 5.5
    assert made.measured is not None and made.comparison is not None
    assert plain.comparison is not None and plain.plan.bits_per_weight > 5
    assert made.comparison.kl_mean < 0.7 * plain.comparison.kl_mean
    assert made.measured.n_passes == len(made.measured.units) + 1
    formats = {t.name: t.quantization for t in made.plan.tensors if t.quantization}
    assert len({each.bits for each in formats.values()}) > 1
    q, k = (formats[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qk")
    assert q == k
    prompt = mx.array([[5, 70, 71, 90]])
    theirs, _ = mlx_lm.utils.load_model(tmp_path / "auto")
    theirs.set_dtype(mx.float32)
    ours = np.array(mlxkv.load_model(tmp_path / "auto", "float32")(prompt))
    np.testing.assert_allclose(np.array(theirs(prompt)), ours, atol=1e-3 * ours.std())


def test_too_few_bits_are_refused_with_the_least_that_there_is(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(calibration, "dense_model")  # nothing is measured
    with pytest.raises(UsageError, match=r"2 is too few bits per weight: this model has 3\.\d+ at"):
        convert(tiny_model, tmp_path / "out", quantize="auto", target_bits=2)
    assert not (tmp_path / "out").exists()


def test_a_text_of_the_users_that_is_too_short_is_named(tiny_model: Path, tmp_path: Path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(UsageError, match=r"short\.txt has 10 tokens; measuring takes 256 at least"):
        convert(
            tiny_model, tmp_path / "out", quantize="affine4", group_size=32,
            calibrate=tmp_path / "short.txt",
        )  # fmt: skip


def test_a_comparison_is_what_the_logits_say(tiny_model: Path):
    one, other = mlxkv.load_model(tiny_model), mlxkv.load_model(tiny_model)
    other.lm_head.weight = other.lm_head.weight * 1.2
    other.lm_head.settle()
    tokens = mx.array([[5, 70, 71, 90, 33], [44, 6, 7, 8, 9]])
    found = compare(one, other, tokens)
    p, q = (np.array(m(tokens)[:, :-1], np.float64) for m in (one, other))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    kl = (np.exp(p) * (p - q)).sum(-1).reshape(-1)
    following = np.array(tokens)[:, 1:, None]
    assert found.n_positions == 8
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(kl.max(), rel=1e-4)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    for x, perplexity in ((p, found.reference_perplexity), (q, found.perplexity)):
        expected = math.exp(-np.take_along_axis(x, following, -1).mean())
        assert perplexity == pytest.approx(expected, rel=1e-4)


def test_models_of_other_vocabularies_are_not_compared(tiny_model: Path, tmp_path: Path):
    other = chat_model(tmp_path / "other", special=("<a>",), num_hidden_layers=1)
    with pytest.raises(UsageError, match="have different tokenizers"):
        compare_paths(tiny_model, other, None, silent)


def test_an_embedding_model_is_not_measured_and_nothing_is_written(tmp_path: Path):
    folder, out = write_embedder(tmp_path / "embedder"), tmp_path / "out"
    options: list[dict[str, Any]] = [
        {"quantize": "auto"},
        {"quantize": "affine4", "calibrate": True},
        {"quantize": "affine4", "evaluate": True},
    ]
    for each in options:
        with pytest.raises(UsageError, match="is an embedding model, which predicts no tokens"):
            convert(folder, out, **each)
    with pytest.raises(UsageError, match="is an embedding model"):
        compare_paths(folder, folder, None, silent)
    assert not out.exists()


def test_a_model_of_mlx_lms_definition_is_compared_but_not_measured(tmp_path: Path):
    folder = chat_model(tmp_path / "hf", num_hidden_layers=1, model_type="qwen2")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    for name in [name for name in weights if name.endswith("o_proj.weight")]:
        layer = name.removesuffix("o_proj.weight")
        weights |= {
            f"{layer}{n}_proj.bias": weights[f"{layer}{n}_proj.weight"][:, 0] for n in "qkv"
        }
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(UsageError, match="qwen2 runs on mlx-lm's definition"):
        convert(folder, tmp_path / "out", quantize="auto")
    model = mlxkv.load_model(folder)
    tokens = mx.random.randint(3, 250, (1, POSITIONS + 8), key=mx.random.key(0))
    log_p = model(tokens[:, :-1])[0] - mx.logsumexp(
        model(tokens[:, :-1])[0], axis=-1, keepdims=True
    )
    following = mx.take_along_axis(log_p, tokens[0, 1:, None], axis=-1)
    found = compare(model, model, tokens)
    assert found.kl_mean < 1e-6 and found.top1 == 1
    assert math.log(found.perplexity) == pytest.approx(-float(following.mean()), rel=1e-4)


def test_a_dry_run_is_not_evaluated(tiny_model: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="a dry run writes nothing"):
        convert(tiny_model, tmp_path / "out", quantize="affine4", evaluate=True, dry_run=True)


def test_held_out_text_is_not_in_the_calibration_text():
    lines = {line for line in CALIBRATION.read_text("utf-8").splitlines() if len(line) > 40}
    held = [line for line in HELD_OUT.read_text("utf-8").splitlines() if len(line) > 40]
    assert lines and held
    assert [line for line in held if line in lines] == []


@pytest.mark.usefixtures("brief")
def test_the_command_prints_all_it_measured_as_json(tiny_model: Path, tmp_path: Path, capfd):
    from mlxkv.cli import main

    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 60)
    args = ["convert", str(tiny_model), "-o", str(tmp_path / "out"), "-q", "auto"]
    assert (
        main(
            [*args, "--target-bits", "6", "--group-size", "32", "--calibrate", str(text), "--json"]
        )
        == 0
    )
    found = json.loads(capfd.readouterr().out)
    assert found["bits_per_weight"] <= 6 and found["comparison"] is None
    assert found["measured"]["sensitivity"].keys() >= {"lm_head.weight"}
    assert main(["compare", str(tiny_model), str(tmp_path / "out"), "--text", str(text)]) == 0
    assert capfd.readouterr().out.startswith("KL ")
    none = ["convert", str(tiny_model), "-o", str(tmp_path / "none"), "-q", "affine4"]
    assert main([*none, "--calibrate", ""]) == 2
    assert "cannot be read as UTF-8 text" in capfd.readouterr().err
