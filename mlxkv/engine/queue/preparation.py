"""Prompts that are rendered and encoded beside the engine's thread: long ones, and with media.

Invariants:
- Nothing here uses MLX.
- At most `MAX_THREADS` prompts are prepared at a time. A scheduler hands over at most
  `MAX_PREPARED` of its requests, so that few prepared prompts wait for a place.
- A preparation whose request was cancelled ends at the next piece, see `chat.interrupt`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from mlxkv.chat.interrupt import Interrupted, interruptible
from mlxkv.errors import MlxkvError, contained
from mlxkv.generation.request import Request
from mlxkv.media.parts import has_media

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

LONG = 16_384
"""Characters and values of a prompt from which on it is prepared here; a shorter one takes a few
milliseconds."""
MAX_THREADS = 2
MAX_PREPARED = 4


class Preparation:
    """The result of `function`, computed on another thread.

    Args:
        function: what is computed.
        is_cancelled: whether the request was cancelled.
    """

    def __init__(self, function: Callable[[], Any], is_cancelled: Callable[[], bool]):
        self._function: Callable[[], Any] | None = function
        self._is_cancelled = is_cancelled
        self._stopped = threading.Event()
        self._future: Future[Any] = Future()

    @property
    def done(self) -> bool:
        """Whether `result` returns at once."""
        return self._future.done()

    def result(self) -> Any:
        """What the function returned; raises what it raised."""
        return self._future.result()

    async def awaited(self) -> Any:
        """`result`, for an event loop."""
        import asyncio

        return await asyncio.wrap_future(self._future)

    def stop(self) -> None:
        """The result is not needed: end soon."""
        self._stopped.set()

    def refuse(self) -> None:
        """End it with an error before it has begun."""
        if self._future.set_running_or_notify_cancel():
            self._future.set_exception(_stopped())

    def run(self) -> None:
        """Compute it."""
        if not self._future.set_running_or_notify_cancel():
            return
        function, self._function = self._function, None
        assert function is not None
        try:
            with interruptible(self._is_unwanted):
                self._future.set_result(function())
        except Interrupted:
            self._future.set_exception(_stopped())
        except BaseException as error:  # also a panic of the tokenizer's library
            self._future.set_exception(contained(error))

    def _is_unwanted(self) -> bool:
        return self._stopped.is_set() or self._is_cancelled()


class Preparer:
    """The threads that prepare prompts; started when they are needed.

    Args:
        wake: called when a prompt is prepared.
    """

    def __init__(self, wake: Callable[[], None]):
        self._wake = wake
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._begun: WeakSet[Preparation] = WeakSet()
        self._is_closed = False

    def start(self, function: Callable[[], Any], is_cancelled: Callable[[], bool]) -> Preparation:
        """Begin to compute what `function` returns; arguments as for `Preparation`.

        Raises:
            MlxkvError: it is closed.
        """
        from concurrent.futures import ThreadPoolExecutor

        preparation = Preparation(function, is_cancelled)

        def run() -> None:
            preparation.run()
            self._wake()

        with self._lock:
            if self._is_closed:
                raise _stopped()
            if self._threads is None:
                self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="mlxkv prompt")
            begun = self._threads.submit(run)
            self._begun.add(preparation)
        begun.add_done_callback(lambda begun: preparation.refuse() if begun.cancelled() else None)
        return preparation

    async def awaited(self, function: Callable[[], Any]) -> Any:
        """What `function` returns, for an event loop; a coroutine that is cancelled ends it."""
        preparation = self.start(function, lambda: False)
        try:
            return await preparation.awaited()
        finally:
            preparation.stop()

    def close(self) -> None:
        """End the threads; what has begun ends with an error at the next piece."""
        with self._lock:
            self._is_closed = True
            for preparation in self._begun:
                preparation.stop()
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)


def takes_long(request: Request) -> bool:
    """Whether preparing a prompt may take long: it is, or has media to decode."""
    return is_long(request) or has_media(request.prompt)


def is_long(request: Request, limit: int = LONG) -> bool:
    """Whether a prompt has `limit` characters and values; the bytes of media are none."""
    left = limit
    values: list[Any] = [request.prompt, request.tools, request.template_options]
    values.append(request.stop)
    values += () if request.saved is None else (request.saved.messages,)
    while values and left > 0:
        value = values.pop()
        left -= 1
        if isinstance(value, str):
            left -= len(value)
        elif isinstance(value, Mapping):
            values += [item for pair in islice(value.items(), limit) for item in pair]
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            values += value[:limit]
    return left <= 0


def _stopped() -> MlxkvError:
    return MlxkvError("the engine has stopped")
