"""The one thread that touches MLX: models on demand, and many requests at a time.

Invariants:
- MLX is used on the engine's thread alone. Others hand it requests and calls, and wait.
- A model is loaded when it is asked for, step by step between the steps of those that answer.
  Requests for it wait. `model_pool` decides which models are here and what they may take.
- The thread survives whatever a request does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import mlx.core as mx

from mlxkv.base import device
from mlxkv.engine.messages import Ask, Busy, Embeddings, EngineStats, Loaded
from mlxkv.engine.model_pool import LoadedModel, ModelPool, key_of
from mlxkv.engine.prompt import prepare, start
from mlxkv.engine.tasks import Task
from mlxkv.errors import MlxkvError, UsageError
from mlxkv.generation.outputs import Chunk
from mlxkv.memory.types import without_trace
from mlxkv.store.settings import Given

_log = logging.getLogger(__name__)
T = TypeVar("T")

WAIT_S = 5.0
"""What a client is told to wait where the queue is full."""


class EngineAnswer:
    """The chunks of one answer, from the engine's thread to an event loop's; to be read once."""

    def __init__(self, wake: Callable[[], None]):
        self._items: deque[Chunk | BaseException | None] = deque()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None
        self._cancelled = False
        self._wake = wake

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the rest."""
        return self._cancelled

    def cancel(self) -> None:
        """End it within one step; also of an answer that has ended."""
        self._cancelled = True
        self._wake()

    def tell(self, item: Chunk | BaseException | None) -> None:
        """What comes next; None is the end."""
        with self._lock:
            self._items.append(item)
            loop, event = self._loop, self._event
        if loop is not None and event is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads
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
                        del item  # with its trace it would hold itself
                else:
                    return
        finally:
            self.cancel()


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request that pending for a model to be loaded.

    Args:
        on_ready: called with the model.
        on_error: called with the error where it cannot be loaded.
        is_cancelled: whether it is not wanted any more.
        keep_alive_s: see `Ask`.
    """

    on_ready: Callable[[LoadedModel], None]
    on_error: Callable[[Exception], None]
    is_cancelled: Callable[[], bool]
    keep_alive_s: float | None


@dataclass(slots=True)
class _Coming:
    """A model that is being loaded."""

    steps: Generator[bool | None, None, LoadedModel]
    pending: list[PendingRequest] = field(default_factory=list)


class Engine:
    """Loads models and answers requests, on a thread of its own.

    Args:
        memory: bytes for all models together; None for what the machine allows.
        dtype: what is computed in.
        given: settings of all models, see `settings`.
        keep_alive_s: how long a model stays after its last request; negative: for ever.
        max_queue: requests that may wait.
        max_running: requests of one model that decode at a time.
    """

    def __init__(
        self,
        *,
        memory: int | None = None,
        dtype: str = "auto",
        given: Given | None = None,
        keep_alive_s: float = 300.0,
        max_queue: int = 64,
        max_running: int = 16,
    ):
        limit_bytes = memory or device.memory_limit()
        self._pool = ModelPool(limit_bytes, dtype, given or Given(), keep_alive_s, max_running)
        self._coming: dict[str, _Coming] = {}
        self._max_queue = max_queue
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Ask, Task]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._rejected = 0
        self._closing = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="mlxkv engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End all requests, keep prefixes that are worth it, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._ended.wait()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread works."""
        return self._thread.is_alive() and not self._closing and not self._ended.is_set()

    def submit(self, ask: Ask) -> EngineAnswer:
        """Ask for an answer, from any thread.

        Raises:
            Busy: too many requests wait.
        """
        answer = EngineAnswer(self._wake)
        task = Task(ask.request, _logging(answer.tell), lambda: answer.is_cancelled, ask.owner)
        with self._changed:
            if self._n_waiting() >= self._max_queue:
                self._rejected += 1
                raise Busy(WAIT_S)
            if not self.alive:
                raise _stopped()
            self._inbox.append((ask, task))
            self._changed.notify()
        return answer

    async def load(self, model: str, keep_alive_s: float | None = None) -> Loaded:
        """Have a model in memory; errors as for `mlxkv.load`."""
        return await self._with_model(model, keep_alive_s, lambda loaded: loaded.described())

    async def unload(self, model: str) -> bool:
        """Give a model's memory back; whether it was there, or coming."""

        def unload() -> bool:
            key = key_of(model)
            if key in self._coming:
                self._give_up(key, MlxkvError("the model was unloaded"))
                return True
            there = self._pool.find(key) is not None
            if there:
                self._pool.drop(key)
            return there

        return await self._call(unload)

    async def tokenize(self, ask: Ask) -> list[int]:
        """The token ids of a prompt as the model would get them."""

        def tokenize(loaded: LoadedModel) -> list[int]:
            runtime = loaded.scheduler.runtime
            prepared = prepare(runtime, ask.request)
            return start(runtime, ask.request, prepared, runtime.session()).sequence

        return await self._with_model(ask.model, ask.keep_alive_s, tokenize)

    async def embed(self, model: str, texts: Sequence[str]) -> Embeddings:
        """Raises UsageError: the families that mlxkv runs are made to generate."""
        raise UsageError(
            f"{model} is made to generate text and gives no meaningful embeddings: use a model "
            "that was trained for them"
        )

    def names(self) -> set[str]:
        """How requests named the models in memory."""
        return {loaded.name for loaded in self._pool.models()}

    def loaded(self) -> list[Loaded]:
        """The models in memory."""
        return [loaded.described() for loaded in self._pool.models()]

    def stats(self) -> EngineStats:
        """What the engine does and has done."""
        models = self._pool.models()
        budgets = [model.scheduler.runtime.budget for model in models]
        uses = [budget.use() for budget in budgets]
        return EngineStats(
            running=sum(model.scheduler.n_sequences for model in models),
            queued=self._n_waiting(),
            rejected=self._rejected,
            models={model.name: model.scheduler.counts.copy() for model in models},
            memory={
                "weights": sum(budget.weights_bytes for budget in budgets),
                "kv_used": sum(use.used_bytes for use in uses),
                "kv_allocated": sum(use.allocated_bytes for use in uses),
                "pages": sum(budget.pages_bytes for budget in budgets),
                "active": mx.get_active_memory(),
                "cached": mx.get_cache_memory(),
                "peak": mx.get_peak_memory(),
                "limit": self._pool.limit_bytes,
            },
        )

    def _n_waiting(self) -> int:
        waiting = [len(loaded.scheduler.waiting) for loaded in self._pool.models()]
        coming = [len(coming.pending) for coming in list(self._coming.values())]
        return len(self._inbox) + sum(waiting) + sum(coming)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    async def _call(self, function: Callable[[], T]) -> T:
        """Run something on the engine's thread, between two steps."""
        future: Future[T] = Future()
        return await self._hear(future, lambda: _settle(future, function))

    async def _with_model(
        self, model: str, keep_alive_s: float | None, function: Callable[[LoadedModel], T]
    ) -> T:
        """The same with a model, as soon as it is in memory."""
        future: Future[T] = Future()
        is_gone = threading.Event()

        def then(loaded: LoadedModel) -> None:
            _settle(future, lambda: function(loaded))

        pending = PendingRequest(then, future.set_exception, is_gone.is_set, keep_alive_s)
        try:
            return await self._hear(future, lambda: self._await_model(model, pending))
        finally:
            is_gone.set()

    async def _hear(self, future: Future[T], call: Callable[[], None]) -> T:
        """What a call on the engine's thread says through its future."""

        def run() -> None:
            # Whoever asked may have gone; from here on it cannot be cancelled.
            if not future.set_running_or_notify_cancel():
                return
            if self._closing:
                future.set_exception(_stopped())
                return
            call()

        with self._changed:
            if not self.alive:
                raise _stopped()
            self._calls.append(run)
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def _live(self) -> None:
        try:
            self._run()
        finally:
            self._ended.set()
        # A thread that used MLX must not end while the interpreter does: MLX's thread-local
        # destructors, which run after `join`, take the GIL then, and the process is aborted
        # (MLX 0.32, Python 3.11). So it waits for the end of the process.
        threading.Event().wait()

    def _run(self) -> None:
        unwire = device.hold_wired(self._pool.limit_bytes)
        try:
            while not self._closing:
                self._turn()
        finally:
            with self._changed:
                self._closing = True
                calls, tasks = list(self._calls), list(self._inbox)
            for call in calls:
                call()
            for _, task in tasks:
                task.tell(_stopped())
            for key in list(self._coming):
                self._give_up(key, _stopped())
            for key in self._pool:
                self._pool.drop(key)
            unwire()

    def _turn(self) -> None:
        """What is to be done now, or a wait for it."""
        with self._changed:
            if not (self._is_busy() or self._coming or self._has_news()):
                self._changed.wait(self._pool.until_next_expiry_s())
            calls, tasks = list(self._calls), list(self._inbox)
            self._calls.clear()
            self._inbox.clear()
        for call in calls:
            call()
        for ask, task in tasks:
            self._hand_over(ask, task)
        had_work = self._is_busy() or bool(self._coming)
        self._load()
        self._pool.share_memory()
        for key in self._pool:
            self._step(key)
        self._pool.expire()
        if had_work and not (self._is_busy() or self._coming):
            mx.clear_cache()  # nothing is computed that would want it again soon
            device.trim()

    def _is_busy(self) -> bool:
        """Whether anything is being answered."""
        return any(not loaded.scheduler.is_idle for loaded in self._pool.models())

    def _has_news(self) -> bool:
        """Whether anything was asked for since the last turn."""
        return bool(self._inbox or self._calls or self._closing)

    def _step(self, key: str) -> None:
        loaded = self._pool.find(key)
        if loaded is None or loaded.scheduler.is_idle:
            return
        loaded.touch()
        try:
            loaded.scheduler.step()
            return
        except Exception as error:  # not one request's: the model starts over
            _log.exception("the model %s failed and is unloaded", loaded.name)
            for task in list(loaded.scheduler.tasks()):
                task.tell(MlxkvError(f"the model failed: {error}"))
        del loaded
        self._pool.drop(key)

    def _hand_over(self, ask: Ask, task: Task) -> None:
        if task.is_cancelled():
            return task.tell(None)
        pending = PendingRequest(
            lambda loaded: loaded.scheduler.add(task),
            task.tell,
            task.is_cancelled,
            ask.keep_alive_s,
        )
        return self._await_model(ask.model, pending)

    def _await_model(self, model: str, pending: PendingRequest) -> None:
        """Hand a model over now, or when it is loaded."""
        try:
            key = key_of(model)
            loaded = self._pool.find(key)
        except Exception as error:  # one request's, whatever it is
            return pending.on_error(error)
        if loaded is not None:
            loaded.touch(pending.keep_alive_s)
            return pending.on_ready(loaded)
        if key not in self._coming:
            self._coming[key] = _Coming(self._pool.loading(model))
        self._coming[key].pending.append(pending)
        return None

    def _load(self) -> None:
        """Go on with the model that was asked for first: one step, or all while nobody pending."""
        while (first := self._first_coming()) is not None:
            key, coming = first
            try:
                if next(coming.steps):  # for others to make room; who has it comes first
                    self._coming[key] = self._coming.pop(key)
            except StopIteration as stop:
                del self._coming[key]
                for pending in coming.pending:
                    stop.value.touch(pending.keep_alive_s)
                    pending.on_ready(stop.value)
                return
            except Exception as error:  # of those who asked for it, whatever it is
                self._give_up(key, without_trace(error))
            if self._is_busy() or self._has_news():
                return

    def _first_coming(self) -> tuple[str, _Coming] | None:
        """The model to go on with; who does not wait any more is forgotten."""
        for key, coming in list(self._coming.items()):
            coming.pending = [pending for pending in coming.pending if not pending.is_cancelled()]
            if not coming.pending:
                self._give_up(key, MlxkvError("no request waits for the model"))
        return next(iter(self._coming.items()), None)

    def _give_up(self, key: str, error: Exception) -> None:
        """Load a model no further; those who wait for it are told why."""
        coming = self._coming.pop(key)
        coming.steps.close()
        for pending in coming.pending:
            pending.on_error(error)
        self._pool.give_back()


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    """Have a future say what a function returns or raises."""
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _logging(
    tell: Callable[[Chunk | BaseException | None], None],
) -> Callable[[Chunk | BaseException | None], None]:
    """Write errors that are not a request's own into the log, and keep nothing alive of them."""

    def logged(item: Chunk | BaseException | None) -> None:
        if isinstance(item, BaseException):
            if not isinstance(item, MlxkvError):
                _log.error("a request failed", exc_info=item)
            item = without_trace(item)
        tell(item)

    return logged


def _stopped() -> MlxkvError:
    return MlxkvError("the engine has stopped")
