"""What configs of Qwen say, and what of it is refused; test_parity.py has the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlxkv.errors import ConfigError
from mlxkv.models import family_for
from tests.support.paths import ROOT

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
