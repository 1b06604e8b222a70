"""An engine with its thread, as a server has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlxkv.engine.engine import ThreadedEngine


@contextmanager
def running(**options: Any) -> Iterator[ThreadedEngine]:
    """One that computes in float32, started, and closed at the end."""
    made = ThreadedEngine(dtype="float32", **options)
    made.start()
    try:
        yield made
    finally:
        made.close()
