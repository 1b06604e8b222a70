"""The server's log: a line for each kind of event and minute, and no API key in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

PERIOD_S = 60.0
_LINES = 10
_MOST_KINDS = 1000
_ONE_LINE = (
    "uvicorn",
    "asyncio",
    "mlxkv.server.edge.bodies",
    "mlxkv.server.edge.connections",
    "mlxkv.server.edge.serving",
)
"""Loggers whose records clients can cause at will: one of a kind tells all."""


class OncePerMinute(logging.Filter):
    """Lets pass one record of a kind and minute; ten of kinds that name something.

    A kind is the place in the code, and the class of the exception. The next record that passes
    says how many did not.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[0] if record.exc_info else None
        kind = (record.name, record.pathname, record.lineno, error)
        most = 1 if error is not None or record.name.startswith(_ONE_LINE) else _LINES
        now = self._clock()
        since, n = self._seen.get(kind, (now, 0))
        if now - since < PERIOD_S:
            self._seen[kind] = since, n + 1
            passes, left_out = n < most, 0
        else:
            self._seen.pop(kind)
            self._seen[kind] = now, 1
            passes, left_out = True, n - most
        if len(self._seen) > _MOST_KINDS:
            self._seen.pop(next(iter(self._seen)))
        if left_out > 0:
            record.msg = f"{record.getMessage()} (and {left_out:,} times more)"
            record.args = None
        return passes


class WithoutKeys(logging.Formatter):
    """Formats records, tracebacks included, with stars in the place of API keys."""

    def __init__(self, keys: Callable[[], Iterable[str]]):
        super().__init__("mlxkv: %(message)s")
        self._keys = keys

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for key in sorted(self._keys(), key=len, reverse=True):
            text = text.replace(key, "***")
        return text


def log_to_stderr(keys: Callable[[], Iterable[str]]) -> None:
    """Write warnings of all loggers to stderr.

    Args:
        keys: the API keys at this moment.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(WithoutKeys(keys))
    handler.addFilter(OncePerMinute())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
