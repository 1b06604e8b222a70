"""Files that survive a power cut."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def sync(handle: int) -> None:
    """Write a file or directory, and all that was synced before it, to permanent storage.

    On macOS `os.fsync` only passes the bytes to the drive, which may keep them in a volatile cache
    and write them in another order; F_FULLFSYNC flushes that cache (fcntl(2)). To make many files
    durable, call `os.fsync` on each and `sync` on the last.

    Raises:
        OSError: it cannot be synced.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # network file systems and FAT refuse it
            fcntl.fcntl(handle, full)
            return
    os.fsync(handle)


def sync_path(path: Path, *, through: bool = True) -> None:
    """Sync a file or a directory by its path, without `through` by `os.fsync` alone.

    Raises:
        OSError: it is not there, or cannot be synced.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(handle) if through else os.fsync(handle)
    finally:
        os.close(handle)
