"""The models in memory, all within one limit: loaded on demand, unloaded when idle.

Invariants:
- A model is here once, however it is named: its directory is the key.
- Each one's budget is what the others leave. What is being loaded counts before it is there.
- Idle models make room, the least recently used first; a busy one gives up prefix pages at most.
- It is changed on the engine's thread alone; other threads may look.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import mlx.core as mx

from mlxkv.base import device
from mlxkv.base.units import human_bytes
from mlxkv.engine.messages import Loaded
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.scheduler import Scheduler
from mlxkv.errors import MlxkvError, OutOfMemory
from mlxkv.memory import needs
from mlxkv.models.loader import lay_out
from mlxkv.store.info import Card, describe, digest
from mlxkv.store.resolve import resolve
from mlxkv.store.settings import Given, effective

_log = logging.getLogger(__name__)

FRESH_S = 5.0
"""How long a loaded model stays at least for its first request, unless a request said how long."""
ROOM_S = 60.0
"""How long a model waits for others to become idle and make room."""


@dataclass
class LoadedModel:
    """A loaded model, and how long it stays.

    Args:
        name: as requests name it.
        scheduler: the model and its requests.
        card: what its files say.
        digest: a short name for its files.
        keep_alive_s: how long it stays after its last request; negative: for ever.
        used_at: when that was.
        is_told: a request said how long.
    """

    name: str
    scheduler: Scheduler
    card: Card
    digest: str
    keep_alive_s: float
    used_at: float = field(default_factory=time.monotonic)
    is_told: bool = False

    def touch(self, keep_alive_s: float | None = None) -> None:
        """It is asked for."""
        self.used_at = time.monotonic()
        if keep_alive_s is not None:
            self.keep_alive_s, self.is_told = keep_alive_s, True

    def expires_at(self) -> float | None:
        """When it is unloaded if no request comes; None: never."""
        if self.keep_alive_s < 0:
            return None
        is_fresh = not (self.is_told or self.scheduler.counts.requests)
        return self.used_at + max(self.keep_alive_s, FRESH_S if is_fresh else 0.0)

    def described(self) -> Loaded:
        """What is known of it."""
        runtime, card = self.scheduler.runtime, self.card
        use, end = runtime.budget.use(), self.expires_at()
        until = None if end is None else time.time() + end - time.monotonic()
        return Loaded(
            name=self.name,
            path=str(runtime.path),
            size_bytes=sum(size for _, size in card.files),
            weights_bytes=runtime.budget.weights_bytes,
            kv_used_bytes=use.used_bytes,
            kv_allocated_bytes=use.allocated_bytes,
            kv_max_bytes=max(0, runtime.budget.limit_bytes - runtime.budget.weights_bytes),
            n_sequences=self.scheduler.n_sequences,
            pages_ram_bytes=runtime.budget.pages_bytes,
            pages_ssd_bytes=0 if runtime.pages is None else runtime.pages.ssd_bytes,
            device=device.kind(),
            until=None if until is None else datetime.fromtimestamp(until, UTC),
            context=runtime.context,
            family=card.family,
            parameters=card.parameters,
            quantization=card.quantization,
            digest=self.digest,
        )


class ModelPool:
    """See the module.

    Args:
        limit_bytes: for all models together.
        dtype: what is computed in.
        given: settings of all models, see `settings`.
        keep_alive_s: how long a model stays after its last request; negative: for ever.
        max_running: requests of one model that decode at a time.
    """

    def __init__(
        self, limit_bytes: int, dtype: str, given: Given, keep_alive_s: float, max_running: int
    ):
        self.limit_bytes = limit_bytes
        self._dtype, self._given = dtype, given
        self._keep_alive_s, self._max_running = keep_alive_s, max_running
        self._models: dict[str, LoadedModel] = {}
        self._loading_bytes = 0

    def find(self, key: str) -> LoadedModel | None:
        """A model that is here."""
        return self._models.get(key)

    def models(self) -> list[LoadedModel]:
        """All that are here."""
        return list(self._models.values())

    def __iter__(self) -> Iterator[str]:
        """The keys of all that are here; they may go meanwhile."""
        return iter(list(self._models))

    @property
    def used_bytes(self) -> int:
        """What they take, and what is being loaded."""
        budgets = [model.scheduler.runtime.budget for model in self.models()]
        return self._loading_bytes + sum(budget.used_bytes for budget in budgets)

    def loading(self, name: str, key: str) -> Generator[bool | None, None, LoadedModel]:
        """Load a model step by step, as soon as there is room.

        Args:
            name: as the request has it.
            key: see `key_of`.

        Yields:
            True where others have to make room first.

        Raises:
            OutOfMemory: its weights do not fit, or not within `ROOM_S`. Else as for `mlxkv.load`.
        """
        path = Path(key)
        layout = lay_out(path, self._dtype)
        n_bytes, card = layout.nbytes, describe(name, path, layout)
        yield
        yield from self._making_room(name, n_bytes)
        self._loading_bytes += n_bytes
        try:
            self.share_memory()
            settings = effective(path, self._given)
            runtime = yield from Runtime.loading(path, settings, self._dtype, layout)
            scheduler = Scheduler(runtime, self._max_running)
            model = LoadedModel(name, scheduler, card, digest(path), self._keep_alive_s)
        finally:
            self._loading_bytes -= n_bytes
        self._models[key] = model
        self.share_memory()
        return model

    def _making_room(self, name: str, n_bytes: int) -> Iterator[bool]:
        """Unload idle models, the least recently used first, until the weights fit.

        Raises:
            OutOfMemory: they do not.
        """
        until = time.monotonic() + ROOM_S
        if n_bytes > self.limit_bytes:
            raise OutOfMemory(
                f"{name}: its weights take {human_bytes(n_bytes)} and the limit of all models is "
                f"{human_bytes(self.limit_bytes)}"
            )
        while (missing := self.used_bytes + n_bytes - self.limit_bytes) > 0:
            idle = [
                (model.used_at, key)
                for key, model in self._models.items()
                if model.scheduler.is_idle
            ]
            if idle:
                self.drop(min(idle)[1])
            elif not self._give_pages(missing):
                others = any(not model.scheduler.is_idle for model in self.models())
                if not others or time.monotonic() > until:
                    free = max(0, self.limit_bytes - self.used_bytes)
                    raise OutOfMemory(
                        f"{name}: its weights take {human_bytes(n_bytes)} and "
                        f"{human_bytes(free)} of {human_bytes(self.limit_bytes)} are free"
                    )
                yield True  # a busy model makes room when its requests are done

    def _give_pages(self, n_bytes: int) -> int:
        """Have busy models give prefix pages back, if that is enough; how many bytes it was."""
        given = 0
        if sum(model.scheduler.runtime.budget.pages_bytes for model in self.models()) < n_bytes:
            return 0
        for model in self.models():
            given += (
                model.scheduler.runtime.budget.give_pages(n_bytes - given) if given < n_bytes else 0
            )
        return given

    def share_memory(self) -> None:
        """Each model may take what the others leave; arrays of pages are divided equally."""
        used, arrays = self.used_bytes, needs.page_arrays()
        for model in self.models():
            budget = model.scheduler.runtime.budget
            budget.share_arrays(arrays and arrays // len(self._models))
            limit = self.limit_bytes - (used - budget.used_bytes)
            if limit != budget.limit_bytes:
                budget.limit_bytes = limit

    def drop(self, key: str) -> None:
        """Unload a model; its requests end with an error."""
        model = self._models.pop(key)
        try:
            model.scheduler.stop(MlxkvError("the model was unloaded"))
            model.scheduler.runtime.close()
        except Exception:  # what is lost are prefixes
            _log.exception("the model %s was not closed in order", model.name)
        del model
        self.give_back()

    def give_back(self) -> None:
        """Return the memory of a model that is not referenced any more."""
        gc.collect()
        mx.clear_cache()
        device.trim()

    def expire(self) -> None:
        """Unload models whose keep-alive has passed."""
        # Keys alone: a model that is known here would be in memory when that is given back.
        for key in [key for key, model in self._models.items() if _is_over(model)]:
            self.drop(key)

    def until_next_expiry_s(self) -> float | None:
        """Time to the next that leaves; None where none will."""
        ends = [model.expires_at() for model in self.models()]
        times = [end for end in ends if end is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None


def _is_over(model: LoadedModel) -> bool:
    """Whether a model's keep-alive has passed without a request."""
    end = model.expires_at()
    return model.scheduler.is_idle and end is not None and end <= time.monotonic()


def key_of(name: str, path: Path | None = None) -> str:
    """A model's directory: it may have several names.

    Args:
        name: as a request has it.
        path: the directory, where the name is resolved already.

    Raises:
        ModelNotFound: it is not on this machine.
    """
    return str(path or resolve(name, fetch=False))
