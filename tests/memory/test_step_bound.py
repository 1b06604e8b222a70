"""The bound of a step holds against its trace, on every family."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxkv.kv.types import KV_TYPES
from mlxkv.memory.step_bound import BASE_BYTES, StepBound
from mlxkv.memory.trace import decode_step, hollow, prefill_step
from mlxkv.models.loader import lay_out
from tests.families.oracle.cases import CASES, LONG, Case
from tests.families.test_parity import Golden
from tests.support.tiny import write_checkpoint

FAMILIES = [case for case in CASES if case.n_prompt == LONG and not case.prefill_in_one]
STEPS = ((0, 1), (0, 16), (0, 2048), (300, 256), (4096, 2048), (6143, 1))
"""Tokens held, and new ones."""


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
