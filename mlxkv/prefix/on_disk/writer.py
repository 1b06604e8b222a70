"""Pages on disk: the SSD half of the prefix cache. NumPy arrays in and out, no MLX.

Invariants:
- `read` returns exactly what was written, or None. A file that is damaged, truncated, foreign or of
  an older format is removed and is a miss, never an error.
- A background thread writes files. Pages that do not fit (cap, free space, daily budget, a full
  disk, a read-only folder) are not written and counted in `usage().refused`, never an error.
- The index has the pages that this process knows of. Other processes share the folder: a page that
  is not in the index is looked up there, and a removed one leaves the index when it is read.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mlxkv.base.durable import sync_path
from mlxkv.base.faults import log_fault
from mlxkv.base.seal import seal_of_environment, sealed_bytes
from mlxkv.prefix.eviction import (
    SMALLEST_CAP_BYTES,
    DiskLimits,
    DiskUsage,
    Room,
    reserved_bytes,
)
from mlxkv.prefix.index import PageIndex
from mlxkv.prefix.model_files import ModelFiles
from mlxkv.prefix.on_disk.folder import Folder
from mlxkv.prefix.on_disk.format import (
    FORMAT_VERSION,
    ROOT,
    DamagedPage,
    PageFile,
    PageKey,
    page_name,
)

__all__ = ["FORMAT_VERSION", "ROOT", "DiskLimits", "DiskUsage", "PageFile", "PageFiles", "PageKey",
           "page_name"]  # fmt: skip

T = TypeVar("T")

QUEUE_BYTES = 512 << 20
"""Bytes of the queue at most: no memory plan counts them."""
BATCH_BYTES = 128 << 20
"""Bytes written under one lock: another process waits for a tenth of a second."""
LOCK_WAIT_S = 10.0
GIVE_WAY_S = 0.005
"""Pause between batches, in which other processes, which poll, can get the lock."""


@dataclass(frozen=True, slots=True)
class _Queued:
    page: PageFile
    keep: bool

    @property
    def reserved_bytes(self) -> int:
        return reserved_bytes(sealed_bytes(self.page.bound_bytes))


@dataclass(slots=True)
class _Outcome:
    """The outcome of writing a batch.

    Args:
        written: pages on disk.
        evicted: pages that made room.
        reasons: page -> why it was not written.
        reason: why all others were not.
    """

    written: set[PageKey] = field(default_factory=set)
    evicted: list[PageKey] = field(default_factory=list)
    reasons: dict[PageKey, str] = field(default_factory=dict)
    reason: str = "internal error"


class PageFiles:
    """The pages of one model in one dtype and KV format.

    Args:
        root: the folder of all models' pages; need not exist.
        fingerprint: see `fingerprint.fingerprint`.
        limits: of the folder.
        window_pages: pages before a leaf or branch whose window part is needed to resume there.

    Attributes:
        at: where the files lie.
    """

    def __init__(self, root: Path, fingerprint: str, limits: DiskLimits, *, window_pages: int = 0):
        self.fingerprint = fingerprint
        self.window_pages = window_pages
        self.folder = Folder(root, limits)
        self.at = ModelFiles(self.folder, fingerprint, seal_of_environment())
        self._index = PageIndex()
        self._waiting: dict[PageKey, PageFile] = {}
        self._queue: deque[_Queued] = deque()
        self._queued_bytes = 0
        self._refused: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._start()

    def _start(self) -> None:
        """Read the index, and remove dead processes' files unless another process is writing."""
        if not self.folder.root.is_dir():
            return
        if self.folder.limits.cap_bytes >= SMALLEST_CAP_BYTES:
            with suppress(OSError), self.folder.locked(0):
                pass
        for key in self.at.present():
            self._index.add(key)

    def __contains__(self, key: PageKey) -> bool:
        with self._changed:
            if key in self._index:
                return True
        try:
            os.stat(self.at.path(key))  # noqa: PTH116
        except OSError:
            return False
        with self._changed:
            self._index.add(key)
        return True

    def children(self, parent: str) -> list[tuple[str, int]]:
        """(name, tokens) of the known pages behind a page."""
        with self._changed:
            return self._index.children(parent)

    def tokens(self, key: PageKey) -> bytes | None:
        """The tokens of a page, from its file's header alone; None as for `read`."""
        with self._changed:
            waiting = self._waiting.get(key)
        if waiting is not None:
            return waiting.tokens
        return self._checked(key, self._bytes(key, header_only=True), self.at.decode_tokens)

    def parents(self) -> dict[str, str]:
        """Of each whole page that is known, the page that it follows."""
        with self._changed:
            return self._index.parents()

    def read(self, key: PageKey) -> PageFile | None:
        """A page, checked; None if it is missing, or was damaged and is now removed."""
        with self._changed:
            waiting = self._waiting.get(key)
        if waiting is not None:
            return waiting
        return self._checked(key, self._bytes(key), self.at.decode)

    def _checked(
        self, key: PageKey, data: bytes | None, decode: Callable[[bytes, PageKey], T]
    ) -> T | None:
        """What `decode` reads; None without data, or of a damaged page, which is removed."""
        if data is None:
            return None
        try:
            return decode(data, key)
        except DamagedPage:
            self.remove(key)
            return None

    def remove(self, key: PageKey) -> None:
        """Delete one page's file."""
        with suppress(OSError):
            os.unlink(self.at.path(key))  # noqa: PTH108
        with self._changed:
            self._index.discard(key)

    def used(self, keys: Sequence[PageKey]) -> None:
        """Mark pages as used now; of one call's pages, leaves count as older than trunks."""
        with self._changed:
            here = [key for key in keys if key not in self._waiting and key in self._index]
        now = time.time_ns()
        for key in here:
            with suppress(OSError):
                os.utime(self.at.path(key), ns=(now, now))

    def write(self, pages: Iterable[PageFile], *, keep: bool = False, wait: bool = False) -> int:
        """Queue pages for the background, trunk first.

        Args:
            pages: read one by one, while there is room in the queue.
            keep: of a named KV: synced, and not refused by the daily budget.
            wait: wait while the queue is full; else the rest is refused.

        Returns:
            Bytes of tensors that were queued, without pages that exist already.
        """
        accepted = 0
        if self.folder.limits.cap_bytes < SMALLEST_CAP_BYTES:
            with self._changed:
                self._refused["cap"] += 1
            return accepted
        try:
            for page in pages:
                if not keep and page.key in self:
                    continue
                with self._changed:
                    if not self._put(_Queued(page, keep), wait):
                        self._refused["queue"] += 1
                        break
                accepted += page.nbytes
        finally:
            # Only now: what was queued together is written together, under one lock.
            with self._changed:
                self._wake()
        return accepted

    def flush(self) -> None:
        """Wait until the whole queue is written or refused."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def usage(self) -> DiskUsage:
        """The folder's use of the disk, and pages that this process could not write."""
        scan = self.folder.scan()
        with self._changed:
            refused = dict(self._refused)
        return DiskUsage(scan.n_bytes, len(scan.pages), self.folder.written_today(), refused)

    def own_bytes(self) -> int:
        """Bytes of the files with this fingerprint."""
        return sum(x.n_bytes for x in self.folder.scan().pages if x.model == self.at.model)

    def close(self) -> None:
        """Write the queue and stop."""
        self.flush()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _bytes(self, key: PageKey, *, header_only: bool = False) -> bytes | None:
        """A file's bytes; None if it is missing or cannot be opened."""
        try:
            return self.at.read(key, header_only=header_only)
        except FileNotFoundError:
            with self._changed:
                self._index.discard(key)
        except OSError:
            pass
        return None

    def _put(self, item: _Queued, wait: bool) -> bool:
        """Queue a page; False if there is no room and `wait` is false."""
        if wait and self._queued_bytes >= QUEUE_BYTES:
            self._wake()
            self._changed.wait_for(lambda: self._closed or self._queued_bytes < QUEUE_BYTES)
        if self._closed or self._queued_bytes >= QUEUE_BYTES:
            return False
        self._queue.append(item)
        self._queued_bytes += item.page.nbytes
        self._waiting[item.page.key] = item.page
        self._index.add(item.page.key)
        return True

    def _wake(self) -> None:
        if self._queue and self._thread is None:
            thread = threading.Thread(target=self._work, name="mlxkv-pages", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is ending
                self._refuse_queue("no thread")
                return
            self._thread = thread

    def _refuse_queue(self, reason: str) -> None:
        """Refuse the whole queue; the caller holds `_changed`."""
        batch = list(self._queue)
        self._queue.clear()
        self._settle(batch, _Outcome(reason=reason))

    def _work(self) -> None:
        """The thread, which runs until the queue is empty."""
        while True:
            with self._changed:
                batch = self._next_batch()
                if not batch:
                    self._thread = None
                    return
            outcome = _Outcome()
            try:
                self._write_batch(batch, outcome)
            except BaseException as error:  # this batch is refused; the thread goes on
                log_fault("pages were not written to disk", error)
            with self._changed:
                self._settle(batch, outcome)
                more = bool(self._queue)
            if more:
                time.sleep(GIVE_WAY_S)

    def _next_batch(self) -> list[_Queued]:
        batch: list[_Queued] = []
        n_bytes = 0
        while self._queue and (not batch or n_bytes + self._queue[0].page.nbytes <= BATCH_BYTES):
            batch.append(self._queue.popleft())
            n_bytes += batch[-1].page.nbytes
        return batch

    def _settle(self, batch: Sequence[_Queued], outcome: _Outcome) -> None:
        """Remove a batch from the queue, and unwritten pages from the index."""
        queued = {item.page.key for item in self._queue}
        for item in batch:
            key = item.page.key
            self._queued_bytes -= item.page.nbytes
            if key not in outcome.written:
                self._refused[outcome.reasons.get(key, outcome.reason)] += 1
            if key not in queued:
                self._waiting.pop(key, None)
                if key not in outcome.written:
                    self._index.discard(key)
        for key in outcome.evicted:
            if key not in outcome.written and key not in queued:
                self._index.discard(key)
        self._changed.notify_all()

    def _write_batch(self, batch: Sequence[_Queued], outcome: _Outcome) -> None:
        """Write the pages that fit."""
        try:
            with self.folder.locked(LOCK_WAIT_S):
                self._write_locked(batch, outcome)
        except TimeoutError:
            outcome.reason = "another process holds the folder"
            with self._changed:  # no caller waits so long for each batch
                self._refuse_queue(outcome.reason)
        except OSError as error:
            outcome.reason = f"disk: {error.strerror}"

    def _write_locked(self, batch: Sequence[_Queued], outcome: _Outcome) -> None:
        folder = self.folder.open_model(self.at.model, self.window_pages)
        wanted = [
            self.at.stored(item.page.key, item.reserved_bytes, time.time_ns()) for item in batch
        ]
        scan, room = self.folder.room(wanted)
        here = {self.at.meant(page.key) for page in scan.pages if page.model == self.at.model}
        here -= {x.page.key for x in batch if x.keep and not self._is_synced(x.page.key)}
        outcome.written |= here & {item.page.key for item in batch}
        accepted = self._decide([x for x in batch if x.page.key not in here], room, outcome)
        gone = (page.key for page in room.evicted if page.model == self.at.model)
        outcome.evicted += map(self.at.meant, gone)
        self.folder.evict(room.evicted)
        if accepted:
            self.folder.charge(room.written_bytes)
        for item in accepted:
            data = self.at.encode(item.page)
            assert reserved_bytes(len(data)) <= item.reserved_bytes
            sync = os.fsync if item.keep else None  # to the drive; `sync_names` empties its cache
            self.folder.put(Path(self.at.path(item.page.key)), data, sync=sync)
            outcome.written.add(item.page.key)
        if any(item.keep for item in batch):
            self.folder.sync_names(folder)

    def _is_synced(self, key: PageKey) -> bool:
        """Whether a page to be kept is on disk, complete, and synced."""
        try:
            self.at.decode(self.at.read(key), key)
            sync_path(Path(self.at.path(key)), through=False)  # `sync_names` follows
        except (DamagedPage, OSError):
            return False
        return True

    def _decide(self, items: Iterable[_Queued], room: Room, outcome: _Outcome) -> list[_Queued]:
        """The pages of a batch to write: a page is of no use without those before it."""
        accepted: dict[PageKey, _Queued] = {}
        lost: dict[str, str] = {}
        for item in items:
            key = item.page.key
            if key in accepted:
                continue
            reason = lost.get(key.parent) or room.take(item.reserved_bytes, keep=item.keep)
            if reason is None:
                accepted[key] = item
                continue
            outcome.reasons[key] = reason
            if key.part == "full":
                lost[key.name] = reason
        return list(accepted.values())
