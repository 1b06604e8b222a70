"""The one thread that touches MLX: models on demand, and many requests at a time.

Invariants:
- MLX is used on the engine's thread alone. Others hand it requests and calls, and wait.
- A model is loaded when it is asked for, step by step between the steps of those that answer.
  Requests for it wait. `model_pool` decides which models are here and what they may take.
- The thread survives every error of a request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from mlxkv.base import device
from mlxkv.engine.answers import EngineAnswer
from mlxkv.engine.loading import ModelLoads, PendingRequest
from mlxkv.engine.messages import Ask, Busy, Embeddings, EngineStats, Loaded
from mlxkv.engine.model_pool import LoadedModel, ModelPool, key_of
from mlxkv.engine.prompt import fit_context, prepare
from mlxkv.engine.tasks import Task
from mlxkv.errors import MlxkvError, UsageError
from mlxkv.store.settings import Given

_log = logging.getLogger(__name__)
T = TypeVar("T")

WAIT_S = 5.0
"""When a client may try again if the queue is full."""


class ThreadedEngine:
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
        self._loads = ModelLoads(self._pool)
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
        task = Task(ask.request, answer.tell, lambda: answer.is_cancelled, ask.owner)
        with self._changed:
            if self._n_waiting() >= self._max_queue:
                self._rejected += 1
                raise Busy(WAIT_S)
            if not self.alive:
                raise _stopped()
            self._inbox.append((ask, task))
            self._changed.notify()
        return answer

    async def load(
        self, model: str, keep_alive_s: float | None = None, path: Path | None = None
    ) -> Path:
        """Have a model in memory, and say its directory; errors as for `mlxkv.load`."""

        def directory(loaded: LoadedModel) -> Path:
            return loaded.scheduler.runtime.path

        return await self._with_model(model, path, keep_alive_s, directory)

    async def unload(self, model: str, path: Path | None = None) -> bool:
        """Give a model's memory back; whether it was loaded, or being loaded."""

        def unload() -> bool:
            key = key_of(model, path)
            if self._loads.cancel(key, MlxkvError("the model was unloaded")):
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
            _, tokens = fit_context(runtime, ask.request, prepare(runtime, ask.request))
            return tokens

        return await self._with_model(ask.model, ask.path, ask.keep_alive_s, tokenize)

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
        return len(self._inbox) + sum(waiting) + self._loads.n_pending

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    async def _call(self, function: Callable[[], T]) -> T:
        """Run something on the engine's thread, between two steps."""
        future: Future[T] = Future()
        return await self._result(future, lambda: _settle(future, function))

    async def _with_model(
        self,
        model: str,
        path: Path | None,
        keep_alive_s: float | None,
        function: Callable[[LoadedModel], T],
    ) -> T:
        """The same with a model, as soon as it is in memory."""
        future: Future[T] = Future()
        cancelled = threading.Event()

        def on_ready(loaded: LoadedModel) -> None:
            _settle(future, lambda: function(loaded))

        pending = PendingRequest(on_ready, future.set_exception, cancelled.is_set, keep_alive_s)
        try:
            return await self._result(future, lambda: self._loads.request(model, path, pending))
        finally:
            cancelled.set()

    async def _result(self, future: Future[T], call: Callable[[], None]) -> T:
        """The result that a call on the engine's thread gives its future."""

        def run() -> None:
            # The caller may have cancelled it; from here on that is not possible.
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
            self._loads.cancel_all(_stopped())
            for key in self._pool:
                self._pool.drop(key)
            unwire()

    def _turn(self) -> None:
        """Do what is due, or wait for it."""
        with self._changed:
            if not (self._is_busy() or self._loads or self._has_news()):
                self._changed.wait(self._pool.until_next_expiry_s())
            calls, tasks = list(self._calls), list(self._inbox)
            self._calls.clear()
            self._inbox.clear()
        for call in calls:
            call()
        for ask, task in tasks:
            self._hand_over(ask, task)
        had_work = self._is_busy() or bool(self._loads)
        self._loads.proceed(lambda: self._is_busy() or self._has_news())
        self._pool.share_memory()
        for key in self._pool:
            self._step(key)
        self._pool.expire()
        if had_work and not (self._is_busy() or self._loads):
            mx.clear_cache()  # no computation will need it soon
            device.trim()

    def _is_busy(self) -> bool:
        """Whether a request is being answered."""
        return any(not loaded.scheduler.is_idle for loaded in self._pool.models())

    def _has_news(self) -> bool:
        """Whether requests or calls came since the last turn."""
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
        return self._loads.request(ask.model, ask.path, pending)


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    """Give a future the result or the error of a function."""
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _stopped() -> MlxkvError:
    return MlxkvError("the engine has stopped")
