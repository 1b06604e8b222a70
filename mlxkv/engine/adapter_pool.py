"""The adapters of one model in memory, that requests name.

Invariants:
- Each set of adapters, with its weights, is a model of its own on the arrays of the one base. It
  has pages of its own, and their matrices count as weights of the base's budget.
- Where it changes only the layers from a border on, the layers below share pages with the base
  (`prefix.border`). There is one border, at the lowest layer that any adapter seen so far changes;
  what is in memory moves there when no sequence of it lives.
- One is dropped only while none of its sequences lives, LRU first: where another needs its memory,
  or KV does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

import mlx.core as mx

from mlxkv.base.units import human_bytes
from mlxkv.errors import OutOfMemory
from mlxkv.generation.mixed import MixedModels
from mlxkv.generation.session import Session
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.layout import Kinds
from mlxkv.store.adapter_names import first_changed, first_kept_layer
from mlxkv.store.adapters import AdapterRef, adapter_refs, read_for, stamp_of

if TYPE_CHECKING:
    from mlxkv.memory.budget import Budget
    from mlxkv.models.adapter_targets import Weighted


@dataclass(eq=False)
class AdaptedModel:
    """A model under adapters.

    Args:
        given: the adapters, as the request that loaded it has them.
        stamp: names them, `store.adapters.stamp_of`.
        model: on the base's arrays.
        n_bytes: of the adapters' matrices.
        border: the layer from which on its pages are its own; None for all.
        used_at: time of its last request.
        sessions: its live sequences.
        owners: whose requests have named them.
    """

    given: tuple[str, ...]
    stamp: str
    model: CausalLM
    n_bytes: int
    border: int | None
    used_at: float = field(default_factory=time.monotonic)
    sessions: WeakSet[Session] = field(default_factory=WeakSet)
    owners: set[str] = field(default_factory=set)

    @property
    def is_idle(self) -> bool:
        """Whether no sequence of it lives."""
        return not self.sessions


class AdapterPool:
    """See the module.

    Args:
        model: the base, with the adapters that it always has.
        path: its directory.
        own: those adapters.
        budget: where matrices count.
        on_drop: called with the stamp of what was dropped, or of what has pages at a border that
            is not the model's any more.

    Attributes:
        mixed: steps of rows with different adapters.
        border: see the module; None while no adapter has one.
    """

    def __init__(
        self,
        model: CausalLM,
        path: Path,
        own: Sequence[AdapterRef],
        budget: Budget,
        on_drop: Callable[[str], None],
    ) -> None:
        self._model, self._path, self._own, self._budget = model, path, own, budget
        self._on_drop = on_drop
        self._all: dict[str, AdaptedModel] = {}
        self.mixed = MixedModels(self._count)
        budget.spare = self.give_back
        self._n_layers = 0 if own else layers_to_cut(model)
        self.border = first_kept_layer(path, self._n_layers) if self._n_layers else None

    def __iter__(self) -> Iterator[AdaptedModel]:
        """Those in memory; safe while one is dropped."""
        return iter(list(self._all.values()))

    def find(self, given: Sequence[str]) -> AdaptedModel | None:
        """A model under these adapters; None where they are not in memory.

        Raises:
            ModelNotFound: there is no such adapter.
        """
        return self._all.get(stamp_of(adapter_refs(given)))

    def get(self, given: Sequence[str]) -> AdaptedModel:
        """The model under these adapters, loaded if need be.

        Raises:
            ModelNotFound, DownloadError: there is no such adapter.
            CheckpointError: it is damaged, or for another model.
            OutOfMemory: there is no room for it.
        """
        refs = adapter_refs(given)
        stamp = stamp_of(refs)
        found = self._all.get(stamp)
        if found is None:
            self._all[stamp] = found = self._loaded(tuple(given), stamp, refs)
        found.used_at = time.monotonic()
        if found.border is not None and found.border != self.border and found.is_idle:
            self._on_drop(stamp)
            found.border = self.border
        return found

    def give_back(self, n_bytes: int | None = None) -> int:
        """Drop adapters that nothing uses, LRU first, until so many bytes are free, or all for
        None; the bytes freed."""
        freed = 0
        for each in sorted(self, key=lambda each: each.used_at):
            if each.is_idle and (n_bytes is None or freed < n_bytes):
                freed += self._drop(each)
        if freed:
            mx.clear_cache()
        return freed

    def _loaded(
        self, given: tuple[str, ...], stamp: str, refs: Sequence[AdapterRef]
    ) -> AdaptedModel:
        from mlxkv.models.adapters import adapted, adapted_bytes  # most servers have none

        family, added = read_for([*self._own, *refs], self._path)
        model = adapted(self._model, family, added, self._check_room)
        n_bytes = adapted_bytes(model)
        self._budget.weights_bytes += n_bytes
        self._plan()
        return AdaptedModel(given, stamp, model, n_bytes, self._border_of(added))

    def _border_of(self, added: Sequence[Weighted]) -> int | None:
        """The model's border, moved down to what adapters change; None where they have none."""
        if not self._n_layers or not (first := first_changed(added, self._n_layers)):
            return None
        self.border = min(first, self.border or first)
        return self.border

    def _check_room(self, n_bytes: int) -> None:
        """Make room for matrices; raise OutOfMemory where there is none."""
        budget = self._budget
        for make in (self.give_back, budget.give_pages):
            if (missing := n_bytes + budget.used_bytes - budget.limit_bytes) > 0:
                make(missing)
        if (missing := n_bytes + budget.used_bytes - budget.limit_bytes) > 0:
            raise OutOfMemory(
                f"the adapter takes {human_bytes(n_bytes)}, and "
                f"{human_bytes(max(0, n_bytes - missing))} of the limit of "
                f"{human_bytes(budget.limit_bytes)} are free"
            )

    def _drop(self, each: AdaptedModel) -> int:
        before = self._budget.weights_bytes
        del self._all[each.stamp]
        self._on_drop(each.stamp)
        self._budget.weights_bytes -= each.n_bytes
        self.mixed.clear()  # it may have copies of the matrices
        self._plan()
        return before - self._budget.weights_bytes

    def _plan(self) -> None:
        """Have steps planned as those of the model whose adapters are the largest."""
        models = [(each.n_bytes, each.model) for each in self]
        largest = max(models, key=lambda pair: pair[0], default=(0, self._model))
        self._budget.plan_with(largest[1])

    def _count(self, n_bytes: int) -> None:
        self._budget.weights_bytes += n_bytes


def layers_to_cut(model: CausalLM) -> int:
    """Layers of a model whose pages can be kept by groups of layers; 0 for another.

    Not where a layer needs more than its input, keeps a state, or rotates keys anew.
    """
    kinds = Kinds.of(model.cache_specs())
    cannot = kinds is None or kinds.states or model.stable_tokens is not None
    return 0 if cannot or not model.cuts_layers else len(model.cache_specs())
