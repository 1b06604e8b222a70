"""One layer's buffers that several sequences share: each sequence's KV is a row of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlxkv.kv.buffers import extended
from mlxkv.kv.layout import Place


class Run(NamedTuple):
    """Rows `[start, stop)` that are read at once: their first columns, and which are visible.

    The mask is bool `[stop - start, 1, 1, n_columns]`; None where all are.
    """

    start: int
    stop: int
    n_columns: int
    mask: mx.array | None


class Access:
    """Where a step writes and reads a part's shared buffers, in layers of one window.

    Args:
        slots: rows that are written, in the batch's order.
        columns: theirs.
        runs: rows that are read.
        offsets: of the sequences after this step, in the batch's order.
        lengths: columns that each of these rows sees.
    """

    def __init__(
        self,
        slots: Sequence[int],
        columns: Sequence[int],
        runs: Sequence[Run],
        offsets: Sequence[int],
        lengths: Sequence[int],
    ):
        self.runs, self.offsets, self.lengths = runs, offsets, lengths
        self.n_columns = max([run.n_columns for run in runs])
        self._slots, self._columns = slots, columns
        self._n_in_order = len(slots) if list(slots) == list(range(len(slots))) else None
        self._made: dict[Any, Any] = {}

    def place(self, shared: SharedBuffers) -> Place | None:
        """Where a kernel writes native KV; None unless the sequences fill all slots in order."""
        is_fitting = shared.n_slots == self._n_in_order and self.n_columns <= shared.capacity
        if not is_fitting or len(shared.arrays) != 2:
            return None
        if "place" not in self._made:
            positions = tuple([offset - 1 for offset in self.offsets])
            self._made["place"] = positions, tuple(self._columns), tuple(self.lengths)
        keys, values = shared.arrays
        return Place(keys, values, *self._made["place"])

    def columns(self, n_slots: int, shape: tuple[int, ...]) -> mx.array | None:
        """uint32 `[n, H, 1, D]` if the sequences fill all slots in their order, else None."""
        if n_slots != self._n_in_order:
            return None
        if shape not in self._made:
            columns = mx.array(list(self._columns), dtype=mx.uint32)[:, None, None, None]
            self._made[shape] = mx.broadcast_to(columns, shape)
        return self._made[shape]

    def index(self, n_heads: int) -> tuple[mx.array, mx.array, mx.array]:
        """Slots, heads and columns, uint32 `[n, H]` each."""
        if n_heads not in self._made:
            # On the host: each step would launch operations.
            heads = [list(range(n_heads))] * len(self._slots)
            slots = [[slot] * n_heads for slot in self._slots]
            columns = [[column] * n_heads for column in self._columns]
            arrays = [mx.array(x, dtype=mx.uint32) for x in (slots, heads, columns)]
            self._made[n_heads] = tuple(arrays)
        return self._made[n_heads]


class SharedBuffers:
    """One layer's KV of a block.

    Args:
        arrays: `[n_slots, H, capacity, D]`, those of the keys and then those of the values.
    """

    def __init__(self, arrays: list[mx.array]):
        self.arrays = arrays

    @classmethod
    def like(cls, arrays: Sequence[mx.array], n_slots: int, capacity: int) -> SharedBuffers:
        """Empty buffers for rows such as `[1, H, S, D]`."""
        shapes = [(n_slots, x.shape[1], capacity, x.shape[3]) for x in arrays]
        return cls([mx.zeros(shape, x.dtype) for shape, x in zip(shapes, arrays, strict=True)])

    @property
    def n_slots(self) -> int:
        return self.arrays[0].shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for."""
        return self.arrays[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one sequence."""
        return sum(x.nbytes // (x.shape[0] * x.shape[2]) for x in self.arrays)

    def write(self, rows: Sequence[mx.array], access: Access) -> None:
        """Write one token of some sequences, `[n, H, 1, D]` for each array, by a scatter each."""
        written = []
        for array, x in zip(self.arrays, rows, strict=True):
            if x.size == 0:  # latent attention's values, which are part of the keys
                written.append(array)
                continue
            columns = access.columns(array.shape[0], x.shape)
            if columns is not None:  # a third of the host's time
                written.append(mx.put_along_axis(array, columns, x, axis=2))
                continue
            array = array[...]  # a handle of its own: an interrupt leaves `arrays` unchanged
            array[access.index(array.shape[1])] = x.squeeze(2)
            written.append(array)
        self.arrays = written

    def read(self, run: Run) -> list[mx.array]:
        """A run's rows of each array."""
        start, stop = run.start, run.stop
        if start == 0 and stop == self.arrays[0].shape[0]:
            return self.arrays
        return [array[start:stop] for array in self.arrays]

    def reserve(self, capacity: int) -> None:
        """Grow each row to `capacity` tokens, by a copy."""
        if capacity > self.capacity:
            self.arrays = [extended(array, self.capacity, capacity) for array in self.arrays]

    def put(self, slot: int, rows: Sequence[mx.array]) -> None:
        """Write a sequence's rows `[1, H, n, D]` from column 0 on, and zeros behind them.

        A NaN that an earlier sequence left there would stay one when multiplied by a weight of 0.
        """
        written = []
        for array, x in zip(self.arrays, rows, strict=True):
            if x.size:
                array = array[...]
                array[slot : slot + 1] = padded(x, self.capacity)
            written.append(array)
        self.arrays = written


def padded(x: mx.array, n_columns: int) -> mx.array:
    """Rows `[B, H, n, D]` with zeros behind them."""
    n_missing = n_columns - x.shape[2]
    return mx.pad(x, [(0, 0), (0, 0), (0, n_missing), (0, 0)]) if n_missing else x
