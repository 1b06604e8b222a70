"""A model in memory, and how long it stays."""

from __future__ import annotations

import math
import time
import weakref
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mlxkv.base import device
from mlxkv.engine.messages import Loaded
from mlxkv.engine.scheduler import Scheduler
from mlxkv.engine.tasks import Decoding, Prefilling, Task
from mlxkv.memory.types import KVUse
from mlxkv.store.adapter_names import shown
from mlxkv.store.info import Card

FRESH_S = 5.0
"""A loaded model stays this long for its first request, unless a request set its keep-alive."""


class Hold:
    """Keeps a model in memory while something has it."""


@dataclass(eq=False)
class LoadedModel:
    """A loaded model, and how long it stays.

    Args:
        name: its name in requests.
        scheduler: the model and its requests.
        card: facts from its files.
        digest: hash that identifies its files.
        keep_alive_s: how long it stays after its last request; negative: for ever.
        used_at: time of its last request.
        is_set: whether a request set `keep_alive_s`.
        leaves: whether it is unloaded as soon as it has no requests; it gets no new ones.
        holds: of requests that wait for another model beside it.
        drafts_for: models whose answers it drafts.
        drafters_failed: names of models that cannot draft for it.
    """

    name: str
    scheduler: Scheduler
    card: Card
    digest: str
    keep_alive_s: float
    used_at: float = field(default_factory=time.monotonic)
    is_set: bool = False
    leaves: bool = False
    holds: weakref.WeakSet[Hold] = field(default_factory=weakref.WeakSet)
    drafts_for: weakref.WeakSet[LoadedModel] = field(default_factory=weakref.WeakSet)
    drafters_failed: set[str] = field(default_factory=set)

    @property
    def is_idle(self) -> bool:
        """Whether it can be unloaded and no answer is lost."""
        is_used = any(not model.scheduler.is_idle for model in self.drafts_for)
        return self.scheduler.is_idle and not self.holds and not is_used

    def touch(self, keep_alive_s: float | None = None) -> None:
        """Note a request, and its keep-alive if it sets one."""
        self.used_at = time.monotonic()
        if keep_alive_s is not None:
            self.keep_alive_s, self.is_set = keep_alive_s, True

    def expires_at(self) -> float | None:
        """Monotonic time at which it is unloaded unless a request comes; None: never."""
        if self.leaves:
            return self.used_at
        ends = [model._own_end() for model in self._needed_by()]
        return max(ends) if math.isfinite(max(ends)) else None

    def _own_end(self) -> float:
        """`expires_at`, but for the models that it drafts for; infinity: never."""
        if self.leaves:
            return self.used_at
        if self.keep_alive_s < 0:
            return math.inf
        is_fresh = not (self.is_set or self.scheduler.counts.requests)
        return self.used_at + max(self.keep_alive_s, FRESH_S if is_fresh else 0.0)

    def _needed_by(self) -> list[LoadedModel]:
        """Itself, and all models that it drafts for, directly or not; two may draft for each
        other."""
        found: list[LoadedModel] = [self]
        for model in found:
            found += [other for other in model.drafts_for if other not in found]
        return found

    def running(self, owner: str | None) -> list[Task]:
        """An owner's running requests, or all for None."""
        tasks = [task for task in self.scheduler.tasks() if owner in (None, task.owner)]
        return [task for task in tasks if isinstance(task.state, Prefilling | Decoding)]

    def use(self, owner: str | None) -> KVUse:
        """KV of an owner's running requests; of all sequences for None."""
        if owner is None:
            return self.scheduler.runtime.budget.use()
        states = [task.state for task in self.running(owner)]
        uses = [x.generation.session.use() for x in states if isinstance(x, Prefilling | Decoding)]
        return KVUse(
            sum(use.used_tokens for use in uses),
            sum(use.used_bytes for use in uses),
            sum(use.allocated_tokens for use in uses),
            sum(use.allocated_bytes for use in uses),
        )

    def describe(self, owner: str | None = None) -> Loaded:
        """Its state, for front ends; sequences, KV, pages and requests' adapters are an owner's, or
        all for None."""
        runtime, card = self.scheduler.runtime, self.card
        use, end = self.use(owner), self.expires_at()
        until = None if end is None else time.time() + end - time.monotonic()
        return Loaded(
            name=self.name,
            path=str(runtime.path),
            size_bytes=sum(size for _, size in card.files),
            weights_bytes=runtime.budget.weights_bytes,
            kv_used_bytes=use.used_bytes,
            kv_allocated_bytes=use.allocated_bytes,
            kv_max_bytes=max(0, runtime.budget.limit_bytes - runtime.budget.weights_bytes),
            n_sequences=len(self.running(owner)) + self.scheduler.embedding.n_of(owner),
            pages_ram_bytes=runtime.pages_bytes(owner),
            pages_ssd_bytes=runtime.ssd_bytes(owner),
            device=device.kind(),
            until=None if until is None else datetime.fromtimestamp(until, UTC),
            context=runtime.context,
            family=card.family,
            parameters=card.parameters,
            quantization=card.quantization,
            digest=self.digest,
            n_asleep=self.scheduler.sleep.n_asleep(owner),
            kv_type=runtime.kv_type,
            adapters=tuple(
                (shown(each.given), each.n_bytes)
                for each in runtime.adapted
                if owner is None or owner in each.owners
            ),
        )
