"""One model for steps whose rows have different adapters of one base.

Invariants:
- What it keeps are copies of the adapters' matrices, side by side. They are made anew where a row
  comes with an adapter that is not among them; one whose row has left stays until then.
- Without room for the copies there is no such model, and rows are computed one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxkv.generation.session import Session
from mlxkv.kv.layout import LayerCache
from mlxkv.nn import kernels
from mlxkv.nn.lora_rows import RowChanges, merge_changes
from mlxkv.nn.model import CausalLM

Room = Callable[[int], bool]


class MixedModels:
    """See the module.

    Args:
        count: called with the bytes that are taken, negative for those that are freed.
    """

    def __init__(self, count: Callable[[int], None] = lambda n_bytes: None):
        self._count = count
        self._models: list[CausalLM] = []
        self._merged: CausalLM | None = None
        self._changes = RowChanges(0)
        self._nbytes = 0
        self._refused: set[int] = set()  # ids of those that there was no room for

    def of(self, models: Sequence[CausalLM], room: Room) -> CausalLM | None:
        """The model whose next step computes row i as `models[i]` does; None: there is none.

        Args:
            models: of one base.
            room: whether so many bytes are free.
        """
        first = models[0]
        if all(model is first for model in models):
            return first
        if not all(any(model is known for known in self._models) for model in models):
            self._make(models, room)
        if self._merged is None:
            return None
        ids = [id(model) for model in self._models]
        self._changes.set([ids.index(id(model)) for model in models])
        return self._merged

    def clear(self) -> None:
        """Forget everything."""
        self._count(-self._nbytes)
        self._models, self._merged, self._nbytes = [], None, 0
        self._changes, self._refused = RowChanges(0), set()

    def _make(self, models: Sequence[CausalLM], room: Room) -> None:
        plain = models[0].plain
        wanted = {id(model): model for model in (plain, *models)}
        if not plain.merges_adapters or wanted.keys() == self._refused:
            self._merged = None
            return
        self.clear()
        changes, known = RowChanges(len(wanted)), list(wanted.values())
        merged = merge_changes(known, changes)
        n_bytes = sum(array.nbytes for array in changes.arrays)
        if not room(n_bytes):
            self._refused = set(wanted)
            return
        mx.eval(changes.arrays)
        kernels.ask_for_huge_pages(changes.arrays)
        self._models, self._merged, self._changes = known, merged, changes
        self._nbytes = n_bytes
        self._count(n_bytes)


def next_logits(
    model: CausalLM, tokens: mx.array, caches: Sequence[LayerCache], hear: bool
) -> tuple[mx.array, mx.array | None]:
    """Logits `[B, V]` behind tokens `[B, 1]`; to hear them, hidden states `[B, 1, E]` as well."""
    if not hear:
        return model.last_logits(tokens, caches), None
    hidden = model.hidden_states(tokens, caches)
    return model.logits(hidden)[:, 0], hidden


def each_alone(
    sessions: Sequence[Session], tokens: mx.array, hear: bool
) -> tuple[mx.array, mx.array | None]:
    """`next_logits` of sequences that have no model in common, one after the other."""
    rows = zip(sessions, mx.split(tokens, len(sessions)), strict=True)
    found = [next_logits(row.model, token, row.caches, hear) for row, token in rows]
    hidden = [x for _, x in found if x is not None]
    return mx.concatenate([x for x, _ in found]), mx.concatenate(hidden) if hear else None
