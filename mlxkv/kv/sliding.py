"""The order of a window's rows, and room behind a full one for what may be taken back.

A ring writes over its oldest tokens, so it cannot give them back where a draft was wrong. Before a
draft, a full window is moved into buffers of some rows more (`make_room`), once for all that come
until these are used up. Then, if single tokens come, it is a ring again.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlxkv.kv.buffers import Buffers, extended
from mlxkv.kv.layout import Place
from mlxkv.kv.storage import Rows

ROOM = 64
"""Rows behind a window."""


class Sliding(Buffers):
    """Buffers of a window of `max_size` tokens.

    `_n` rows are in temporal order from `_head` on, and go on at the beginning (`_wraps`) in a ring
    alone, of `max_size` rows.
    """

    __slots__ = ("_head", "_n", "max_size")

    _head: int
    _n: int
    max_size: int

    def make_room(self, n: int) -> None:
        """Have n tokens behind a full window written so that they can be taken back."""
        if self._n + n <= self.max_size or n > ROOM or self._has_behind(n):
            return
        kept = min(self._n, self.max_size)
        old = self._temporal(self._n - kept, self._n)
        buffers = [extended(x, kept, self.max_size + ROOM) for x in old]
        self.buffers, self.row, self._n, self._head = buffers, None, kept, 0

    def room_bytes(self, n: int) -> int:
        """Bytes that `make_room` takes while it moves a window."""
        if self._n + n <= self.max_size or self._has_behind(n):
            return 0
        rows = self.max_size + ROOM
        return sum(x.nbytes // x.shape[2] * rows for x in self.arrays)

    def _temporal(self, start: int, stop: int) -> tuple[mx.array, ...]:
        """Rows `[start, stop)` counted from the oldest, in temporal order."""
        start, stop = start + self._head, stop + self._head
        arrays, capacity = self.arrays, self.capacity
        if start >= capacity:
            start, stop = start - capacity, stop - capacity
        if stop <= capacity:
            return tuple(array[:, :, start:stop] for array in arrays)
        stop -= capacity
        return tuple(
            mx.concatenate([array[:, :, start:], array[:, :, :stop]], axis=2) for array in arrays
        )

    def _straighten(self) -> None:
        """Have the rows begin at 0, in buffers of its own."""
        buffers = list(self._temporal(0, self._n))
        self.buffers, self.row, self._head = buffers, None, 0

    @property
    def _wraps(self) -> bool:
        """Whether rows go on at the buffers' beginning."""
        return self._head + self._n > self.capacity

    def _has_behind(self, n: int) -> bool:
        """Whether n tokens go into the room behind a window."""
        capacity = self.capacity
        is_long = self.max_size < capacity <= self.max_size + ROOM and self.row is None
        return is_long and self._head + self._n + n <= capacity

    def _behind(self, arrays: Sequence[mx.array], n: int) -> tuple[Rows, Rows]:
        """Write n tokens behind a window; what they see."""
        stop = self._head + self._n
        buffers = self._written(self.buffers, arrays, stop, stop + n)
        self._moved_on(buffers, n)
        return self.decoded(buffers, self._n, self._head)

    def _moved_on(self, buffers: list[mx.array], n: int) -> None:
        """Hold n tokens more, which were written behind the window, and drop what none sees."""
        kept = min(self._n, self.max_size - 1)
        head, offset = self._head + self._n - kept, self.offset + n
        self.buffers, self._n, self._head, self.offset = buffers, kept + n, head, offset

    def _place_behind(self, n: int) -> Place | None:
        """Where a kernel writes n tokens behind a window."""
        if (place := self._place(self._head + self._n, n)) is None:
            return None
        starts = tuple(max(self._head, at + 1 - self.max_size) for at in place.columns)
        seen = tuple(at + 1 - start for at, start in zip(place.columns, starts, strict=True))
        return place._replace(lengths=seen, starts=starts)
