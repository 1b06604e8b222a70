"""The states of several sequences in one step, for layers that keep no keys and values.

Invariants:
- The states lie behind each other in the same arrays from step to step: nothing is copied but when
  sequences join or leave.
- Arrays and the count of tokens are stored at once: an interrupt leaves each sequence with a state
  and the offset that belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxkv.errors import UsageError
from mlxkv.kv.layout import Mask, Replay
from mlxkv.kv.recurrent import RecurrentCache, StateRows
from mlxkv.kv.storage import Rows


class BatchStates:
    """One layer's states of several sequences, for one token of each at a time.

    Args:
        caches: those of the layer, of one sequence each.
    """

    is_drafted = False

    def __init__(self, caches: Sequence[RecurrentCache]):
        self.caches = tuple(caches)
        self._rows: StateRows | None = None

    @property
    def offset(self) -> int:
        """Position of the first sequence's next token: states know no positions."""
        return self.caches[0].offset

    def mask(self, L: int) -> Mask:
        """None: a state has seen what came before."""
        return None

    def update(self, k: mx.array, v: mx.array) -> tuple[Rows, Rows]:
        """Raises UsageError: a state takes no keys and values."""
        return self.caches[0].update(k, v)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The states, `[B, ...]` each, in the order of the sequences."""
        rows = self._rows
        if rows is not None and all(c.is_row_of(rows, i) for i, c in enumerate(self.caches)):
            return rows.now[0]
        own = [cache.arrays for cache in self.caches]
        if not all(own):
            raise UsageError("a sequence without tokens cannot be decoded in a batch")
        rows = StateRows((tuple(mx.concatenate(list(x)) for x in zip(*own, strict=True)), 0))
        for i, cache in enumerate(self.caches):
            cache.share(rows, i)
        self._rows = rows
        return rows.now[0]

    def store(self, arrays: Sequence[mx.array], n_new: int, replay: Replay | None = None) -> None:
        """Replace the states, which `arrays` gave before, by those that `n_new` tokens leave."""
        assert self._rows is not None, "a step begins with a look at the states"
        self._rows.now = tuple(map(mx.contiguous, arrays)), self._rows.now[1] + n_new
