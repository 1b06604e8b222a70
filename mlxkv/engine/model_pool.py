"""The models in memory, all within one limit: loaded on demand, unloaded when idle.

Invariants:
- A model is loaded once, whatever its names and adapters: its directory is the key.
- A model's budget is what the others leave. A model counts as soon as its load begins.
- Idle models are unloaded to make room, LRU first; a busy one gives up prefix pages, and leaves
  after its last answer where a load has waited for `PATIENCE_S`: its new requests wait then.
- A model is unloaded only while it has no requests, and none is waiting for what loads beside it or
  is drafted by it: no answer is lost for it. One that drafts stays as long as those it drafts for,
  unless its memory is needed.
- Only the engine's thread changes it; other threads may read.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from mlxkv.base import device
from mlxkv.base.faults import log_fault
from mlxkv.base.units import human_bytes
from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.asleep.answers import Sleep
from mlxkv.engine.asleep.files import SleepFiles
from mlxkv.engine.clients import merge_counts
from mlxkv.engine.loaded_model import Hold, LoadedModel
from mlxkv.engine.messages import EngineStats
from mlxkv.engine.queue.preparation import Preparer
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import quietly
from mlxkv.errors import MlxkvError, ModelNotFound, OutOfMemory, contained
from mlxkv.memory import needs
from mlxkv.models.loader import lay_out
from mlxkv.store.adapters import ModelAdapters, adapter_refs, own_adapters, stamp_of
from mlxkv.store.info import describe, digest
from mlxkv.store.resolve import resolve
from mlxkv.store.settings import Given, draws_on_model, effective

PATIENCE_S = 5.0
"""How long a load waits for a busy model to become idle by itself."""
ROOM_S = 60.0
"""How long a load waits for other models to become idle."""


class ModelPool:
    """The models in memory; see the module.

    Args:
        limit_bytes: memory limit of all models together.
        dtype: dtype to compute in.
        given: settings of all models, see `store.settings`.
        keep_alive_s: how long a model stays after its last request; negative: for ever.
        max_running: requests of one model that decode at a time.
        idle: what is computed of next turns while there are no requests; None for nothing.
        preparer: prepares the long prompts of all models.

    Attributes:
        files: of answers that are put away; None to put none away.
        adapters: that models are loaded with.
    """

    def __init__(
        self,
        limit_bytes: int,
        dtype: str,
        given: Given,
        keep_alive_s: float,
        max_running: int,
        idle: IdleCompute | None = None,
        preparer: Preparer | None = None,
    ):
        self.files: SleepFiles | None = None
        self.adapters: ModelAdapters = {}
        allowed = device.process_allows()
        self.limit_bytes = limit_bytes if allowed is None else min(limit_bytes, allowed)
        self._dtype, self._given = dtype, given
        self._keep_alive_s, self._max_running = keep_alive_s, max_running
        self._idle, self._preparer = idle, preparer
        self._models: dict[str, LoadedModel] = {}
        self._loading_bytes = 0

    def find(self, key: str) -> LoadedModel | None:
        """A loaded model."""
        return self._models.get(key)

    @property
    def has_work(self) -> bool:
        """Whether a model has a step to compute; else all requests are being prepared."""
        schedulers = [model.scheduler for model in self.models()]
        return any(each.n_sequences or each.waiting.has_work for each in schedulers)

    def models(self) -> list[LoadedModel]:
        """All loaded models."""
        return list(self._models.values())

    def __iter__(self) -> Iterator[str]:
        """The keys of all loaded models; safe while models are dropped."""
        return iter(list(self._models))

    @property
    def used_bytes(self) -> int:
        """Bytes of all models, those being loaded included."""
        budgets = [model.scheduler.runtime.budget for model in self.models()]
        return self._loading_bytes + sum(budget.used_bytes for budget in budgets)

    def loading(self, name: str, key: str) -> Generator[bool | None, None, LoadedModel]:
        """Load a model step by step, as soon as there is room.

        Args:
            name: the request's name for it.
            key: see `key_of`.

        Yields:
            True while it waits for other models to make room.

        Raises:
            OutOfMemory: its weights do not fit, or not within `ROOM_S`. Else as `mlxkv.load`.
        """
        path = Path(key)
        if not path.is_dir():
            raise ModelNotFound(f"{name} is not on this machine any more")
        settings = effective(path, self._given)
        layout = lay_out(path, self._dtype, guesses=draws_on_model(settings.draft.value))
        adapters = self.adapters.get(key, ())
        n_bytes, card = layout.nbytes, describe(name, path, layout)
        n_bytes += sum(ref.n_bytes for ref in (*own_adapters(path), *adapters))
        yield
        yield from self._making_room(name, n_bytes)
        self._loading_bytes += n_bytes
        try:
            self.share_memory()
            runtime = yield from Runtime.loading(path, settings, self._dtype, layout, adapters)
            runtime.preparer = self._preparer
            scheduler = Scheduler(runtime, self._max_running, self._idle)
            scheduler.sleep = Sleep(self.files, runtime.path, stamp_of(adapters))
            model = LoadedModel(name, scheduler, card, digest(path), self._keep_alive_s)
        finally:
            self._loading_bytes -= n_bytes
        self._models[key] = model
        self.share_memory()
        return model

    def adapting(
        self, model: LoadedModel, adapter: Sequence[str], hold: Hold
    ) -> Generator[bool | None, None, LoadedModel]:
        """Bring adapters of a loaded model into memory, as `loading`.

        Args:
            model: that they change.
            adapter: see `Request`.
            hold: keeps the model here meanwhile.
        """
        name = "+".join((model.name, *adapter))
        n_bytes = sum(ref.n_bytes for ref in adapter_refs(adapter))
        yield
        yield from self._making_room(name, n_bytes, forces=False)
        self.share_memory()
        model.scheduler.runtime.adapted.get(adapter)
        model.holds.discard(hold)
        return model

    def _making_room(self, name: str, n_bytes: int, forces: bool = True) -> Iterator[bool]:
        """Drop idle adapters, then idle models, LRU first, until the weights fit.

        Args:
            name: for errors.
            n_bytes: of the weights.
            forces: whether a busy model is to leave in the end.

        Raises:
            OutOfMemory: they do not fit.
        """
        since = time.monotonic()
        if n_bytes > self.limit_bytes:
            raise OutOfMemory(
                f"{name}: its weights take {human_bytes(n_bytes)}, and the limit of all models is "
                f"{human_bytes(self.limit_bytes)}"
            )
        while (missing := self.used_bytes + n_bytes - self.limit_bytes) > 0:
            models = self._models.items()
            idle = [(model.used_at, key) for key, model in models if model.is_idle]
            adapted = [model.scheduler.runtime.adapted for model in self.models()]
            if any(pool.give_back(missing) for pool in adapted):
                continue
            if idle:
                self.drop(min(idle)[1])
            elif not self._give_pages(missing):
                if not self._models or time.monotonic() > since + ROOM_S:
                    free = max(0, self.limit_bytes - self.used_bytes)
                    raise OutOfMemory(
                        f"{name}: its weights take {human_bytes(n_bytes)}, and {human_bytes(free)} "
                        f"of the limit of {human_bytes(self.limit_bytes)} are free"
                    )
                if forces and time.monotonic() > since + PATIENCE_S:
                    self._have_leave(missing)
                yield True  # a busy model makes room when its requests are done

    def _have_leave(self, n_bytes: int) -> None:
        """Have busy models leave, those in memory for longest first, until the bytes are free."""
        for model in self.models():
            if n_bytes > 0:
                model.leaves = True
                n_bytes -= model.scheduler.runtime.budget.used_bytes

    def stats(self, owner: str | None, queued: int, rejected: int) -> EngineStats:
        """The metrics of an owner, or of all for None."""
        models = self.models()
        asleep = {} if self.files is None else self.files.counts(owner)
        clients = (x for model in models for x in model.scheduler.clients.figures())
        return EngineStats(
            running=sum(len(model.running(owner)) for model in models),
            queued=queued,
            rejected=rejected,
            models={model.name: model.scheduler.tally.shown(owner) for model in models},
            memory=self.memory(owner),
            clients=merge_counts(x for x in clients if owner in (None, x.owner)),
            asleep={Path(x).name: n for x, n in asleep.items()},
        )

    def memory(self, owner: str | None) -> dict[str, int]:
        """Bytes by kind, see `EngineStats`: an owner's, or all for None."""
        models = self.models()
        uses = [model.use(owner) for model in models]
        runtimes = [model.scheduler.runtime for model in models]
        found = {
            "weights": sum(runtime.budget.weights_bytes for runtime in runtimes),
            "kv_used": sum(use.used_bytes for use in uses),
            "kv_allocated": sum(use.allocated_bytes for use in uses),
            "pages": sum(runtime.pages_bytes(owner) for runtime in runtimes),
            "limit": self.limit_bytes,
        }
        if owner is None:
            found["active"] = mx.get_active_memory()
            found["cached"] = mx.get_cache_memory()
            found["peak"] = mx.get_peak_memory()
        return found

    def _give_pages(self, n_bytes: int) -> int:
        """Drop prefix pages of busy models if they suffice; the bytes freed."""
        freed, budgets = 0, [model.scheduler.runtime.budget for model in self.models()]
        if sum(budget.pages_bytes for budget in budgets) < n_bytes:
            return 0
        for budget in budgets:
            freed += budget.give_pages(n_bytes - freed) if freed < n_bytes else 0
        return freed

    def share_memory(self) -> None:
        """Give each model what the others leave; divide the pages' arrays equally."""
        used, arrays = self.used_bytes, needs.page_arrays()
        for model in self.models():
            budget = model.scheduler.runtime.budget
            budget.shares.set_arrays(arrays and arrays // len(self._models))
            budget.limit_bytes = self.limit_bytes - (used - budget.used_bytes)

    def drop(self, key: str, error: MlxkvError | None = None) -> None:
        """Unload a model; requests that it has end with the error."""
        model = self._models.pop(key)
        try:
            model.scheduler.stop(error or MlxkvError("the model was unloaded"))
            model.scheduler.runtime.close()
        except BaseException as failed:
            what = f"closing the model {model.name} failed; its prefixes may be lost"
            log_fault(what, contained(failed))
        for other in self.models():
            other.scheduler.runtime.draft_models.detach(model.scheduler.runtime)
        del model
        self.give_back()

    def start_again(self, error: MlxkvError) -> None:
        """Have the requests of all models go on; those that cannot end with the error."""
        for key, model in list(self._models.items()):
            try:
                model.scheduler.start_again(error)
            except BaseException as failed:
                log_fault(f"the model {model.name} is unloaded", contained(failed))
                self.drop(key, error)

    def expect(self, owner: str, client: str) -> None:
        """The head of a client's request has come."""
        for model in self.models():
            model.scheduler.fetching.expect(owner, client)

    def put_to_sleep(self) -> int:
        """Put the answers of all models away; how many it were."""
        n = 0
        for model in self.models():
            try:
                n += model.scheduler.sleep.put_away(model.scheduler)
            except BaseException as failed:
                log_fault(f"answers of {model.name} were not put away", contained(failed))
        return n

    def give_back(self) -> None:
        """Return unreferenced memory to the system."""
        gc.collect()
        mx.clear_cache()
        device.trim()

    def leave(self, key: str) -> bool:
        """Unload a model as soon as it has no requests; whether it is here."""
        if key not in self._models:
            return False
        self._models[key].leaves = True
        self.expire()
        return True

    def pause_next_turns(self, *, is_loading: bool) -> None:
        """There are requests, or models that are loaded: they need what next turns take."""
        for model in self.models():
            turns = model.scheduler.next_turns
            quietly("pausing a next turn failed", turns.pause)
            if is_loading or model.scheduler.is_idle:
                quietly("freeing caches failed", turns.kept.let_go)

    def expire(self) -> None:
        """Unload models whose keep-alive has passed, and free caches that were kept for long."""
        self._free_kept()
        # Keys only: a reference to a model here would keep its memory in use.
        for key in [key for key, model in self._models.items() if _is_over(model)]:
            self.drop(key)

    def _free_kept(self) -> None:
        kept = [model.scheduler.next_turns.kept for model in self.models()]
        old = [each for each in kept if each.left_s == 0]
        for each in old:
            each.let_go()
        if old:
            self.give_back()

    def until_next_expiry_s(self) -> float | None:
        """Seconds until the next model or kept caches expire; None if none will."""
        now, models = time.monotonic(), self.models()
        left = [model.scheduler.next_turns.kept.left_s for model in models]
        left += [end - now for model in models if (end := model.expires_at()) is not None]
        times = [max(0.0, seconds) for seconds in left if seconds is not None]
        return min(times, default=None)


def _is_over(model: LoadedModel) -> bool:
    """Whether a model's keep-alive has passed without a request."""
    end = model.expires_at()
    return model.is_idle and end is not None and end <= time.monotonic()


def key_of(name: str, path: Path | None = None) -> str:
    """A model's directory as its key: several names may mean one model.

    Args:
        name: a request's name for it.
        path: the directory if known, else the name is resolved.

    Raises:
        ModelNotFound: not on this machine.
    """
    return str(path or resolve(name, fetch=False))
