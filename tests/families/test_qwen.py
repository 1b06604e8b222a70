"""What configs of Qwen say, and what of it is refused; test_parity.py has the rest."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxkv.cache import make_cache
from mlxkv.errors import ConfigError
from mlxkv.models import family_for
from mlxkv.models.loader import load_model
from mlxkv.nn.model import Embedded
from tests.families.oracle.qwen_cases import HYBRID, ROPE
from tests.support.paths import ROOT
from tests.support.tiny import random_weights, write_checkpoint

TINY = {**HYBRID, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
TINY |= {"model_type": "qwen3_5_text", "intermediate_size": 64, "rope_parameters": ROPE}
GOLDEN = ROOT / "tests" / "families" / "golden"


def config_of(case: str, **changes: Any) -> Any:
    """A golden case's config in the hub style; a change to ... leaves a key out."""
    raw = json.loads((GOLDEN / case / "config.hub.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    return family_for(raw, "config.json").config(raw, "config.json")


@pytest.mark.parametrize(
    ("window", "windows"), [(..., (None, 4096, 4096)), (None, (None, None, None))]
)
def test_a_window_that_is_left_out_is_4096_and_null_is_none(window, windows) -> None:
    assert config_of("qwen3-sliding", sliding_window=window).windows == windows


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "gelu"), ("output_gate_type", "sigmoid"), ("attn_output_gate", False)],
)
def test_other_gates_and_activations_of_a_hybrid_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: {key} must be"):
        config_of("qwen3-5-plain", **{key: value})
    assert config_of("qwen3-5-plain", output_gate_type="swish", hidden_act="silu")


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (True, None)])
def test_a_head_is_tied_where_either_level_of_a_config_says_so(outer: bool, inner: Any) -> None:
    text = json.loads((GOLDEN / "qwen3-5-plain" / "config.hub.json").read_text())
    text["tie_word_embeddings"] = inner
    raw = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": outer}
    assert family_for(raw, "config.json").config(raw, "config.json").tie_word_embeddings


def test_a_qwen3_5_of_no_experts_is_dense() -> None:
    assert config_of("qwen3-5-plain", num_experts=0) == config_of("qwen3-5-plain")


def tiny_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    family = family_for(config, "config.json")
    parameters = tree_flatten(family.build(family.config(config, "config.json")).parameters())
    return random_weights({name: array.shape for name, array in parameters})


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def test_the_next_token_layer_is_the_published_formula_in_both_layouts(tmp_path) -> None:
    """Its layer as a model of one, which has parity with transformers; the rest in float64."""
    weights = tiny_weights({**TINY, "mtp_num_hidden_layers": 1})
    random = np.random.RandomState(0)
    tokens, hidden = random.randint(0, 96, (1, 12)), random.standard_normal((1, 12, 48))
    pair = [
        normed(
            weights["model.embed_tokens.weight"][tokens],
            weights["mtp.pre_fc_norm_embedding.weight"],
        ),
        normed(hidden, weights["mtp.pre_fc_norm_hidden.weight"]),
    ]
    x = mx.array((np.concatenate(pair, axis=-1) @ weights["mtp.fc.weight"].T).astype(np.float32))
    one = {**TINY, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    own = {n.replace("mtp.", "model."): w for n, w in weights.items() if n.startswith("mtp.")}
    layer = {n: w for n, w in own.items() if "fc" not in n}
    rest = {n: w for n, w in weights.items() if n.startswith(("model.embed", "lm_head"))}
    single = load_model(write_checkpoint(tmp_path / "one", one, layer | rest), dtype=mx.float32)
    expected = single.forward(Embedded(x, None, ()), None)
    norms = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")
    originals = {
        name: w.swapaxes(1, 2)
        if "conv1d" in name
        else w - 1
        if name.endswith((*norms, "mtp.norm.weight")) or "pre_fc_norm" in name
        else w
        for name, w in weights.items()
    }
    for name, of in (("ours", weights), ("original", originals)):
        model = load_model(write_checkpoint(tmp_path / name, TINY, of), dtype=mx.float32)
        predictor = model.predictor()
        assert predictor is not None
        cache = make_cache(predictor.spec, "native")
        new, heard = mx.array(tokens), mx.array(hidden.astype(np.float32))
        parts = [(0, 5), (5, 6), (6, 12)]
        found = [predictor.hidden(new[:, a:b], heard[:, a:b], cache) for a, b in parts]
        assert mx.allclose(mx.concatenate(found, axis=1), expected, atol=1e-4), name
    alone = {name: w for name, w in weights.items() if not name.startswith("mtp.")}
    folder = write_checkpoint(tmp_path / "alone", {**TINY, "mtp_num_hidden_layers": 1}, alone)
    assert load_model(folder).predictor() is None
