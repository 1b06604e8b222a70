"""The one thread that uses MLX: loads models on demand, and answers many requests at a time.

Invariants:
- Only the engine's thread uses MLX. Other threads hand it requests and calls, and wait.
- The first request for a model loads it, step by step between the steps of running answers; other
  requests for it wait. `model_pool` decides which models are in memory, and their limits.
- The thread survives every error of a request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from mlxkv.base import device
from mlxkv.engine.answers import EngineAnswer
from mlxkv.engine.clients import merge_counts
from mlxkv.engine.loading import ModelLoads, PendingRequest
from mlxkv.engine.messages import Ask, Busy, Embeddings, EngineStats, Loaded
from mlxkv.engine.model_pool import LoadedModel, ModelPool, key_of
from mlxkv.engine.next_turn import NextTurns
from mlxkv.engine.prompt import fit_context, prepare
from mlxkv.engine.tasks import Task
from mlxkv.errors import MlxkvError, UsageError
from mlxkv.store.settings import Given

_log = logging.getLogger(__name__)
T = TypeVar("T")

WAIT_S = 5.0
"""When a client may retry after the queue was full."""
QUIET_S = 0.1
"""How long there are no requests before next turns are computed: a tool may answer at once."""


class ThreadedEngine:
    """Loads models and answers requests, on a thread of its own.

    Args:
        memory: bytes for all models together; None for what the machine allows.
        dtype: dtype to compute in.
        given: settings of all models, see `store.settings`.
        keep_alive_s: how long a model stays after its last request; negative: for ever.
        max_queue: requests that may wait.
        max_running: requests of one model that decode at a time.
        next_turns: compute what is known of next turns while there are no requests.
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
        next_turns: bool = True,
    ):
        limit_bytes = memory or device.memory_limit()
        self._pool = ModelPool(
            limit_bytes, dtype, given or Given(), keep_alive_s, max_running, next_turns
        )
        self._busy_at = 0.0
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
        """End all requests, write prefixes to disk, and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._ended.wait()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._closing and not self._ended.is_set()

    def submit(self, ask: Ask) -> EngineAnswer:
        """Queue a request, from any thread.

        Raises:
            Busy: the queue is full.
        """
        answer = EngineAnswer(self._wake)
        task = Task(
            ask.request,
            answer.tell,
            lambda: answer.is_cancelled,
            ask.owner,
            client=ask.client,
        )
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
        """Load a model, and return its directory; raises as `mlxkv.load`."""
        return await self._with_model(
            model, path, keep_alive_s, lambda loaded: loaded.scheduler.runtime.path
        )

    async def unload(self, model: str, path: Path | None = None) -> bool:
        """Unload a model, and return whether it was loaded or being loaded."""

        def unload() -> bool:
            key = key_of(model, path)
            if self._loads.cancel(key, MlxkvError("the model was unloaded")):
                return True
            if is_loaded := self._pool.find(key) is not None:
                self._pool.drop(key)
            return is_loaded

        return await self._call(unload)

    async def tokenize(self, ask: Ask) -> list[int]:
        """The token ids of a request's prompt."""

        def tokenize(loaded: LoadedModel) -> list[int]:
            runtime = loaded.scheduler.runtime
            prepared = prepare(runtime, ask.request, ask.owner)
            _, tokens = fit_context(runtime, ask.request, prepared)
            return tokens

        return await self._with_model(ask.model, ask.path, ask.keep_alive_s, tokenize)

    async def embed(self, model: str, texts: Sequence[str]) -> Embeddings:
        """Raises UsageError: mlxkv runs no families that are trained for embeddings."""
        raise UsageError(
            f"{model} generates text and has no meaningful embeddings: mlxkv supports no embedding "
            "models"
        )

    def names(self) -> set[str]:
        """The names of the models in memory."""
        return {loaded.name for loaded in self._pool.models()}

    def loaded(self) -> list[Loaded]:
        """The models in memory."""
        return [loaded.describe() for loaded in self._pool.models()]

    def stats(self) -> EngineStats:
        """The engine's metrics."""
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
            clients=merge_counts(x for model in models for x in model.scheduler.clients.figures()),
        )

    def _n_waiting(self) -> int:
        waiting = [len(loaded.scheduler.waiting) for loaded in self._pool.models()]
        return len(self._inbox) + sum(waiting) + self._loads.n_pending

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    async def _call(self, function: Callable[[], T]) -> T:
        """Run a function on the engine's thread, between two steps."""
        future: Future[T] = Future()
        return await self._result(future, lambda: _settle(future, function))

    async def _with_model(
        self,
        model: str,
        path: Path | None,
        keep_alive_s: float | None,
        function: Callable[[LoadedModel], T],
    ) -> T:
        """`_call` with a model, as soon as it is in memory."""
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
        """Run `call` on the engine's thread, and await the future that it completes."""

        def run() -> None:
            # Unless the caller has cancelled the future: from here on it cannot.
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
        # A thread that used MLX must not end while the interpreter exits: MLX's thread-local
        # destructors, which run after `join`, then take the GIL and abort the process (MLX 0.32,
        # Python 3.11). So it sleeps until the process ends.
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
        """Run one turn of the loop; sleep first if there is nothing to do."""
        with self._changed:
            if not (self._has_requests() or self._has_news()):
                self._changed.wait(self._sleep_s())
            calls, tasks = list(self._calls), list(self._inbox)
            self._calls.clear()
            self._inbox.clear()
        for call in calls:
            call()
        for ask, task in tasks:
            self._hand_over(ask, task)
        had_work = self._has_requests() or self._next_turns() is not None
        if self._has_requests():
            self._busy_at = time.monotonic()
            for loaded in self._pool.models():
                loaded.scheduler.next_turns.pause()
        self._loads.proceed(lambda: self._is_busy() or self._has_news())
        self._pool.share_memory()
        for key in self._pool:
            self._step(key)
        self._pool.expire()
        if self._has_requests():
            return
        if (turns := self._next_turns()) is not None and self._sleep_s() == 0:
            if not self._has_news():
                turns.step()
        elif had_work:
            mx.clear_cache()
            device.trim()

    def _has_requests(self) -> bool:
        """Whether any model has requests, or is being loaded for one."""
        return self._is_busy() or bool(self._loads)

    def _next_turns(self) -> NextTurns | None:
        """Next turns to compute, of one model."""
        found = [loaded.scheduler.next_turns for loaded in self._pool.models()]
        return next((turns for turns in found if not turns.is_empty), None)

    def _sleep_s(self) -> float | None:
        """How long nothing is to be done unless a request comes; None: for ever."""
        end = self._pool.until_next_expiry_s()
        if self._next_turns() is None:
            return end
        quiet = max(0.0, self._busy_at + QUIET_S - time.monotonic())
        return quiet if end is None else min(quiet, end)

    def _is_busy(self) -> bool:
        """Whether any model has requests."""
        return any(not loaded.scheduler.is_idle for loaded in self._pool.models())

    def _has_news(self) -> bool:
        """Whether there are new requests or calls."""
        return bool(self._inbox or self._calls or self._closing)

    def _step(self, key: str) -> None:
        loaded = self._pool.find(key)
        if loaded is None or loaded.scheduler.is_idle:
            return
        loaded.touch()
        try:
            loaded.scheduler.step()
            return
        except Exception as error:  # of the whole model, not of one request
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
    """Complete a future with a function's result or error."""
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _stopped() -> MlxkvError:
    return MlxkvError("the engine has stopped")
