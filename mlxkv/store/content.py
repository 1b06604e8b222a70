"""Which files hold the same, without reading all of large ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from mlxkv.base import regular
from mlxkv.errors import CheckpointError

_HEAD = 4 << 20
_PIECE = 64 << 10
_PIECES = 64


def stamp_of(files: Iterable[Path]) -> str:
    """Sizes and times of files: another one means that they may have changed.

    Raises:
        CheckpointError: a file cannot be read.
    """
    stats = []
    for file in files:
        try:
            stats.append(file.stat())
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    return "-".join(f"{stat.st_size}-{stat.st_mtime_ns}" for stat in stats)


def content_key(files: Iterable[Path]) -> str:
    """A hash of files' contents, 32 hexadecimal digits, wherever they lie.

    Of each file its size, its first 4 MiB, which hold a header, and 64 pieces of 64 KiB from all
    over it: two sets of weights differ in every piece.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        try:
            with regular.open_file(path) as file:
                size = file.seek(0, 2)
                digest.update(f"{size} ".encode())
                step = max(_PIECE, size // _PIECES)
                for start, n_bytes in ((0, _HEAD), *((at, _PIECE) for at in range(0, size, step))):
                    file.seek(start)
                    digest.update(file.read(n_bytes))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:32]
