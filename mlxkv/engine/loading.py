"""Models that are being loaded, and the requests that wait for them.

Only the engine's thread uses it; other threads may read `n_pending`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

from mlxkv.engine.model_pool import LoadedModel, ModelPool, key_of
from mlxkv.errors import MlxkvError
from mlxkv.memory.types import without_trace


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request that needs a model.

    Args:
        on_ready: called with the model.
        on_error: called with the error if it cannot be loaded.
        is_cancelled: whether the request was cancelled.
        keep_alive_s: see `Ask`.
    """

    on_ready: Callable[[LoadedModel], None]
    on_error: Callable[[Exception], None]
    is_cancelled: Callable[[], bool]
    keep_alive_s: float | None


@dataclass(slots=True)
class _Load:
    """A model that is being loaded, and the requests for it."""

    steps: Generator[bool | None, None, LoadedModel]
    pending: list[PendingRequest] = field(default_factory=list)


class ModelLoads:
    """Loads models into a pool; see the module."""

    def __init__(self, pool: ModelPool):
        self._pool = pool
        self._loads: dict[str, _Load] = {}

    def __bool__(self) -> bool:
        return bool(self._loads)

    @property
    def n_pending(self) -> int:
        """Requests that wait for a model."""
        return sum(len(load.pending) for load in list(self._loads.values()))

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
        except Exception as error:
            return pending.on_error(error)
        if loaded is not None:
            loaded.touch(pending.keep_alive_s)
            return pending.on_ready(loaded)
        if key not in self._loads:
            self._loads[key] = _Load(self._pool.loading(name, key))
        self._loads[key].pending.append(pending)
        return None

    def proceed(self, has_other_work: Callable[[], bool]) -> None:
        """Run the next step of the oldest load, or more steps while there is no other work."""
        while (first := self._oldest()) is not None:
            key, load = first
            try:
                if next(load.steps):  # it waits for memory: move it behind the others
                    self._loads[key] = self._loads.pop(key)
            except StopIteration as stop:
                del self._loads[key]
                for pending in load.pending:
                    stop.value.touch(pending.keep_alive_s)
                    pending.on_ready(stop.value)
                return
            except Exception as error:
                self.cancel(key, without_trace(error))
            if has_other_work():
                return

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

    def _oldest(self) -> tuple[str, _Load] | None:
        """The oldest load; first cancels loads whose requests are all cancelled."""
        for key, load in list(self._loads.items()):
            load.pending = [pending for pending in load.pending if not pending.is_cancelled()]
            if not load.pending:
                self.cancel(key, MlxkvError("no request waits for the model"))
        return next(iter(self._loads.items()), None)
