"""Room on a file system, asked for before what would fill it is computed or fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlxkv.base.units import told_apart
from mlxkv.errors import OutputError


def check_space(folder: Path, n_bytes: int, what: str, advice: str) -> None:
    """Raise OutputError unless so many bytes are free.

    Args:
        folder: where they are to lie; it need not exist yet.
        n_bytes: to be written.
        what: the name of what is written, for the message.
        advice: what to do, for the message.
    """
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # what writes there says why
        return
    if n_bytes > free:
        needed, there = told_apart(n_bytes, free)
        raise OutputError(f"{what} needs {needed}, and {folder} has {there} free: {advice}")
