"""Models that are being loaded, and the requests that wait for them.

A model that is to leave does so when its last request has ended. New requests for it wait, and load
it again.

Only the engine's thread uses it; other threads may read `n_pending`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from mlxkv.base.faults import told
from mlxkv.engine.loaded_model import Hold, LoadedModel
from mlxkv.engine.model_pool import ModelPool, key_of
from mlxkv.errors import (
    CheckpointError,
    MlxkvError,
    ModelNotFound,
    OutOfMemory,
    UsageError,
    contained,
)
from mlxkv.memory.types import without_trace
from mlxkv.store.settings import draft_model

_log = logging.getLogger(__name__)
NO_DRAFTS = UsageError, ModelNotFound, CheckpointError, OutOfMemory
"""Why a model that the settings name may not draft; answers come all the same."""


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request that needs a model.

    Args:
        on_ready: called with the model.
        on_error: called with the error if it cannot be loaded.
        is_cancelled: whether the request was cancelled.
        keep_alive_s: see `Ask`.
        owner: see `Ask`.
        draft: what drafts its answer, see `Request`; None for what the model's settings say.
        draft_path: directory of the model that it names; None if the name is resolved.
        adapter: what the model is to have for it, see `Request`.
    """

    on_ready: Callable[[LoadedModel], None]
    on_error: Callable[[Exception], None]
    is_cancelled: Callable[[], bool]
    keep_alive_s: float | None
    owner: str = ""
    draft: str | None = None
    draft_path: Path | None = None
    adapter: tuple[str, ...] = ()


@dataclass(slots=True)
class _Load:
    """A model that is being loaded, and the requests for it.

    Args:
        steps: of the load.
        pending: the requests.
        has_begun: whether a step was run.
        leaves: whether it is to leave once these requests have ended.
    """

    steps: Generator[bool | None, None, LoadedModel]
    pending: list[PendingRequest] = field(default_factory=list)
    has_begun: bool = False
    leaves: bool = False


