"""Reading files that users and models name: a pipe or a device is refused, never waited for."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_OPEN_ALREADY = ("/dev/fd/", "/proc/self/fd/", "/dev/stdin")
"""Pipes that the shell has opened for this process: `<(command)`."""


class NotAFile(OSError):
    """A path that is a pipe, a socket or a device, where a file is needed."""


def open_file(path: Path) -> BufferedReader:
    """Open a regular file to read its bytes.

    Raises:
        OSError: it cannot be opened; `NotAFile` where it is none.
    """
    _check(os.stat(path).st_mode, path)  # noqa: PTH116
    # Another may have taken its place since: a pipe would be waited for.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: Path) -> bytes:
    """The content of a regular file; raises as `open_file`."""
    with open_file(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """The same as UTF-8 text with its line ends as "\\n"; UnicodeDecodeError for other bytes."""
    return read_bytes(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def read_given(path: Path) -> bytes:
    """The content of what the command line names: a regular file, or a pipe that is open already.

    Raises:
        OSError: as `open_file`.
    """
    if str(path).startswith(_OPEN_ALREADY) and stat.S_ISFIFO(path.stat().st_mode):
        return path.read_bytes()
    return read_bytes(path)


def _check(mode: int, path: Path) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    what = _KINDS.get(stat.S_IFMT(mode), "something else")
    raise NotAFile(errno.EINVAL, f"it is {what}, not a file", str(path))
