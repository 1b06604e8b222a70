"""A command starts, and a model loads, without the collector of garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collecting_later() -> Iterator[None]:
    """Collect nothing inside, and never look again at what is alive at the end.

    Modules and weights stay as long as the process. Looking through them takes 30 ms of a start,
    and some of every full collection after it.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()
