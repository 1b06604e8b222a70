"""The one thread that uses MLX: loads models on demand, and answers many requests at a time.

Invariants:
- Only the engine's thread uses MLX. Other threads hand it requests and calls, and wait.
- The first request for a model loads it, step by step between the steps of running answers; other
  requests for it wait. `model_pool` decides which models are in memory, and their limits.
- Whatever a request raises ends that request alone. If the loop itself fails, it starts again with
  its models as often as `Deaths` allows, and answers go on from their pages, each once; then the
  engine has failed for good, and the process should end.
- An owner (API key) fills its own queue only.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from mlxkv.base import device
from mlxkv.base.faults import log_fault
from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.ahead.next_turn import NextTurns
from mlxkv.engine.answers import WAIT_S, EngineAnswer, settle, stopped, task_of, waited
from mlxkv.engine.asleep.answers import Beds
from mlxkv.engine.calls import Calls
from mlxkv.engine.embedding import EngineJob, encoded
from mlxkv.engine.loaded_model import LoadedModel
from mlxkv.engine.loading import ModelLoads, PendingRequest
from mlxkv.engine.messages import Ask, Busy, EmbedAsk, Embeddings, EngineStats, Loaded
from mlxkv.engine.model_pool import ModelPool, key_of
from mlxkv.engine.prompt import make_ready
from mlxkv.engine.queue.preparation import Preparer
from mlxkv.engine.restarts import Deaths, Restarted
from mlxkv.engine.tasks import Task, quietly
from mlxkv.errors import InternalError, contained
from mlxkv.store.adapters import ModelAdapters
from mlxkv.store.settings import Given

T = TypeVar("T")
QUIET_S = 0.1
"""How long there are no requests before next turns are computed: a tool may answer at once."""


class ThreadedEngine:
    """Loads models and answers requests, on a thread of its own.

    Args:
        memory: bytes for all models together; None for what the machine allows.
        dtype: dtype to compute in.
        given: settings of all models, see `store.settings`.
        keep_alive_s: how long a model stays after its last request; negative: for ever.
        max_queue: requests of one owner that may wait.
        max_running: requests of one model that decode at a time.
        next_turns, idle_compute: what is computed of next turns, see `idle`; False is `off`.
        asleep: folder of answers that are put away; None to put none away.
        adapters: that models are loaded with.

    Attributes:
        on_failed: called once the engine has failed for good.
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
        idle_compute: str | None = None,
        asleep: Path | None = None,
        adapters: ModelAdapters | None = None,
    ):
        self._beds, self._is_leaving = Beds(asleep, adapters), False
        self.asleep = self._beds.asleep
        idle = IdleCompute(idle_compute if next_turns else "off")
        limit_bytes = memory or device.memory_limit()
        self._preparer = preparer = Preparer(self._wake)
        self._pool = ModelPool(
            limit_bytes, dtype, given or Given(), keep_alive_s, max_running, idle, preparer
        )
        self._pool.files, self._pool.adapters = self._beds.files, adapters or {}
        self._loads, self._changed = ModelLoads(self._pool), threading.Condition()
        self._busy_at, self._max_queue = 0.0, max_queue
        self._inbox: deque[tuple[Ask, Task]] = deque()
        self._calls = Calls(self._changed, lambda: self.alive, lambda: self._closing)
        self._rejected: Counter[str] = Counter()
        self._deaths, self._closing, self._ended = Deaths(), False, threading.Event()
        self.on_failed: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._live, name="mlxkv engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Put answers away, write prefixes to disk, and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._ended.wait()
        self._beds.close()

    def put_to_sleep(self) -> int:
        """From any thread: put all answers away, tell their clients so (`PutAway`), and refuse new
        requests; how many answers go on later."""
        future: Future[int] = Future()
        self._is_leaving = True
        self._calls.add(lambda: settle(future, self._pool.put_to_sleep))
        return (waited(future, self._ended) or 0) if self.alive else 0

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._closing and not self._ended.is_set()

    @property
    def restarts(self) -> int:
        """How often the loop failed and has started again."""
        return self._deaths.n

    @property
    def failed(self) -> bool:
        """Whether it has failed for good."""
        return self._deaths.are_too_many

    def submit(self, ask: Ask) -> EngineAnswer:
        """Queue a request, from any thread.

        Raises:
            Busy: the owner's queue is full.
        """
        answer = EngineAnswer(self._wake, lambda: self._is_leaving)
        task = task_of(ask, answer)
        with self._changed:
            self._check_queue(ask.owner)
            if not self.alive or self._is_leaving:
                raise stopped()
            self._inbox.append((ask, task))
            self._changed.notify()
        return answer

    def expect(self, owner: str, client: str) -> None:
        """From any thread: the head of a client's request has come, see `queue.fetching`."""
        self._calls.add(lambda: self._pool.expect(owner, client))

    async def load(
        self, model: str, keep_alive_s: float | None = None, path: Path | None = None
    ) -> Path:
        """Load a model, and return its directory; raises as `mlxkv.load`."""
        return await self._with_model(
            model, path, keep_alive_s, lambda loaded: loaded.scheduler.runtime.path
        )

    async def unload(self, model: str, path: Path | None = None) -> bool:
        """Have a model leave when its last answer has ended; new requests wait, and load it again.

        Returns:
            Whether it was in memory or being loaded.
        """
        return await self._calls.run(lambda: self._loads.leave(key_of(model, path)))

    @contextlib.asynccontextmanager
    async def without(self, model: str, path: Path | None = None) -> AsyncIterator[None]:
        """A time in which a model is not in memory: it has left as with `unload`, and new requests
        wait until the time is over."""
        key, holder = await self._calls.run(lambda: key_of(model, path)), object()
        gone: Future[None] = Future()
        try:
            await self._calls.result(gone, lambda: self._loads.hold(key, holder, gone))
            yield
        finally:
            self._calls.add(lambda: self._loads.release(holder))

    async def tokenize(self, ask: Ask) -> list[int]:
        """The token ids of a request's prompt."""
        side = await self._with_model(
            ask.model, ask.path, ask.keep_alive_s, lambda model: model.scheduler.runtime.text_side()
        )
        ready = await self._preparer.awaited(lambda: make_ready(side, ask.request, ask.owner))
        return ready.prepared.media.vocabulary(ready.tokens)

    async def embed(self, ask: EmbedAsk) -> Embeddings:
        """The vectors of texts; computed between the steps of answers.

        Raises:
            Busy: the owner's queue is full.
            UsageError, ContextExceeded: see `embedding.encoded`.
            OutOfMemory: a text takes more memory than there is.
        """
        with self._changed:
            self._check_queue(ask.owner)
        side = await self._with_model(
            ask.model, ask.path, None, lambda loaded: loaded.scheduler.runtime.text_side()
        )
        job = EngineJob(ask, await self._preparer.awaited(lambda: encoded(side, ask.request)))
        try:
            await self._with_model(
                ask.model, ask.path, ask.keep_alive_s, lambda at: at.scheduler.embedding.add(job)
            )
            return await asyncio.wrap_future(job.future)
        finally:
            job.future.cancel()  # unless it is done

    def names(self) -> set[str]:
        """The names of the models in memory."""
        return {loaded.name for loaded in self._pool.models()}

    def loaded(self, owner: str | None = None) -> list[Loaded]:
        """The models in memory; see `stats`."""
        return [loaded.describe(owner) for loaded in self._pool.models()]

    def stats(self, owner: str | None = None) -> EngineStats:
        """The engine's metrics: an owner's own, or of all owners together for None."""
        rejected = self._rejected.total() if owner is None else self._rejected[owner]
        return self._pool.stats(owner, self._n_waiting(owner), rejected)

    def _check_queue(self, owner: str) -> None:
        if self._n_waiting(owner) >= self._max_queue:
            self._rejected[owner] += 1
            raise Busy(WAIT_S, is_owners=bool(owner))

    def _n_waiting(self, owner: str | None) -> int:
        """Waiting requests of an owner, or of all for None."""
        queues = [loaded.scheduler.waiting for loaded in self._pool.models()]
        waiting = sum(len(queue) if owner is None else queue.n_of(owner) for queue in queues)
        waiting += sum(loaded.scheduler.embedding.n_of(owner) for loaded in self._pool.models())
        new = sum(owner in (None, ask.owner) for ask, _ in list(self._inbox))
        return new + waiting + self._loads.n_pending(owner)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

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
            settle(future, lambda: function(loaded))

        pending = PendingRequest(on_ready, future.set_exception, cancelled.is_set, keep_alive_s)
        try:
            return await self._calls.result(
                future, lambda: self._loads.request(model, path, pending)
            )
        finally:
            cancelled.set()

    def _live(self) -> None:
        try:
            unwire = device.hold_wired(self._pool.limit_bytes)
            while not self._closing:
                try:
                    self._turn()
                except BaseException as error:
                    self._start_again(contained(error))
            self._shut()
            unwire()
        except BaseException as error:
            self._deaths.give_up(contained(error))
        finally:
            self._closing = True
            self._ended.set()
        if self.failed:
            self.on_failed()
        # A thread that used MLX must not end while the interpreter exits: MLX's thread-local
        # destructors, which run after `join`, then take the GIL and abort the process (MLX 0.32,
        # Python 3.11). So it sleeps until the process ends.
        threading.Event().wait()

    def _start_again(self, error: Exception) -> None:
        """After the loop failed: have answers go on, and keep the models."""
        if not self._deaths.count(error):
            self._closing = True
            return
        try:
            self._loads.cancel_all(Restarted())
            self._pool.start_again(Restarted())
        except BaseException as again:
            log_fault("starting again failed", contained(again))

    def _shut(self) -> None:
        with self._changed:
            self._closing = True
            calls, tasks = self._calls.taken(), list(self._inbox)
        for call in calls:
            quietly("a call failed", call)
        quietly("putting answers away failed", self._pool.put_to_sleep)
        for ask, task in tasks:
            self._beds.dismiss(ask, task)
        self._loads.cancel_all(self._beds.told())
        for key in self._pool:
            self._pool.drop(key)
        self._preparer.close()

    def _turn(self) -> None:
        """Run one turn of the loop; sleep first if there is nothing to do."""
        with self._changed:
            if not (self._loads or self._pool.has_work or self._has_news()):
                self._changed.wait(QUIET_S if self._has_requests() else self._sleep_s())
            calls, tasks = self._calls.taken(), list(self._inbox)
            self._inbox.clear()
        for call in calls:
            quietly("a call failed", call)
        for ask, task in tasks:
            try:
                self._hand_over(ask, task)
            except BaseException as error:
                task.tell(contained(error))
        had_work = self._has_requests() or self._next_turns() is not None
        if self._has_requests():
            self._busy_at = time.monotonic()
            self._pool.pause_next_turns(is_loading=bool(self._loads))
        self._loads.proceed(lambda: self._is_busy() or self._has_news())
        self._pool.share_memory()
        for key in self._pool:
            self._step(key)
        self._pool.expire()
        self._loads.tell_gone()
        if self._has_requests():
            return
        if (turns := self._next_turns()) is not None and self._sleep_s() == 0:
            if not self._has_news():
                quietly("computing a next turn failed", turns.step)
            had_work = self._next_turns() is None
        if had_work:
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
        except BaseException as error:  # of the whole model, not of one request
            log_fault(f"the model {loaded.name} failed and is unloaded", contained(error))
        del loaded
        self._pool.drop(key, InternalError(is_logged=True))

    def _hand_over(self, ask: Ask, task: Task) -> None:
        if task.is_cancelled():
            return task.tell(None)
        self._beds.claim(ask, task)
        request = ask.request
        given = ask.keep_alive_s, ask.owner, request.draft, ask.draft_path, request.adapter
        pending = PendingRequest(
            lambda loaded: loaded.scheduler.add(task), task.tell, task.is_cancelled, *given
        )
        return self._loads.request(ask.model, ask.path, pending)
