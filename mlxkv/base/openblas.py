"""Work buffers of OpenBLAS, taken before they are needed.

A product takes a buffer of 128 MiB (address space: few pages of it are ever touched) for as long as
it runs, from a pool that grows when more products run at a time than ever before, and never
shrinks. When the system refuses a buffer OpenBLAS asks again for ever (`blas_memory_alloc` in its
driver/others/memory.c), so under a limit on address space a process would hang at 100%. The pool is
therefore grown when streams are made, after a trial whether there is room for it.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref

from mlxkv.base.units import human_bytes
from mlxkv.errors import OutOfMemory

BUFFER_BYTES = 128 << 20
PAGES_BYTES = 1 << 20
"""What OpenBLAS maps beside a buffer at most, to align it."""
LIBRARY_BYTES = 64 << 20
"""The library itself (36 MiB), and what it maps for a moment when it is loaded."""
SHARE = 4
"""Buffers take at most this part of a limit on address space; fewer cores compute where need be."""


class _Taken:
    """The number of buffers for one thread's streams; lives as long as the thread."""

    def __init__(self, n: int):
        self.n = n


class Buffers:
    """The pool of one process.

    Attributes:
        n_taken: buffers that it has at least.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._taken: weakref.WeakSet[_Taken] = weakref.WeakSet()
        self.n_taken = 0

    def take(self, library: str, n_streams: int, limit_bytes: int | None) -> int:
        """Take buffers for the calling thread's streams; how many streams it may have.

        Args:
            library: the OpenBLAS that is loaded.
            n_streams: streams that it would like.
            limit_bytes: limit on the address space of the process, if there is one.

        Raises:
            OutOfMemory: there is no room for a buffer for each.
        """
        n_streams = n_allowed(n_streams, limit_bytes)
        with self._lock:
            mine = _Taken(n_streams + _n_threads() - 1)
            before = getattr(self._of_thread, "taken", None)
            n = mine.n + sum(taken.n for taken in self._taken if taken is not before)
            if n > self.n_taken:
                _try(n - self.n_taken)
                _grow(ctypes.CDLL(library), n)
                self.n_taken = n
            self._of_thread.taken = mine
            self._taken.add(mine)
        return n_streams


def n_allowed(n_streams: int, limit_bytes: int | None) -> int:
    """The streams that a limit on address space allows, at least one."""
    if limit_bytes is None:
        return n_streams
    return max(1, min(n_streams, limit_bytes // SHARE // BUFFER_BYTES))


def has_room() -> bool:
    """Whether the library can be loaded: it ends the process if it gets no buffer then."""
    return _can_map(LIBRARY_BYTES + BUFFER_BYTES + PAGES_BYTES)


def _try(n: int) -> None:
    """Map and release as much as `n` buffers take."""
    n_bytes = n * (BUFFER_BYTES + PAGES_BYTES)
    if not _can_map(n_bytes):
        raise OutOfMemory(
            f"OpenBLAS needs {human_bytes(n_bytes)} of address space for {n} products at a time, "
            "and the limit on this process's memory (ulimit -v, ulimit -d) does not leave that: "
            "raise it, or set MLXKV_BLAS=0 to compute without OpenBLAS, slowly"
        )


def _can_map(n_bytes: int) -> bool:
    import mmap

    try:
        mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, MemoryError):
        return False
    return True


def _grow(library: ctypes.CDLL, n: int) -> None:
    """Grow the pool to `n` buffers: hold so many at a time, then give them back to it."""
    try:
        allocate, free = library.blas_memory_alloc, library.blas_memory_free
    except AttributeError:  # not in this build of OpenBLAS
        return
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_int]
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    for buffer in [allocate(0) for _ in range(n)]:
        if buffer:
            free(buffer)


def _n_threads() -> int:
    """Threads of OpenBLAS' own, each of which has a buffer."""
    text = os.environ.get("OPENBLAS_NUM_THREADS", "1")
    return max(1, int(text)) if text.isdecimal() else 1


BUFFERS = Buffers()
"""Of the process."""
