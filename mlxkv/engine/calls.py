"""Functions that other threads have the engine's thread run, between two steps."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mlxkv.engine.answers import settle, stopped

T = TypeVar("T")


class Calls:
    """The functions that wait; see the module.

    Args:
        changed: guards them, and wakes the engine's thread.
        is_alive: whether that thread runs.
        is_closing: whether it ends.
    """

    def __init__(
        self,
        changed: threading.Condition,
        is_alive: Callable[[], bool],
        is_closing: Callable[[], bool],
    ):
        self._changed, self._is_alive, self._is_closing = changed, is_alive, is_closing
        self._waiting: deque[Callable[[], None]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def taken(self) -> list[Callable[[], None]]:
        """Those that wait, which do so no longer; on the engine's thread."""
        found = list(self._waiting)
        self._waiting.clear()
        return found

    def add(self, function: Callable[[], None]) -> None:
        """Have a function run, if the thread still does."""
        with self._changed:
            self._waiting.append(function)
            self._changed.notify()

    async def run(self, function: Callable[[], T]) -> T:
        """What a function returns that runs on the engine's thread."""
        future: Future[T] = Future()
        return await self.result(future, lambda: settle(future, function))

    async def result(self, future: Future[T], call: Callable[[], None]) -> T:
        """Run `call` on the engine's thread, and await the future that it completes."""

        def run() -> None:
            # Unless the caller has cancelled the future: from here on it cannot.
            if not future.set_running_or_notify_cancel():
                return
            if self._is_closing():
                future.set_exception(stopped())
                return
            call()

        with self._changed:
            if not self._is_alive():
                raise stopped()
            self._waiting.append(run)
            self._changed.notify()
        return await asyncio.wrap_future(future)
