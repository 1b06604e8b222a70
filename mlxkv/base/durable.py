"""Files that survive a power cut, and files that are written whole or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Callable
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


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file, complete or not at all: what was there stays until all of it is written.

    Args:
        path: where; a link is followed. A device or a pipe is written to as it is.
        content: all of it; a text is written as UTF-8.
        mode: permissions of a new file.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    path, data = path.resolve(), content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return

    def keep_mode(handle: int) -> None:
        if path.exists():
            os.fchmod(handle, stat.S_IMODE(path.stat().st_mode))

    draft = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    write_as(draft, path, data, mode=mode, written=keep_mode)


def write_as(
    draft: Path,
    path: Path,
    data: bytes,
    *,
    mode: int,
    written: Callable[[int], object] | None = None,
) -> None:
    """Write a file under another name, and give it its own when it is complete.

    Args:
        draft: the other name, on the same file system; there is no such file.
        path: where it appears, in place of what was there.
        data: all of it.
        mode: its permissions.
        written: called with its descriptor before it appears.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            if written is not None:
                written(handle)
        finally:
            os.close(handle)
        draft.rename(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
