"""Work in steps: a generator that yields after each step and returns a result.

A caller that has other work between steps drives the generator itself; others call `finished`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

Step = TypeVar("Step")
Result = TypeVar("Result")


def finished(
    steps: Generator[Step, None, Result], on_step: Callable[[Step], None] | None = None
) -> Result:
    """Run all steps and return the result; call `on_step` with what each one yields."""
    while True:
        try:
            step = next(steps)
        except StopIteration as stop:
            return stop.value
        if on_step is not None:
            on_step(step)
