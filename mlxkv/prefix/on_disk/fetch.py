"""Reads pages from disk before a prompt needs them, on a thread of its own. No MLX.

Invariants:
- A page is read and checked as by `PageFiles.read`. One that cannot be read is not held: its prompt
  reads it again, and handles that.
- What is held is bounded in bytes, and given up `KEEP_S` after the last request to fetch. The
  thread ends then. The bound is raised by `fetch` alone, and falls as pages are taken: it never has
  more than what is held and what is still to be read.
- What was fetched on a guess, before its request was known, makes way for what a request needs.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from mlxkv.base.faults import log_fault
from mlxkv.errors import contained
from mlxkv.prefix.on_disk.format import PageFile, PageKey

KEEP_S = 10.0
"""How long pages are held that no prompt took: its request may have been cancelled."""


class PageFetcher:
    """See the module.

    Args:
        read: reads one page; None for a page that cannot be read.
    """

    def __init__(self, read: Callable[[PageKey], PageFile | None]):
        self._read = read
        self._changed = threading.Condition()
        self._queue: deque[PageKey] = deque()
        self._held: dict[PageKey, tuple[PageFile, float]] = {}  # and how long reading it took
        self._guessed: set[PageKey] = set()
        self._held_bytes = self._limit_bytes = 0
        self._used_bytes, self._saved_s = 0, 0.0
        self._reading: PageKey | None = None
        self._thread: threading.Thread | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self._held_bytes

    @property
    def limit_bytes(self) -> int:
        """Bytes that may be held, now or when more is read."""
        return self._limit_bytes

    def fetch(self, keys: Sequence[PageKey], limit_bytes: int, *, is_guess: bool = False) -> None:
        """Begin to read pages.

        Args:
            keys: of the pages, the first needed first.
            limit_bytes: that may be held; the pages behind are not read.
            is_guess: whether no request is known to need them.
        """
        with self._changed:
            if not is_guess:
                self._guessed.difference_update(keys)
                self._drop(self._guessed)
            self._limit_bytes = max(limit_bytes, self._held_bytes)
            known = {*self._queue, *self._held, self._reading}
            new = [key for key in keys if key not in known]
            self._queue += new
            self._guessed.update(new if is_guess else ())
            self._lower_limit()
            if self._queue and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def take(self, key: PageKey) -> PageFile | None:
        """A page that was fetched, which is not held any more; waits if it is being read now."""
        with self._changed:
            if key in self._queue:
                self._queue.remove(key)
            self._changed.wait_for(lambda: self._reading != key)
            self._guessed.discard(key)
            held = self._held.pop(key, None)
            if held is not None:
                self._held_bytes -= held[0].nbytes
                self._limit_bytes -= held[0].nbytes
            self._lower_limit()
            if held is None:
                return None
            page, seconds = held
            self._used_bytes += page.nbytes
            self._saved_s += seconds
            return page

    def spent(self) -> tuple[int, float]:
        """Bytes of the pages that were taken since the last call, and seconds of reading them."""
        with self._changed:
            found = self._used_bytes, self._saved_s
            self._used_bytes, self._saved_s = 0, 0.0
            return found

    def settle(self) -> None:
        """Wait until all is read."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and self._reading is None)

    def clear(self) -> int:
        """Give up what is held, and read no more; the bytes given up."""
        with self._changed:
            freed = self._held_bytes
            self._queue.clear()
            self._held.clear()
            self._guessed.clear()
            self._held_bytes = self._limit_bytes = 0
            self._changed.notify_all()
            return freed

    def _lower_limit(self) -> None:
        """Nothing is to be read: no more than is held will be."""
        if not self._queue and self._reading is None:
            self._limit_bytes = self._held_bytes

    def _drop(self, keys: set[PageKey]) -> None:
        """Give up some of what is held or to be read."""
        for key in keys & self._held.keys():
            self._held_bytes -= self._held.pop(key)[0].nbytes
        self._queue = deque(key for key in self._queue if key not in keys)
        keys.clear()

    def _run(self) -> None:
        while (key := self._next()) is not None:
            page, started = None, time.perf_counter()
            try:
                page = self._read(key)
            except BaseException as error:
                log_fault("a page was not fetched", contained(error))
            with self._changed:
                self._reading = None
                if page is not None and self._held_bytes + page.nbytes <= self._limit_bytes:
                    self._held[key] = page, time.perf_counter() - started
                    self._held_bytes += page.nbytes
                elif page is not None:
                    self._queue.clear()
                self._lower_limit()
                self._changed.notify_all()

    def _next(self) -> PageKey | None:
        """The next page to read; None when there has been none for a while, and the thread ends."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._queue, KEEP_S):
                self._held.clear()
                self._guessed.clear()
                self._held_bytes = self._limit_bytes = 0
                self._thread = None
                return None
            self._reading = self._queue.popleft()
            return self._reading
