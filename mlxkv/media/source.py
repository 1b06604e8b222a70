"""What a user gives as a picture or as sound, opened within bounds."""

from __future__ import annotations

import os
import re
from io import BufferedReader, BytesIO
from pathlib import Path

from mlxkv.base.regular import open_file
from mlxkv.errors import MediaError

_URL = re.compile(r"(?i)https?://|data:")

PathLike = str | os.PathLike[str]


def name_of(source: object, name: str, otherwise: str) -> str:
    """What messages call a source: the name given with it, its file's name, or `otherwise`."""
    if name:
        return name
    return Path(source).name if isinstance(source, str | os.PathLike) else otherwise


def opened(source: PathLike | bytes, name: str, max_bytes: int) -> BufferedReader | BytesIO:
    """A file or its bytes, to read from the start; a pipe or a device is refused, not waited for.

    Raises:
        MediaError: it cannot be opened, is empty, or is larger than allowed.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        file, size = BytesIO(source), len(source)
    else:
        try:
            file = open_file(Path(source))
        except (OSError, ValueError) as error:
            if _URL.match(str(source)):
                raise MediaError(
                    f"{name}: URLs are not read here: give a path or the bytes"
                ) from error
            text = getattr(error, "strerror", None) or str(error)
            raise MediaError(f"{name}: {text}") from error
        size = os.fstat(file.fileno()).st_size
    if 0 < size <= max_bytes:
        return file
    file.close()
    if not size:
        raise MediaError(f"{name}: the file is empty")
    raise MediaError(f"{name}: {size:,} bytes, and at most {max_bytes:,} are allowed")
