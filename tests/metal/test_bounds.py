"""The bound of a step, and the rule by which it leaves scores away, as Metal would run them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlxkv.memory.budget import AMPLE
from tests.metal import theirs
from tests.metal.definitions import DEFINITIONS
from tests.metal.proportions import MODELS
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def figures(shim_folder: Path) -> Mapping[str, Any]:
    """What `tests.metal.bounds` prints."""
    command = [sys.executable, "-m", "tests.metal.bounds", str(shim_folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("model", MODELS)
def test_no_step_of_a_released_model_holds_more_than_the_bound(figures, model):
    steps = [step for step in figures["steps"] if step["model"] == model]
    assert steps
    assert [step for step in steps if step["traced"] >= step["bound"]] == []


def test_a_long_chunk_behind_a_long_prompt_is_bounded_without_its_scores(figures):
    (step,) = [
        step
        for step in figures["steps"]
        if (step["model"], step["dtype"]) == ("llama-3.1-8b", "mlx.core.bfloat16")
        and (step["kv_type"], step["step"]) == ("native", [6144, 2048])
    ]
    scores = 4 * 4 * 32 * 2048 * 8192
    assert step["bound"] < 3 * step["traced"] < scores


def test_attention_that_is_called_fused_is_one_kernel(figures):
    assert figures["attention"]
    loose = [
        case["case"]
        for case in figures["attention"]
        if "ScaledDotProductAttention" not in case["operations"]
        or {"Matmul", "Softmax"} & set(case["operations"])
    ]
    assert loose == []


@pytest.mark.skipif(not theirs.installed(), reason="mlx-lm is not installed")
def test_no_step_of_mlx_lms_definitions_holds_more_than_a_larger_one(figures):
    steps = figures["larger_steps"]
    assert {step["model"] for step in steps} == DEFINITIONS.keys()
    small = [step for step in steps if step["traced"] >= 0.85 * AMPLE * min(step["larger"])]
    assert small == []
