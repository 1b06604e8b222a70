"""The cache of a layer that keeps a state in place of keys and values.

Invariants:
- State and offset are stored at once, with nothing called in between: an interrupt finds the state
  as it was before or as it is after.
- An array that was stored is not written to: what `read` gave stays as it was.
- Of a pass with a draft the state before it and what its tokens wrote are held until the next
  `store`, not the states behind each: one is computed again where a draft was wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxkv.errors import UsageError
from mlxkv.kv.layout import Mask, Replay, Slice
from mlxkv.kv.storage import Rows
from mlxkv.kv.types import CacheSpec, RecurrentSpec


@dataclass(slots=True)
class StateRows:
    """The states of several sequences in one layer, a row each, and tokens since they are here."""

    now: tuple[tuple[mx.array, ...], int]


class RecurrentCache:
    """The state of a layer that keeps one in place of keys and values.

    It goes forward, or back to a state that was taken by `read`, or to one within the last pass
    with a draft; to the start always. While sequences are decoded together their states are rows of
    the same arrays (`share`); the first look at a cache's own state takes its row out.

    Args:
        spec: the layer's shape.
    """

    __slots__ = (
        "__weakref__", "_at", "_first", "_own", "_replay", "_rows", "copied", "is_drafted", "spec",
    )  # fmt: skip

    def __init__(self, spec: RecurrentSpec):
        self.spec: CacheSpec | None = spec
        self.copied: Callable[[mx.array], mx.array] = mx.contiguous
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._own: tuple[tuple[mx.array, ...], int] = ((), 0)
        self._rows, self._first, self._at = None, 0, 0
        self.is_drafted = False
        self._replay: tuple[int, Replay] | None = None

    @property
    def offset(self) -> int:
        """Tokens that the state has seen."""
        rows = self._rows
        return self._own[1] if rows is None else self._first + rows.now[1]

    def __len__(self) -> int:
        return self.offset

    @property
    def first(self) -> int:
        """The oldest position that can be read: the last token's."""
        return max(0, self.offset - 1)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The state, `[B, ...]` each; `()` before the first token."""
        if (rows := self._rows) is not None:
            arrays, offset, at = rows.now[0], self.offset, self._at
            # A view would keep the states of all sequences alive.
            self._own = tuple(self.copied(x[at : at + 1]) for x in arrays), offset
            self._rows = None
        return self._own[0]

    def begin_draft(self) -> None:
        """The next tokens are those of a draft: until the next `store` they can be taken back."""
        self.is_drafted = True

    def store(self, arrays: Sequence[mx.array], n_new: int, replay: Replay | None = None) -> None:
        """Replace the state by the one that `n_new` more tokens leave.

        Args:
            arrays: `[B, ...]` each; a view of something larger is copied.
            n_new: at least 1.
            replay: gives the states between, where `is_drafted`.
        """
        copied, before = tuple(map(self.copied, arrays)), self.offset
        kept = None if replay is None else (before, replay)
        self._rows, self._own, self._replay = None, (copied, before + n_new), kept
        self.is_drafted = False

    def share(self, rows: StateRows, at: int) -> None:
        """Use the row `at` of states that several sequences share: that of this cache, just put in.

        What is stored there from now on counts as this cache's.
        """
        first = self.offset - rows.now[1]
        self._rows, self._first, self._at = rows, first, at
        self._own, self._replay = ((), 0), None

    def is_row_of(self, rows: StateRows, at: int) -> bool:
        """Whether its state is that row."""
        return self._rows is rows and self._at == at

    @property
    def state(self) -> list[mx.array]:
        """Arrays held, to evaluate or save; `[]` when empty."""
        return list(self.arrays)

    @property
    def buffers(self) -> list[mx.array]:
        """`state`, which a traced step replaces."""
        return self.state

    @buffers.setter
    def buffers(self, arrays: Sequence[mx.array]) -> None:
        self._rows, self._own = None, (tuple(arrays), self.offset)

    @property
    def nbytes(self) -> int:
        """Bytes that the state takes, and the one before the last draft while that is held."""
        return self.state_bytes * (1 if self._replay is None else 2)

    @property
    def state_bytes(self) -> int:
        """Bytes that the state takes; of shared rows this sequence's part."""
        rows = self._rows
        arrays = self._own[0] if rows is None else rows.now[0]
        return sum(x.nbytes // (1 if rows is None else x.shape[0]) for x in arrays)

    def mask(self, L: int) -> Mask:
        """As a growing cache's: a state sees what came before."""
        return None if L == 1 else "causal"

    def update(self, k: mx.array, v: mx.array) -> tuple[Rows, Rows]:
        """Raises UsageError: a state takes no keys and values."""
        raise UsageError("this layer keeps a state and takes no keys and values: use `store`")

    def read(self, start: int, stop: int) -> Slice:
        """The state behind the last token, for `load`: as the row of that token.

        Arrays `[B, n_tail, 1, n_channels]` and `[B, n_heads, 1, key_dim * value_dim]`.

        Raises:
            UsageError: other positions than the last token's.
        """
        if not self.offset or (start, stop) != (self.offset - 1, self.offset):
            raise UsageError(f"cannot read [{start}, {stop}): a state is read at its last token")
        tail, state = self.arrays
        return Slice((tail[:, :, None], state.flatten(-2)[:, :, None]), start, stop)

    def load(self, parts: Sequence[Slice], room: int = 0) -> None:
        """Take the state that `read` gave, the last of `parts`; `room` counts nothing.

        Raises:
            UsageError: it has another shape.
        """
        spec, last = self.spec, parts[-1]
        assert isinstance(spec, RecurrentSpec)
        rows = (spec.n_tail, spec.n_channels), (spec.n_heads, spec.key_dim * spec.value_dim)
        for array, (n, size) in zip(last.arrays, rows, strict=True):
            if array.shape[1:] != (n, 1, size):
                raise UsageError(f"a state of {array.shape[1:]}; this layer's are {(n, 1, size)}")
        tail, state = last.arrays
        state = state.reshape(-1, spec.n_heads, spec.key_dim, spec.value_dim)
        arrays = tuple(map(self.copied, (tail.squeeze(2), state)))
        self._rows, self._own, self._replay = None, (arrays, last.stop), None

    def rewind(self, offset: int) -> bool:
        """Forget the tokens from `offset` on: possible at the tip, within the last pass with a
        draft, and to 0, which starts again.

        Raises:
            UsageError: `offset` is negative or lies ahead.
        """
        if not 0 <= offset <= self.offset:
            raise UsageError(f"cannot rewind to {offset}: allowed is 0 to {self.offset}")
        if offset == 0:
            self.reset()
        elif self._replay is not None and self._replay[0] <= offset < self.offset:
            start, replay = self._replay
            self._rows, self._own = None, (tuple(map(self.copied, replay(offset - start))), offset)
        return offset == self.offset
