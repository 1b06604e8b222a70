"""Answers on the thread that asks: the scheduler, run with the requests of one caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from mlxkv.engine.runtime import Runtime
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk

_Told = deque[tuple[int, Chunk | BaseException | None]]


def stream(runtime: Runtime, generation: Generation) -> Iterator[Chunk]:
    """The chunks of one answer; its session keeps its KV when the answer has ended.

    Raises:
        KVCacheFull: there is no room for its prompt.
        CheckpointError: the model's logits are not numbers.
    """
    return (chunk for _, chunk in run(runtime, [generation], keep_sessions=True))


def run(
    runtime: Runtime, generations: Sequence[Generation], *, keep_sessions: bool
) -> Iterator[tuple[int, Chunk]]:
    """Run answers as one batch.

    Args:
        runtime: the model.
        generations: the answers, prepared; each with a session of its own.
        keep_sessions: whether sessions keep their KV when their answers have ended.

    Yields:
        (which answer, its next chunk), as they come.

    Raises:
        As `stream`; the other answers end with it.
    """
    mx.reset_peak_memory()
    scheduler, told = Scheduler(runtime, len(generations)), _Told()
    for i, generation in enumerate(generations):
        scheduler.add(
            Task(
                generation.request,
                _teller(told, i),
                lambda: False,
                generation=generation,
                keeps_session=keep_sessions,
            )
        )
    try:
        while not scheduler.is_idle:
            scheduler.step()
            while told:
                i, item = told.popleft()
                if isinstance(item, BaseException):
                    raise item
                if item is not None:
                    yield i, item
    finally:
        # Also of answers that were left early: what was computed is worth as much.
        scheduler.stop()


def _teller(told: _Told, i: int) -> Callable[[Chunk | BaseException | None], None]:
    return lambda item: told.append((i, item))
