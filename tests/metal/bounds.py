"""Traces and bounds of steps as Metal would run them, as JSON: a process of its own, see `measure`.

    python -m tests.metal.bounds FOLDER

FOLDER keeps the compiled shim.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.metal import hollow, shim, theirs
from tests.metal.definitions import DEFINITIONS
from tests.metal.proportions import MODELS

STEPS = ((0, 1), (0, 2048), (300, 8), (300, 9), (6143, 1), (6144, 4), (6144, 256), (6144, 2048))
"""Tokens held, and new ones."""
SMALLER = ((0, 9), (0, 513), (200, 257), (3000, 1500), (6144, 257), (14336, 2048))
"""The same of steps that a larger one stands in for."""
FLOAT32 = ("llama-3.1-8b", "gpt-oss-20b", "gemma3-4b")
"""Models that are measured in float32 as well, the widest values that a Mac computes in."""
DIMS = (64, 72, 80, 96, 112, 128, 192, 256, 512, 576)
QUERIES = (1, 2, 4, 8, 9, 2048)
GROUPS = (1, 4, 8, 16)
MASKS = ("none", "causal", "array")


def steps() -> Iterator[dict[str, Any]]:
    """What each step of each model holds at the most, and its bound."""
    from mlxkv.kv.types import KV_TYPES
    from mlxkv.memory.step_bound import StepBound
    from mlxkv.memory.trace import decode_step, prefill_step

    cases = [(name, mx.bfloat16, True) for name in MODELS]
    cases += [(name, mx.float32, False) for name in FLOAT32]
    for name, dtype, quantized in cases:
        model = hollow.model(MODELS[name], dtype, quantized)
        with shim.gpu():
            bound = StepBound.of(model)
            assert bound is not None
            # Quantized KV differs in its bits alone: each format takes its share of the steps.
            native, *packed = KV_TYPES
            formats = zip(itertools.cycle(packed), STEPS, strict=False)
            for kv_type, (n_held, n_new) in (*((native, step) for step in STEPS), *formats):
                if n_new == 1 and n_held:
                    held = decode_step(model, kv_type, n_held)
                else:
                    held = prefill_step(model, kv_type, n_held, n_new, last=True)
                yield {
                    "model": name,
                    "dtype": str(dtype),
                    "kv_type": kv_type,
                    "step": (n_held, n_new),
                    "traced": held.peak,
                    "bound": bound(kv_type, n_held, n_new),
                }


def larger_steps() -> Iterator[dict[str, Any]]:
    """What steps of mlx-lm's definitions hold, and what larger ones hold of each."""
    from mlxkv.memory.needs import Needs
    from mlxkv.memory.trace import prefill_step

    for name, config in DEFINITIONS.items():
        model = hollow.model(config, mx.bfloat16, quantized=True)
        with shim.gpu():
            need = Needs(model, "native", 2048)
            for n_held, n_new in SMALLER:
                held = prefill_step(model, "native", n_held, n_new, last=True)
                larger = list(need.larger_steps(n_held, n_new))
                step = n_held, n_new
                yield {"model": name, "step": step, "traced": held.peak, "larger": larger}


def attention() -> Iterator[dict[str, Any]]:
    """Attention that `is_fused` calls one kernel, and the operations that MLX makes of it."""
    from mlxkv.nn.attention import attend
    from mlxkv.nn.fused import is_fused

    dims = [(dim, dim) for dim in DIMS] + [(192, 128), (96, 64), (128, 64)]
    for (k_dim, v_dim), L, group, mask in itertools.product(dims, QUERIES, GROUPS, MASKS):
        with shim.gpu():
            if not is_fused(L, k_dim, v_dim, group):
                continue
            S = 2 * L
            q = hollow.hollow((1, group, L, k_dim), mx.bfloat16)
            k = hollow.hollow((1, 1, S, k_dim), mx.bfloat16)
            v = hollow.hollow((1, 1, S, v_dim), mx.bfloat16)
            seen = hollow.hollow((L, S), mx.bool_)
            given = {"none": None, "causal": "causal", "array": seen}[mask]
            out = attend(q, k, v, 1.0, given)
        names = {op["name"] for op in shim.graph(out)["ops"]}
        yield {"case": (k_dim, v_dim, L, group, mask), "operations": sorted(names)}


if __name__ == "__main__":
    shim.install(Path(sys.argv[1]))
    hollow.take_gpu_branches()
    figures = {"steps": list(steps()), "attention": list(attention())}
    if theirs.installed():
        figures["larger_steps"] = list(larger_steps())
    json.dump(figures, sys.stdout)
