"""How often the engine's loop may fail and start again."""

from __future__ import annotations

import time
from collections import deque

from mlxkv.base.faults import log_fault
from mlxkv.errors import MlxkvError

MAX_DEATHS = 5
"""Failures within `WINDOW_S` after which the engine gives up."""
WINDOW_S = 60.0


class Restarted(MlxkvError):
    """The engine started again while it had the request."""

    status = 503

    def __init__(self) -> None:
        super().__init__("the engine failed and has started again: send the request once more")


class Deaths:
    """Counts failures of the loop.

    Attributes:
        n: failures so far.
        are_too_many: whether the engine gives up.
    """

    def __init__(self) -> None:
        self.n = 0
        self.are_too_many = False
        self._times: deque[float] = deque(maxlen=MAX_DEATHS)

    def give_up(self, error: Exception) -> None:
        """Log and count a failure after which nothing can start again."""
        self.n += 1
        self.are_too_many = True
        log_fault("the engine has failed for good", error)

    def count(self, error: Exception) -> bool:
        """Log and count a failure; whether the loop may start again."""
        self.n += 1
        self._times.append(time.monotonic())
        full = len(self._times) == MAX_DEATHS
        self.are_too_many = full and self._times[-1] - self._times[0] < WINDOW_S
        then = "has failed for good" if self.are_too_many else "failed and starts again"
        log_fault(f"the engine {then}", error)
        return not self.are_too_many
