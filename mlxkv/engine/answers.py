"""Carries answers from the engine's thread to an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from mlxkv.base.faults import told
from mlxkv.engine.messages import Ask
from mlxkv.engine.tasks import Task
from mlxkv.errors import MlxkvError, contained
from mlxkv.generation.outputs import Chunk
from mlxkv.memory.types import without_trace

T = TypeVar("T")
WAIT_S = 5.0
"""When a client may retry after the queue was full."""


class EngineAnswer:
    """The chunks of one answer, read once; see `messages.Answer`.

    Args:
        wake: wakes the engine's thread after the answer is cancelled.
        is_leaving: whether the engine puts its answers away: none is cancelled by then.
    """

    def __init__(self, wake: Callable[[], None], is_leaving: Callable[[], bool] = lambda: False):
        self._items: deque[Chunk | BaseException | None] = deque()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None
        self._cancelled = False
        self._wake, self._is_leaving = wake, is_leaving

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """End the answer within one step; does nothing once it has ended."""
        self._cancelled = self._cancelled or not self._is_leaving()
        self._wake()

    def tell(self, item: Chunk | BaseException | None) -> None:
        """Append a chunk, or the end: None, or an error. Faults are logged."""
        if isinstance(item, BaseException):
            item = without_trace(told(item))
        with self._lock:
            self._items.append(item)
            loop, event = self._loop, self._event
        if loop is not None and event is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the reader is gone
                loop.call_soon_threadsafe(event.set)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        with self._lock:
            self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        try:
            while True:
                with self._lock:
                    self._event.clear()
                    item = self._items.popleft() if self._items else self
                if item is self:
                    await self._event.wait()
                elif isinstance(item, Chunk):
                    yield item
                elif isinstance(item, BaseException):
                    try:
                        raise item
                    finally:
                        del item  # breaks the reference cycle of an error and its trace
                else:
                    return
        finally:
            self.cancel()


def task_of(ask: Ask, answer: EngineAnswer) -> Task:
    """A request for a scheduler, which tells the answer."""
    return Task(
        ask.request,
        answer.tell,
        lambda: answer.is_cancelled,
        ask.owner,
        client=ask.client,
        label=ask.label,
        note=ask.note,
        durable=ask.durable,
    )


def waited(future: Future[T], ended: threading.Event) -> T | None:
    """A future's result; None if the thread that completes it ends first."""
    while not (future.done() or ended.is_set()):
        wait([future], timeout=0.1)
    return future.result() if future.done() else None


def stopped() -> MlxkvError:
    """What requests to an engine that has ended are told."""
    return MlxkvError("the engine has stopped")


def settle(future: Future[T], function: Callable[[], T]) -> None:
    """Complete a future with a function's result or error."""
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(contained(error))
