"""A larger step bounds a smaller one on mlx-lm's definitions, so few of their steps are traced.

Attention is not fused here, whatever the branches: `tests/metal/test_bounds.py` has that.
"""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import pytest

import mlxkv
from mlxkv.base import device
from mlxkv.kv.types import KV_TYPES
from mlxkv.memory import trace
from mlxkv.memory.budget import AMPLE
from mlxkv.memory.needs import Needs
from mlxkv.memory.step_bound import StepBound
from mlxkv.memory.trace import decode_step, prefill_step
from mlxkv.nn.model import CausalLM
from tests.metal.definitions import DEFINITIONS
from tests.metal.hollow import model as hollow_model
from tests.support.command_line import chat_model

pytest.importorskip("mlx_lm")

HELD = (0, 3000, 6144)
NEW = (1, 200, 513)  # behind a multiple of 256 the caches grow more than once for the last


@pytest.fixture(params=DEFINITIONS)
def definition(request: pytest.FixtureRequest) -> CausalLM:
    dtype = device.default_dtype(mx.bfloat16)
    return hollow_model(DEFINITIONS[request.param], dtype, quantized=True)


@pytest.mark.parametrize("kv_type", [KV_TYPES[0], KV_TYPES[-1]])
def test_no_step_of_a_definition_holds_more_than_a_larger_one(definition, kv_type):
    need = Needs(definition, kv_type, device.default_chunk())
    for n_held, n_new in itertools.product(HELD, NEW):
        if n_new == 1 and n_held:
            held = decode_step(definition, kv_type, n_held)
        else:
            held = prefill_step(definition, kv_type, n_held, n_new, last=True)
        for bound in need.larger_steps(n_held, n_new):
            assert held.peak < 0.85 * AMPLE * bound, (n_held, n_new)


def test_few_steps_of_a_definition_are_traced_where_there_is_ample_room(tmp_path, monkeypatch):
    path = chat_model(tmp_path / "m", model_type="smollm3", max_position_embeddings=8192)
    traced: list[tuple[int, int]] = []

    def counted(model: Any, kv_type: str, n_held: int, n_new: int, *, last: bool) -> Any:
        traced.append((n_held, n_new))
        return prefill_step(model, kv_type, n_held, n_new, last=last)

    monkeypatch.setattr(trace, "prefill_step", counted)
    with mlxkv.load(path, dtype="float32", memory="8GiB") as llm:
        assert StepBound.of(llm.model) is None
        session = llm.session()
        session.prefill(llm.encode("abcdefg " * 250), chunk=300)
        assert traced == [(n, 513) for n in (0, 512, 1024, 2048)]
        session.reset()
        session.prefill(llm.encode("bcdefgh " * 225), chunk=400)
        assert len(traced) == 4
