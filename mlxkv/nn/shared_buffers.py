"""One layer's buffers that several sequences share: each sequence's KV is a row of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from mlxkv.kv.buffers import extended


class Places(Protocol):
    """Where a step writes the tokens of some sequences."""

    def columns(self, n_slots: int, shape: tuple[int, ...]) -> mx.array | None:
        """uint32 `[n, H, 1, D]` if the sequences fill all slots in their order, else None."""
        ...

    def index(self, n_heads: int) -> tuple[mx.array, mx.array, mx.array]:
        """Slots, heads and columns, uint32 `[n, H]` each."""
        ...


class SharedBuffers:
    """One layer's KV of a group.

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
        """Rows."""
        return self.arrays[0].shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for."""
        return self.arrays[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(array.nbytes for array in self.arrays)

    def write(self, rows: Sequence[mx.array], places: Places) -> None:
        """Write one token of each of some sequences: one scatter an array.

        Args:
            rows: `[n, H, 1, D]`, in the order of `arrays`.
            places: where they go.
        """
        written = []
        for array, x in zip(self.arrays, rows, strict=True):
            if x.size == 0:  # values of latent attention, which are part of the keys
                written.append(array)
                continue
            columns = places.columns(array.shape[0], x.shape)
            if columns is not None:  # the same in a third of the host's time
                written.append(mx.put_along_axis(array, columns, x, axis=2))
                continue
            array = array[...]  # a handle of its own: an interrupt finds what was there
            array[places.index(array.shape[1])] = x.squeeze(2)
            written.append(array)
        self.arrays = written

    def read(self, n_rows: int) -> list[mx.array]:
        """The first rows of each array."""
        if n_rows == self.arrays[0].shape[0]:
            return self.arrays
        return [array[:n_rows] for array in self.arrays]

    def reserve(self, capacity: int) -> None:
        """Have room for so many tokens in each row; copies all of them."""
        if capacity > self.capacity:
            self.arrays = [extended(array, self.capacity, capacity) for array in self.arrays]

    def rows(self, slot: int) -> list[mx.array]:
        """A copy of one row: what is written from a view of itself is not written in place."""
        rows = [mx.contiguous(array[slot : slot + 1]) for array in self.arrays]
        mx.eval(rows)
        return rows

    def put(self, slot: int, rows: Sequence[mx.array]) -> None:
        """Write a sequence's rows `[1, H, n, D]` from column 0 on, and zeros behind them.

        What an earlier sequence left there would be multiplied by a weight of 0: a NaN stays one.
        """
        written = []
        for array, x in zip(self.arrays, rows, strict=True):
            if x.size:
                array = array[...]
                array[slot : slot + 1] = _padded(x, self.capacity)
            written.append(array)
        self.arrays = written

    def resize(self, n_slots: int, capacity: int) -> None:
        """Have so many rows of so many tokens; what is left is copied."""
        if n_slots <= self.n_slots and capacity <= self.capacity:
            cut = [array[:n_slots, :, :capacity] for array in self.arrays]
            self.arrays = [mx.contiguous(array) for array in cut]
            return
        before, kept = self.arrays, min(capacity, self.capacity)
        self.arrays = SharedBuffers.like(before, n_slots, capacity).arrays
        for array, old in zip(self.arrays, before, strict=True):
            array[: old.shape[0], :, :kept] = old[:n_slots, :, :kept]


def _padded(x: mx.array, n_columns: int) -> mx.array:
    """Rows `[1, H, n, D]` with zeros behind them."""
    n_missing = n_columns - x.shape[2]
    return mx.pad(x, [(0, 0), (0, 0), (0, n_missing), (0, 0)]) if n_missing else x
