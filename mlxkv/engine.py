"""The one thread that touches MLX: models on demand, and many requests at a time.

Invariants:
- MLX is used on the engine's thread alone. Others hand it requests and calls, and wait.
- A model is loaded when it is asked for and leaves when nobody has asked for it for its
  `keep_alive`, or earlier if another needs the room: the least recently used that is idle first.
- All models share one limit: each one's budget is what the others leave.
- The thread survives whatever a request does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from mlxkv import device
from mlxkv.answer import Chunk, Request
from mlxkv.asks import Ask, Busy, Embeddings, EngineStats, Loaded
from mlxkv.card import describe
from mlxkv.errors import MlxkvError, OutOfMemory, UsageError
from mlxkv.llm import load_with
from mlxkv.loader import lay_out
from mlxkv.serving import ServedModel, Task
from mlxkv.settings import Given, effective
from mlxkv.store import resolve
from mlxkv.terminal import human_bytes

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


@dataclass
class _Place:
    """A loaded model, and how long it stays."""

    served: ServedModel
    path: Path
    keep_alive_s: float
    used_at: float = field(default_factory=time.monotonic)
    card: dict[str, Any] = field(default_factory=dict)

    def expires_at(self) -> float | None:
        """When it leaves if nobody asks for it; None: never."""
        return None if self.keep_alive_s < 0 else self.used_at + self.keep_alive_s


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
        self.limit_bytes = memory or device.memory_limit()
        self._dtype, self._given = dtype, given or Given()
        self._keep_alive_s, self._max_queue, self._max_running = (
            keep_alive_s,
            max_queue,
            max_running,
        )
        self._changed = threading.Condition()
        self._inbox: deque[Task] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._places: dict[str, _Place] = {}
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
        task = Task(ask, answer.tell, lambda: answer.is_cancelled)
        with self._changed:
            if self._n_waiting() >= self._max_queue:
                self._rejected += 1
                raise Busy(WAIT_S)
            if not self.alive:
                raise _stopped()
            self._inbox.append(task)
            self._changed.notify()
        return answer

    async def load(self, model: str, keep_alive_s: float | None = None) -> Loaded:
        """Have a model in memory; errors as for `mlxkv.load`."""

        def load() -> Loaded:
            return self._described(self._place(model, keep_alive_s))

        return await self._call(load)

    async def unload(self, model: str) -> bool:
        """Give a model's memory back; whether it was there."""

        def unload() -> bool:
            key = _key(model)
            there = key in self._places
            if there:
                self._drop(key)
            return there

        return await self._call(unload)

    async def tokenize(self, ask: Ask) -> list[int]:
        """The token ids of a prompt as the model would get them."""

        def tokenize() -> list[int]:
            llm = self._place(ask.model, ask.keep_alive_s).served.llm
            turn, _ = llm.prepare(ask.prompt, Request.of(**dict(ask.options)), llm.session())
            return turn.sequence

        return await self._call(tokenize)

    async def embed(self, model: str, texts: Sequence[str]) -> Embeddings:
        """Raises UsageError: the families that mlxkv runs are made to generate."""
        raise UsageError(
            f"{model} is made to generate text and gives no meaningful embeddings: use a model "
            "that was trained for them"
        )

    def names(self) -> set[str]:
        """How requests named the models in memory."""
        return {place.served.name for place in list(self._places.values())}

    def loaded(self) -> list[Loaded]:
        """The models in memory."""
        return [self._described(place) for place in list(self._places.values())]

    def stats(self) -> EngineStats:
        """What the engine does and has done."""
        served = [place.served for place in list(self._places.values())]
        uses = [model.llm.budget.use() for model in served]
        return EngineStats(
            running=sum(model.n_sequences for model in served),
            queued=self._n_waiting(),
            rejected=self._rejected,
            models={model.name: model.counts.copy() for model in served},
            memory={
                "weights": sum(model.llm.budget.weights_bytes for model in served),
                "kv_used": sum(use.used_bytes for use in uses),
                "kv_allocated": sum(use.allocated_bytes for use in uses),
                "pages": sum(model.llm.budget.pages_bytes for model in served),
                "active": mx.get_active_memory(),
                "cached": mx.get_cache_memory(),
                "peak": mx.get_peak_memory(),
                "limit": self.limit_bytes,
            },
        )

    def _n_waiting(self) -> int:
        return len(self._inbox) + sum(
            len(place.served.waiting) for place in list(self._places.values())
        )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    async def _call(self, function: Callable[[], T]) -> T:
        """Run something on the engine's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            # Whoever asked may have gone; from here on it cannot be cancelled.
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._closing:
                    raise _stopped()
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

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
        try:
            while not self._closing:
                self._turn()
        finally:
            with self._changed:
                self._closing = True
                calls, tasks = list(self._calls), list(self._inbox)
            for call in calls:
                call()
            for task in tasks:
                task.tell(_stopped())
            for name in list(self._places):
                self._drop(name)

    def _turn(self) -> None:
        """What is to be done now, or a wait for it."""
        with self._changed:
            idle = all(place.served.is_idle for place in self._places.values())
            if idle and not (self._inbox or self._calls or self._closing):
                self._changed.wait(self._until_next_expiry())
            calls, tasks = list(self._calls), list(self._inbox)
            self._calls.clear()
            self._inbox.clear()
        for call in calls:
            call()
        for task in tasks:
            self._hand_over(task)
        self._share_memory()
        for name, place in list(self._places.items()):
            if not place.served.is_idle:
                place.used_at = time.monotonic()
                self._step(name, place)
        self._expire()

    def _step(self, name: str, place: _Place) -> None:
        try:
            place.served.step()
        except Exception as error:  # not one request's: the model starts over
            _log.exception("the model %s failed and is unloaded", name)
            for task in list(place.served.tasks()):
                task.tell(MlxkvError(f"the model failed: {error}"))
            self._drop(name)

    def _hand_over(self, task: Task) -> None:
        if task.is_cancelled():
            return task.tell(None)
        try:
            place = self._place(task.ask.model, task.ask.keep_alive_s)
        except Exception as error:  # one request's, whatever it is
            return task.tell(error)
        return place.served.waiting.append(task)

    def _place(self, model: str, keep_alive_s: float | None) -> _Place:
        """A model, loaded if need be."""
        place = self._places.get(_key(model))
        if place is None:
            place = self._load(model)
        place.used_at = time.monotonic()
        if keep_alive_s is not None:
            place.keep_alive_s = keep_alive_s
        return place

    def _load(self, model: str) -> _Place:
        path = resolve(model, fetch=False)
        key = _key(model)
        needed = lay_out(path, self._dtype).nbytes
        self._make_room(model, needed)
        llm = load_with(path, effective(path, self._given), self._dtype)
        served = ServedModel(model, llm, self._max_running)
        card = describe(model, path)
        place = _Place(served, path, self._keep_alive_s)
        place.card = {
            "family": card.family,
            "parameters": card.parameters,
            "quantization": card.quantization,
            "size_bytes": sum(size for _, size in card.files),
            "digest": fingerprint_of(path),
        }
        self._places[key] = place
        self._share_memory()
        return place

    def _make_room(self, model: str, n_bytes: int) -> None:
        """Unload idle models, the least recently used first, until the weights fit.

        Raises:
            OutOfMemory: they do not.
        """
        while self._used() + n_bytes > self.limit_bytes:
            idle = [
                (place.used_at, name)
                for name, place in self._places.items()
                if place.served.is_idle
            ]
            if not idle and self._give_pages(self._used() + n_bytes - self.limit_bytes):
                continue
            if not idle:
                raise OutOfMemory(
                    f"{model}: its weights take {human_bytes(n_bytes)} and "
                    f"{human_bytes(max(0, self.limit_bytes - self._used()))} of "
                    f"{human_bytes(self.limit_bytes)} are free"
                )
            self._drop(min(idle)[1])

    def _give_pages(self, n_bytes: int) -> int:
        """Have busy models give prefix pages back; how many bytes that were."""
        given = 0
        for place in self._places.values():
            given += place.served.llm.budget.give_pages(n_bytes - given) if given < n_bytes else 0
        return given

    def _used(self) -> int:
        return sum(place.served.llm.budget.used_bytes for place in self._places.values())

    def _share_memory(self) -> None:
        """Each model may take what the others leave."""
        used = self._used()
        for place in self._places.values():
            budget = place.served.llm.budget
            limit = self.limit_bytes - (used - budget.used_bytes)
            if limit != budget.limit_bytes:
                budget.limit_bytes = limit

    def _drop(self, name: str) -> None:
        place = self._places.pop(name)
        try:
            place.served.close()
        except Exception:  # what is lost are prefixes
            _log.exception("the model %s was not closed in order", name)
        del place
        gc.collect()
        mx.clear_cache()

    def _until_next_expiry(self) -> float | None:
        ends = [place.expires_at() for place in self._places.values()]
        times = [end for end in ends if end is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _expire(self) -> None:
        now = time.monotonic()
        for name, place in list(self._places.items()):
            end = place.expires_at()
            if place.served.is_idle and end is not None and end <= now:
                self._drop(name)

    def _described(self, place: _Place) -> Loaded:
        llm, served = place.served.llm, place.served
        use = llm.budget.use()
        end = place.expires_at()
        until = None if end is None else time.time() + end - time.monotonic()
        return Loaded(
            name=served.name,
            path=str(place.path),
            size_bytes=place.card["size_bytes"],
            weights_bytes=llm.budget.weights_bytes,
            kv_used_bytes=use.used_bytes,
            kv_allocated_bytes=use.allocated_bytes,
            kv_max_bytes=max(0, llm.budget.limit_bytes - llm.budget.weights_bytes),
            n_sequences=served.n_sequences,
            pages_ram_bytes=llm.budget.pages_bytes,
            pages_ssd_bytes=0 if llm.pages is None else llm.pages.ssd_bytes,
            device=device.kind(),
            until=None if until is None else datetime.fromtimestamp(until, UTC),
            context=llm.context,
            family=place.card["family"],
            parameters=place.card["parameters"],
            quantization=place.card["quantization"],
            digest=place.card["digest"],
        )


def _stopped() -> MlxkvError:
    return MlxkvError("the engine has stopped")


def _key(model: str) -> str:
    """A model's directory: it may have several names."""
    return str(resolve(model, fetch=False))


def fingerprint_of(path: Path) -> str:
    """A short name for a model's files: of their names, sizes and times."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
