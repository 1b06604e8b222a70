"""Runs the scheduler for one caller's requests, on the caller's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlxkv.engine.runtime import Runtime
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Task
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk


def stream(runtime: Runtime, generation: Generation) -> Iterator[Chunk]:
    """Yield the chunks of one answer; its session keeps its KV afterwards.

    Raises:
        KVCacheFull: no room for the prompt.
        CheckpointError: the model's logits are not numbers.
    """
    return (chunk for _, chunk in run(runtime, [generation], keep_sessions=True))


def run(
    runtime: Runtime, generations: Sequence[Generation], *, keep_sessions: bool
) -> Iterator[tuple[int, Chunk]]:
    """Run answers as one batch.

    Args:
        runtime: the model.
        generations: one per answer, each with its own session.
        keep_sessions: whether sessions keep their KV after their answers.

    Yields:
        (index of the answer, its next chunk).

    Raises:
        As `stream`; an error ends all answers.
    """
    mx.reset_peak_memory()
    scheduler = Scheduler(runtime, len(generations))
    items: deque[tuple[int, Chunk | BaseException | None]] = deque()

    def add(i: int, generation: Generation) -> None:
        task = Task(
            generation.request,
            lambda item: items.append((i, item)),
            lambda: False,
            generation=generation,
            keeps_session=keep_sessions,
        )
        scheduler.add(task)

    for i, generation in enumerate(generations):
        add(i, generation)
    try:
        while not scheduler.is_idle:
            runtime.share_memory()
            scheduler.step()
            while items:
                i, item = items.popleft()
                if isinstance(item, BaseException):
                    raise item
                if item is not None:
                    yield i, item
    finally:
        # If the caller stops early, too: this keeps the prefixes.
        scheduler.stop()