class ModelLoads:
    """Loads models into a pool; see the module."""

    def __init__(self, pool: ModelPool):
        self._pool = pool
        self._loads: dict[str, _Load] = {}
        self._held: dict[object, str] = {}
        self._on_gone: list[tuple[str, Future[None]]] = []

    def __bool__(self) -> bool:
        """Whether there is a load that can go on."""
        return any(self._can_go_on(key, load) for key, load in self._loads.items())

    def n_pending(self, owner: str | None) -> int:
        """Requests that wait for a model: an owner's, or all for None."""
        pending = [each for load in list(self._loads.values()) for each in list(load.pending)]
        return sum(owner in (None, each.owner) for each in pending)

    def request(self, name: str, path: Path | None, pending: PendingRequest) -> None:
        """Call `pending.on_ready` with a model, at once or when it is loaded.

        Args:
            name: the model's name.
            path: its directory if known, else the name is resolved.
            pending: the request.
        """
        try:
            key = key_of(name, path)
            loaded = self._pool.find(key)
        except BaseException as error:
            return pending.on_error(contained(error))
        if loaded is not None and not loaded.leaves:
            loaded.touch(pending.keep_alive_s)
            return self._with_adapter(loaded, pending)
        if key not in self._loads:
            self._loads[key] = _Load(self._pool.loading(name, key))
        self._loads[key].pending.append(pending)
        return None

    def proceed(self, has_other_work: Callable[[], bool]) -> None:
        """Run the next step of the oldest load, or more steps while there is no other work."""
        while (first := self._oldest()) is not None:
            key, load = first
            try:
                load.has_begun = True
                if next(load.steps):  # it waits for memory: move it behind the others
                    self._loads[key] = self._loads.pop(key)
            except StopIteration as stop:
                del self._loads[key]
                stop.value.leaves |= load.leaves
                for pending in load.pending:
                    stop.value.touch(pending.keep_alive_s)
                    self._with_adapter(stop.value, pending)
                return
            except BaseException as error:
                self.cancel(key, told(without_trace(contained(error))))
            if has_other_work():
                return

    def _with_adapter(self, model: LoadedModel, pending: PendingRequest) -> None:
        """Hand a model to a request, once its adapters are in memory, and what drafts for it."""
        runtime = model.scheduler.runtime
        if not self._is_here(model):
            return self.request(model.name, runtime.path, pending)
        try:
            if not pending.adapter or runtime.adapted.find(pending.adapter) is not None:
                return self._with_drafter(model, pending)
        except BaseException as error:
            return pending.on_error(contained(error))
        key = "+".join((str(runtime.path), *pending.adapter))
        if key not in self._loads:
            hold = Hold()
            model.holds.add(hold)
            self._loads[key] = _Load(self._pool.adapting(model, pending.adapter, hold))
        self._loads[key].pending.append(pending)
        return None

    def _is_here(self, model: LoadedModel) -> bool:
        """Whether a model is still in memory: it may fail while something is loaded beside it."""
        return self._pool.find(str(model.scheduler.runtime.path)) is model

    def _with_drafter(self, model: LoadedModel, pending: PendingRequest) -> None:
        """Hand a model to a request, once the one that drafts for it is in memory too.

        A request that names none is answered without, where that cannot be loaded; and one for
        vectors always.
        """
        runtime = model.scheduler.runtime
        name, hold = draft_model(pending.draft or runtime.settings.draft.value), Hold()
        is_left_out = pending.draft is None and name in model.drafters_failed
        if name is None or is_left_out or runtime.vectors is not None:
            return pending.on_ready(model)
        model.holds.add(hold)

        def on_ready(drafter: LoadedModel) -> None:
            try:
                if runtime.draft_models.runtime(name) is not drafter.scheduler.runtime:
                    runtime.draft_models.attach(name, drafter.scheduler.runtime)
                drafter.drafts_for.add(model)
            except BaseException as error:
                return on_error(contained(error))
            model.holds.discard(hold)
            return self._ready(model, pending)

        def on_error(error: Exception) -> None:
            model.holds.discard(hold)
            if pending.draft is not None or not isinstance(error, NO_DRAFTS):
                return pending.on_error(error)
            if not isinstance(error, OutOfMemory):  # there may be room later
                model.drafters_failed.add(name)
            _log.warning("%s is answered without drafts of %s: %s", model.name, name, error)
            return self._ready(model, pending)

        beside = PendingRequest(
            on_ready, on_error, pending.is_cancelled, None, pending.owner, "off"
        )
        known = runtime.draft_models.runtime(name)
        path = pending.draft_path if known is None else known.path
        return self.request(name, path, beside)

    def _ready(self, model: LoadedModel, pending: PendingRequest) -> None:
        """Hand a model to a request that has waited for another beside it."""
        if self._is_here(model):
            return pending.on_ready(model)
        return self.request(model.name, model.scheduler.runtime.path, pending)

    def leave(self, key: str) -> bool:
        """Have a model leave when its requests have ended; whether it is here or being loaded."""
        load = self._loads.get(key)
        if load is not None:
            load.leaves = True
        return self._pool.leave(key) or load is not None

    def hold(self, key: str, holder: object, gone: Future[None]) -> None:
        """Have a model leave, and none be loaded from its directory until `release`.

        Args:
            key: of the model.
            holder: what is given to `release`.
            gone: completed when the model is not in memory any more.
        """
        self._held[holder] = key
        load = self._loads.get(key)
        if load is not None and load.has_begun:
            load.leaves = True
        self._pool.leave(key)
        self._on_gone.append((key, gone))
        self.tell_gone()

    def release(self, holder: object) -> None:
        """Allow loads again; nothing for one that does not hold a model."""
        self._held.pop(holder, None)

    def tell_gone(self) -> None:
        """Complete the futures of models that have left."""
        waiting, self._on_gone = self._on_gone, []
        for key, gone in waiting:
            load = self._loads.get(key)
            if self._pool.find(key) is None and (load is None or not load.has_begun):
                gone.set_result(None)
            else:
                self._on_gone.append((key, gone))

    def cancel(self, key: str, error: Exception) -> bool:
        """Cancel a load; its requests fail with the error. Returns whether there was one."""
        load = self._loads.pop(key, None)
        if load is None:
            return False
        load.steps.close()
        for pending in load.pending:
            pending.on_error(error)
        self._pool.give_back()
        return True

    def cancel_all(self, error: Exception) -> None:
        """Cancel all loads."""
        for key in list(self._loads):
            self.cancel(key, error)
        waiting, self._on_gone = self._on_gone, []
        for _, gone in waiting:
            gone.set_exception(error)

    def _can_go_on(self, key: str, load: _Load) -> bool:
        """Whether the model is not still here from before, and may be loaded."""
        if load.has_begun:
            return True
        return self._pool.find(key) is None and key not in self._held.values()

    def _oldest(self) -> tuple[str, _Load] | None:
        """The oldest load that can go on; first cancels loads whose requests are all cancelled."""
        for key, load in list(self._loads.items()):
            load.pending = [pending for pending in load.pending if not pending.is_cancelled()]
            if not load.pending:
                self.cancel(key, MlxkvError("no request waits for the model"))
        return next((pair for pair in self._loads.items() if self._can_go_on(*pair)), None)
