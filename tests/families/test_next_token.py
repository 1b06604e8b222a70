"""The layer of GLM-4.5 to 4.7 that predicts the token after next: parity, storage, conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxkv
from mlxkv.cache import make_cache
from mlxkv.convert import convert
from mlxkv.errors import UsageError
from mlxkv.memory.needs import Needs
from mlxkv.models.loader import lay_out
from mlxkv.nn.model import Predictor
from tests.families.test_glm import LITE, MOE, hub_weights, our_weights
from tests.support import tiny
from tests.support.gguf_families import write_family

L, E, H, HK, D = 40, MOE["hidden_size"], 4, 2, 16
AT = "model.layers.2."
TOLERANCE = 1e-4
"""In standard deviations: float32 against float64."""


def with_layer(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A config and its weights as a release has them: embedding and head stored once more."""
    config = {**config, "num_nextn_predict_layers": 1}
    weights = hub_weights(config, our_weights(config))
    weights[f"{AT}embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    weights[f"{AT}shared_head.head.weight"] = weights["lm_head.weight"]
    return config, weights


@pytest.fixture(scope="module", params=(MOE, LITE), ids=("glm4_moe", "glm4_moe_lite"))
def release(request, tmp_path_factory) -> Path:
    config, weights = with_layer(request.param)
    return tiny.write_checkpoint(tmp_path_factory.mktemp("next"), config, weights)


def predictor_of(folder: Path) -> Predictor:
    found = mlxkv.load_model(folder, dtype=mx.float32).predictor()
    assert found is not None
    return found


def given(seed: int = 0) -> tuple[mx.array, mx.array]:
    """Tokens and hidden states."""
    noise = np.random.RandomState(seed).standard_normal((1, L, E))
    return mx.array([tiny.tokens(L)]), mx.array(noise.astype(np.float32))


def test_parity_with_the_published_formula_in_float64(tmp_path: Path):
    config, weights = with_layer(MOE)
    weights[f"{AT}embed_tokens.weight"] = 2 * weights["model.embed_tokens.weight"]  # its own
    weights[f"{AT}shared_head.head.weight"] = -weights["lm_head.weight"]
    predictor = predictor_of(tiny.write_checkpoint(tmp_path, config, weights))
    tokens, hidden = given()
    found = predictor.hidden(tokens, hidden, None)
    ids, states = np.array(tokens)[0], np.array(hidden, np.float64)[0]
    expected = _read(config, weights, ids, states)
    ours = np.array(found)[0]
    assert np.abs(ours - expected).max() < TOLERANCE * expected.std()
    logits = expected @ weights[f"{AT}shared_head.head.weight"].T.astype(np.float64)
    assert np.abs(np.array(predictor.logits(found))[0] - logits).max() < TOLERANCE * logits.std()


def test_a_gguf_file_keeps_the_layer(tmp_path: Path):
    config, weights = with_layer(MOE)
    path = write_family(tmp_path / "a.gguf", config, weights)
    assert convert(path, tmp_path / "out", dtype="float32").plan.skipped == ()
    theirs = predictor_of(tiny.write_checkpoint(tmp_path / "hf", config, weights))
    tokens, hidden = given()
    expected = theirs.logits(theirs.hidden(tokens, hidden, None))
    ours = predictor_of(tmp_path / "out")
    found = ours.logits(ours.hidden(tokens, hidden, None))
    assert float(mx.abs(found - expected).max()) < TOLERANCE * float(mx.std(expected))


def test_the_layer_is_one_more_of_the_model_behind_a_projection(release: Path, tmp_path: Path):
    """The same numbers as a model whose only layer it is, given W [norm(e), norm(h)]."""
    config = json.loads((release / "config.json").read_text())
    stored = mx.load(str(release / "model.safetensors"))
    assert isinstance(stored, dict)
    alone = {name.replace(AT, "model.layers.0."): a for name, a in stored.items() if AT in name}
    alone = {name: a for name, a in alone.items() if not _is_around(name)}
    alone |= {name: a for name, a in stored.items() if ".layers." not in name}
    alone["model.norm.weight"] = stored[f"{AT}shared_head.norm.weight"]
    config |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    model = mlxkv.load_model(tiny.write_checkpoint(tmp_path, config, alone), dtype=mx.float32)
    tokens, hidden = given()
    embedding = stored["model.embed_tokens.weight"][tokens]
    norms = [
        mx.fast.rms_norm(x, stored[f"{AT}{name}.weight"], 1e-6)
        for name, x in (("enorm", embedding), ("hnorm", hidden))
    ]
    projected = mx.concatenate(norms, axis=-1) @ stored[f"{AT}eh_proj.weight"].T
    predictor = predictor_of(release)
    ours, theirs = predictor.hidden(tokens, hidden, None), model.hidden(projected)
    assert float(mx.abs(ours - theirs).max()) < TOLERANCE * float(mx.std(theirs))
    # In pieces, behind a cache.
    cache = make_cache(predictor.spec)
    pieces = [
        predictor.hidden(tokens[:, a:b], hidden[:, a:b], cache) for a, b in ((0, 17), (17, 18))
    ]
    pieces = mx.concatenate(pieces, axis=1)
    assert float(mx.abs(pieces - ours[:, :18]).max()) < TOLERANCE * float(mx.std(theirs))
    assert cache.offset == 18


def test_copies_of_embedding_and_head_take_no_memory(release: Path):
    layout = lay_out(release, "float32")
    assert not any(name.startswith((f"{AT}embed", f"{AT}shared_head.h")) for name in layout.weights)
    headers = lay_out(release, "float32", headers_only=True)  # whether they are is not known yet
    assert headers.nbytes - layout.nbytes == 2 * 4 * 96 * E


def test_a_plan_counts_its_keys_and_values(release: Path):
    model = mlxkv.load_model(release, dtype=mx.float32)
    with_it, without = Needs(model, "native", 256), Needs(model, "native", 256)
    without.guessing = []
    one_layer = model.cache_specs()[0].nbytes(300, without.kv)  # pyright: ignore
    assert with_it.kv_bytes(300) - without.kv_bytes(300) == one_layer
    ours, theirs = (each.step(256, 44, last=True) for each in (with_it, without))
    assert ours.peak - theirs.peak == one_layer
    behind = len(model.cache_specs())  # its own number is none that a KV type may name
    with pytest.raises(UsageError, match=f"names layer {behind}"):
        Needs(model, f"q8,{behind}=native", 256).kv_bytes(1)


@pytest.mark.parametrize("quantize", (None, "affine8"))
def test_a_conversion_keeps_the_layer_as_the_recipe_says(
    release: Path, quantize: str | None, tmp_path: Path
):
    convert(release, tmp_path / "out", quantize=quantize, group_size=quantize and 32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(stored, dict)
    assert (f"{AT}eh_proj.scales" in stored) == (quantize is not None)
    assert f"{AT}enorm.scales" not in stored
    assert f"{AT}shared_head.head.weight" not in stored  # the model's own once more
    tokens, hidden = given()
    ours, theirs = (
        each.logits(each.hidden(tokens, hidden, None))
        for each in map(predictor_of, (tmp_path / "out", release))
    )
    noise = 0.1 if quantize else 1e-6
    assert float(mx.abs(ours - theirs).max()) < noise * float(mx.std(theirs))


def test_a_release_without_the_layer_loads_and_predicts_nothing(release: Path, tmp_path: Path):
    stored = mx.load(str(release / "model.safetensors"))
    assert isinstance(stored, dict)
    kept = {name: array for name, array in stored.items() if AT not in name}
    config = json.loads((release / "config.json").read_text())
    model = mlxkv.load_model(tiny.write_checkpoint(tmp_path, config, kept), dtype=mx.float32)
    whole = mlxkv.load_model(release, dtype=mx.float32)
    tokens, _ = given()
    assert model.predictor() is None
    assert mx.array_equal(model(tokens), whole(tokens))


def _is_around(name: str) -> bool:
    return any(f".{part}." in name for part in ("enorm", "hnorm", "eh_proj", "shared_head")) or (
        ".0.embed_tokens." in name
    )


def _read(
    config: dict[str, Any], weights: dict[str, np.ndarray], tokens: np.ndarray, hidden: np.ndarray
) -> np.ndarray:
    """shared_head.norm(layer(eh_proj [enorm(embedding), hnorm(hidden)])) of a GLM-4.5, `[L, E]`."""
    w = {n.removeprefix(AT): a.astype(np.float64) for n, a in weights.items() if n.startswith(AT)}
    embedding = w["embed_tokens.weight"][tokens]
    pair = [_norm(embedding, w["enorm.weight"]), _norm(hidden, w["hnorm.weight"])]
    x = np.concatenate(pair, axis=-1) @ w["eh_proj.weight"].T
    x = x + _attention(_norm(x, w["input_layernorm.weight"]), w)
    x = x + _experts(_norm(x, w["post_attention_layernorm.weight"]), w, config)
    return _norm(x, w["shared_head.norm.weight"])


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + MOE["rms_norm_eps"]) * weight


def _attention(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    q, k, v = (
        (x @ w[f"self_attn.{n}_proj.weight"].T + w[f"self_attn.{n}_proj.bias"])
        .reshape(len(x), -1, D)
        .swapaxes(0, 1)
        for n in "qkv"
    )  # [H, L, D]
    q, k = (_turned(_norm(y, w[f"self_attn.{n}_norm.weight"])) for n, y in (("q", q), ("k", k)))
    k, v = (np.repeat(y, H // HK, axis=0) for y in (k, v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(D)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out = scores / scores.sum(-1, keepdims=True) @ v
    return out.swapaxes(0, 1).reshape(len(x), -1) @ w["self_attn.o_proj.weight"].T


def _turned(x: np.ndarray) -> np.ndarray:
    """The first half of each head rotated, its halves against each other."""
    n = D // 4
    angles = np.arange(x.shape[1])[:, None] * 1e4 ** (-np.arange(n) / n)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    turned = [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    return np.concatenate([*turned, rest], axis=-1)


def _experts(x: np.ndarray, w: dict[str, np.ndarray], config: dict[str, Any]) -> np.ndarray:
    scores = 1 / (1 + np.exp(-(x @ w["mlp.gate.weight"].T)))
    ranked = np.argsort(-(scores + w["mlp.gate.e_score_correction_bias"]), axis=-1)
    out = _mlp(x, w, "mlp.shared_experts")
    for i, chosen in enumerate(ranked[:, : config["num_experts_per_tok"]]):
        weight = scores[i, chosen] / scores[i, chosen].sum() * config["routed_scaling_factor"]
        for expert, share in zip(chosen, weight, strict=True):
            out[i] += share * _mlp(x[i], w, f"mlp.experts.{expert}")
    return out


def _mlp(x: np.ndarray, w: dict[str, np.ndarray], at: str) -> np.ndarray:
    gate, up = (x @ w[f"{at}.{name}_proj.weight"].T for name in ("gate", "up"))
    return gate / (1 + np.exp(-gate)) * up @ w[f"{at}.down_proj.weight"].T
