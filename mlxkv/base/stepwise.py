"""Work that is done step by step: a generator that pauses between two steps and returns a result.

A caller with other work in between drives the generator itself; `finished` is for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

Step = TypeVar("Step")
Result = TypeVar("Result")


def finished(
    steps: Generator[Step, None, Result], on_step: Callable[[Step], None] | None = None
) -> Result:
    """The result when all steps are done.

    Args:
        steps: the work.
        on_step: called with what each step yields.
    """
    while True:
        try:
            step = next(steps)
        except StopIteration as stop:
            return stop.value
        if on_step is not None:
            on_step(step)
