"""One engine in a process of its own: reads a job from stdin, writes events to stdout.

Its peak memory is measured alone, and a crash (Metal aborts on a failed allocation) ends only its
own measurement. Both engines are loaded through this module, so both have the same BLAS.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlxkv.errors import INTERRUPTED, MlxkvError, one_line

WARM_CPU = 32, 4
"""Tokens of prompts and steps that warm up the CPU backend, which compiles no kernels by shape: a
whole case would only take longer."""

Emit = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker does.

    Args:
        engine: `mlxkv` or `mlx-lm`.
        memory: mlxkv's limit, in bytes.
        rounds: how often every case is measured.
        cases: number, the prompts' token ids and the timed steps of each.
        adapters: of mlxkv, paths and weights.
    """

    engine: str
    path: str
    kv_type: str
    memory: int
    rounds: int
    cases: list[tuple[int, list[list[int]], int]]
    adapters: list[tuple[str, float]] = field(default_factory=list)


def work(job: Job, emit: Emit) -> None:
    """Load, warm up, measure; emit each result at once."""
    from mlxkv.base import device
    from mlxkv.bench.engines import load, measure

    emit(doing="loading")
    engine = load(job.engine, Path(job.path), job.kv_type, job.memory, job.adapters)
    emit(dtype=engine.dtype)
    failed = set[int]()

    def run(number: int, prompts: list[list[int]], n_timed: int, *, warm_up: bool) -> None:
        emit(doing="warming up" if warm_up else "measuring", case=number)
        try:
            timing = measure(engine, prompts, n_timed)
        except Exception as error:
            failed.add(number)
            emit(case=number, error=one_line(error), kind=type(error).__name__)
            return
        if not warm_up:
            emit(case=number, timing=asdict(timing))

    warmed = set[int]()
    for number, prompts, n_timed in job.cases:
        if device.on_cpu():
            if len(prompts) in warmed:
                continue
            warmed.add(len(prompts))
            n_prompt, n_steps = WARM_CPU
            prompts, n_timed = [p[:n_prompt] for p in prompts], min(n_timed, n_steps)
        run(number, prompts, n_timed, warm_up=True)
    for _ in range(job.rounds):
        for number, prompts, n_timed in job.cases:
            if number not in failed:
                run(number, prompts, n_timed, warm_up=False)


def main() -> None:
    """The process."""
    # The engines' output goes to stderr; only events go to stdout.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    code = 0
    try:
        work(Job(**json.load(sys.stdin)), emit)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the command has gone
        code = 1
    except Exception as error:
        exit_code = error.exit_code if isinstance(error, MlxkvError) else 1
        emit(failed=one_line(error), kind=type(error).__name__, exit_code=exit_code)
    sys.stderr.flush()
    # OpenBLAS' exit handler would hang if a step is in flight.
    os._exit(code)


if __name__ == "__main__":
    main()
