"""Weights that MLX reads while this thread goes on: no more of them than take `MOST_BYTES`.

An array that is to be read has its memory from then on, and a fused copy beside its parts, so what
is begun at a time bounds what loading takes beyond the model.
"""

from __future__ import annotations

from collections import deque

import mlx.core as mx

MOST_BYTES = 64 << 20
"""Of weights that are being read."""


class Reading:
    """Weights that are being read, the oldest first."""

    def __init__(self) -> None:
        self._arrays: deque[list[mx.array]] = deque()
        self._n_bytes = 0

    def add(self, arrays: list[mx.array], *, copied: bool) -> bool:
        """Begin to read arrays, and wait for earlier ones, beyond `MOST_BYTES`. Whether it waited.

        Args:
            arrays: as they will be.
            copied: whether they are made of others, which take memory too until they are there.
        """
        mx.async_eval(arrays)
        self._arrays.append(arrays)
        self._n_bytes += sum(x.nbytes for x in arrays)
        is_full = self._n_bytes >= MOST_BYTES
        while self._n_bytes >= MOST_BYTES and len(self._arrays) > (not copied):
            self._wait()
        return is_full

    def finish(self) -> None:
        """Wait for all of them."""
        while self._arrays:
            self._wait()

    def _wait(self) -> None:
        oldest = self._arrays.popleft()
        mx.eval(oldest)
        self._n_bytes -= sum(x.nbytes for x in oldest)
