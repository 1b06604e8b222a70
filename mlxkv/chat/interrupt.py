"""Long work on text that can be ended between two pieces.

Rendering and encoding a prompt may take seconds. The thread that does it names a check; the work
calls `check_point` between pieces of a bounded size, and ends with what the check raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


class Interrupted(Exception):
    """The result of the work is not wanted any more."""


@contextmanager
def interruptible(is_unwanted: Callable[[], bool]) -> Iterator[None]:
    """Within it, `check_point` raises `Interrupted` once `is_unwanted` returns True."""

    def check() -> None:
        if is_unwanted():
            raise Interrupted

    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def check_point() -> None:
    """End here if this thread's work is not wanted any more."""
    check = _check.get()
    if check is not None:
        check()
