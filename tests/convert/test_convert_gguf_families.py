"""GGUF files of every family: config, weights and logits of the checkpoint they were made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader
from mlx.utils import tree_flatten

import mlxkv
from mlxkv.convert import convert
from mlxkv.models import family_for
from tests.families.test_parity import Golden
from tests.support import gguf_qwen, tiny
from tests.support.gguf_families import write_family


@dataclass(frozen=True)
class Case:
    """One family.

    Args:
        golden: a checkpoint of `tests/families/golden`; "" for one that mlx-lm defines.
        config: changes of its config, or all of it; what llama.cpp's files do not say must be as
            in the released models.
        n_skipped: tensors that are left out.
    """

    golden: str
    config: dict[str, Any] = field(default_factory=dict)
    n_skipped: int = 0


QWEN = {
    **tiny.LLAMA,
    "head_dim": 16,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
MINISTRAL = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 48,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
CASES = {
    "gemma": Case("gemma-plain"),
    "gemma2": Case("gemma2-text", {"query_pre_attn_scalar": 16}),
    "gemma3n": Case("gemma3n-text"),
    "gemma4-moe": Case("gemma4-moe", n_skipped=1),
    "glm4": Case("glm4-plain"),
    "glm4moe": Case("glm4-moe-plain", n_skipped=7),
    "deepseek2": Case("glm4-moe-lite-plain", {"num_nextn_predict_layers": 0}),
    "gpt-oss": Case("gpt-oss-plain"),
    "mistral3": Case("mistral-plain", {"sliding_window": None}),
    "ministral3": Case("", {**QWEN, "model_type": "ministral3", "rope_parameters": MINISTRAL}),
    "smollm3": Case("", {**QWEN, "model_type": "smollm3", "num_hidden_layers": 4}),
    "qwen2": Case("", {**QWEN, "model_type": "qwen2"}),
    "qwen3": Case("", {**QWEN, "model_type": "qwen3"}),
    "qwen3moe": Case("", {**QWEN, **MOE, "model_type": "qwen3_moe"}),
    "qwen3next": Case("qwen3-next-plain"),
    "qwen35": Case("qwen3-5-plain"),
    "qwen35moe": Case("qwen3-5-moe", {"full_attention_interval": 2}),
}


def checkpoint(case: Case) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and weights, as Hugging Face names them."""
    if case.golden:
        golden = Golden.read(case.golden)
        return {**golden.config("hub"), **case.config}, golden.weights()
    pytest.importorskip("mlx_lm")
    family = family_for(case.config, "config.json")
    model = family.build(family.config(case.config, "config.json"))
    parameters: Any = tree_flatten(model.weights_root().parameters())
    weights = tiny.random_weights({name: array.shape for name, array in parameters})
    return case.config, {
        name.replace(".switch_mlp.", ".experts."): array for name, array in weights.items()
    }


def reference(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    if config["model_type"] == "qwen3_moe":
        weights = {n.replace(".experts.", ".switch_mlp."): a for n, a in weights.items()}
    return tiny.write_checkpoint(folder, config, weights)


def logits(folder: Path, prompt: list[int]) -> np.ndarray:
    model = mlxkv.load_model(folder, dtype=mx.float32)
    return np.array(model(mx.array([prompt]))[0])


@pytest.mark.parametrize("name", ["qwen3next", "qwen35moe"])
def test_projections_that_some_files_have_in_one_are_taken_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Of the first Qwen3-Next those of a gated delta net, of others those of experts."""
    monkeypatch.setattr(gguf_qwen, "_in_parts", lambda c, name, array: {name: array})
    monkeypatch.setattr(gguf_qwen, "_experts", lambda name, array: {f"{name}.weight": array})
    test_a_file_gives_the_logits_of_the_checkpoint_it_was_made_of(tmp_path, name)
    held = {tensor.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    stem = {"qwen3next": "ssm_in", "qwen35moe": "ffn_gate_up_exps"}[name]
    assert f"blk.0.{stem}.weight" in held


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_the_logits_of_the_checkpoint_it_was_made_of(tmp_path: Path, name: str):
    """A prompt that is longer than windows, and past the context that YaRN stretches."""
    config, weights = checkpoint(CASES[name])
    path = write_family(tmp_path / "a.gguf", config, weights)
    plan = convert(path, tmp_path / "out", dtype="float32").plan
    assert len(plan.skipped) == CASES[name].n_skipped
    prompt = tiny.tokens(100)
    expected = logits(reference(tmp_path / "hf", config, weights), prompt)
    assert expected.std() > 0.1
    got = logits(tmp_path / "out", prompt)
    np.testing.assert_allclose(got, expected, atol=2e-4 * expected.std(), rtol=0)
