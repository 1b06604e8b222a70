"""How long building the graph of a batch's step takes: `python -m tests.metal.timing FOLDER`.

Medians of 20 steps on either side, in turns, on this machine's CPU. No test looks at them.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from tests.metal import hollow, shim

MODELS = ("llama-3.1-8b", "gemma3-4b", "gpt-oss-20b")
STEPS = 20


def medians_ms(name: str, B: int) -> tuple[float, float]:
    """Medians of mlxkv and mlx-lm."""
    from tests.metal import cases

    sides = (cases.Ours(), cases.Theirs())
    models = [side.model(cases.MODELS[name], mx.bfloat16, quantized=True) for side in sides]
    lengths = [cases.HELD - 7 * i for i in range(B)]
    batches = [side.batch(m, lengths) for side, m in zip(sides, models, strict=True)]
    times: tuple[list[float], list[float]] = [], []
    # The first two lay out rings and shared buffers, and compile.
    for i in range(STEPS + 2):
        for side, model, caches, spent in zip(sides, models, batches, times, strict=True):
            seconds = _built(side, model, caches, B)
            if i >= 2:
                spent.append(seconds * 1000)
    return statistics.median(times[0]), statistics.median(times[1])


def _built(side: Any, model: Any, caches: Any, B: int) -> float:
    ids = hollow.tokens(B, 1)
    with shim.gpu():
        start = time.perf_counter()
        side.last_logits(model, ids, caches)
        seconds = time.perf_counter() - start
    hollow.settle(caches, model)
    return seconds


if __name__ == "__main__":
    shim.install(Path(sys.argv[1]))
    hollow.take_gpu_branches()
    print(f"{'building a step, ms':28} {'mlxkv':>8} {'mlx-lm':>8}  ratio")
    for name in MODELS:
        for B in (4, 16):
            ours, theirs = medians_ms(name, B)
            print(f"{name + f', batch {B}':28} {ours:8.1f} {theirs:8.1f}  {ours / theirs:.2f}")
