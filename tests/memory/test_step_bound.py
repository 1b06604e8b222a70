"""The bound of a step holds against its trace, on every family.

Attention is not fused here, whatever the branches: `tests/metal/test_bounds.py` has that.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlxkv.base import device
from mlxkv.kv.types import KV_TYPES
from mlxkv.memory.step_bound import BASE_BYTES, StepBound
from mlxkv.memory.trace import decode_step, hollow, prefill_step
from mlxkv.models.loader import lay_out
from tests.families.oracle.cases import CASES, LONG, Case
from tests.families.test_parity import Golden
from tests.metal.hollow import model as hollow_model
from tests.metal.proportions import MODELS as PROPORTIONS
from tests.support.tiny import write_checkpoint

FAMILIES = [case for case in CASES if case.n_prompt == LONG and not case.prefill_in_one]
STEPS = (
    (0, 1), (0, 16), (0, 256), (0, 2048), (300, 8), (300, 9), (300, 256), (4096, 2048), (6143, 1)
)  # fmt: skip
"""Tokens held, and new ones."""
ALIKE = {"num_hidden_layers": 6}
"""Of layers that are all alike. Gemma 2's, which come closest to the bound, are all there."""
RELEASED = {
    "llama-3.1-8b": ALIKE, "smollm2-135m": ALIKE, "glm4-9b": ALIKE,
    "gemma2-2b": {}, "gemma3n-e2b": {}, "gemma4-e2b": {},
}  # fmt: skip
"""Models whose proportions are taken: with experts a trace takes a minute on the CPU backend."""


def written(case: Case, folder: Path) -> Path:
    golden = Golden.read(case.name)
    return write_checkpoint(folder / case.name, golden.config("new"), golden.weights())


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_no_step_holds_more_than_the_bound(case, tmp_path):
    model = hollow(lay_out(written(case, tmp_path), "float32"))
    bound = StepBound.of(model)
    assert bound is not None
    for kv_type in (KV_TYPES[0], KV_TYPES[-1]):
        for n_held, n_new in STEPS:
            if n_new == 1 and n_held:
                held = decode_step(model, kv_type, n_held)
            else:
                held = prefill_step(model, kv_type, n_held, n_new, last=True)
            most = bound(kv_type, n_held, n_new)
            assert held.peak < most
            if n_new >= 256:  # what a tiny model needs for one token is no multiple of its shapes
                assert held.peak < 0.85 * (most - BASE_BYTES), (kv_type, n_held, n_new)


@pytest.mark.parametrize("name", RELEASED)
def test_no_step_of_a_released_model_holds_more_than_the_bound(name):
    config = {**PROPORTIONS[name], **RELEASED[name]}
    model = hollow_model(config, device.default_dtype(mx.bfloat16), quantized=False)
    bound = StepBound.of(model)
    assert bound is not None
    for kv_type in (KV_TYPES[0], KV_TYPES[-1]):
        for n_held in (0, 6144):
            n_new = device.default_chunk()
            held = prefill_step(model, kv_type, n_held, n_new, last=True)
            assert held.peak < bound(kv_type, n_held, n_new), (kv_type, n_held, n_new)
