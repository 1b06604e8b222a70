"""Tokens of earlier sequences of one model and owner, in a file beside their pages. No MLX here.

The file goes with the folder's last page, counts against the folder's limits, and is encrypted
where pages are. One that cannot be read is none.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mlxkv.base.seal import Seal, UnsealError, sealed_bytes
from mlxkv.prefix.eviction import reserved_bytes
from mlxkv.prefix.on_disk.folder import TOKENS_FILE, Folder, read_page

MAGIC = b"mlxkvT01"
MAX_FILE_BYTES = 1 << 20
CLOSE_WAIT_S = 2.0

Sequences = list[list[int]]
"""Tokens, -1 where media stand; the latest sequence last."""


class TokenFile:
    """The file.

    Args:
        folder: of all models' pages.
        model: the model's folder in it.
        seal: how the folder's files are written.
    """

    def __init__(self, folder: Folder, model: str, seal: Seal):
        self._folder, self._model, self._seal = folder, model, seal

    @property
    def _path(self) -> Path:
        return self._folder.pages / self._model / TOKENS_FILE

    def read(self) -> Sequences:
        """The sequences that are kept."""
        try:
            data = self._seal.unseal(read_page(str(self._path)), self._about)
        except (OSError, UnsealError):
            return []
        return _decoded(data)

    def update(self, change: Callable[[Sequences], Sequence[Sequence[int]]]) -> None:
        """Write what `change` makes of what is kept; nothing where there is no room for it."""
        with suppress(OSError), self._folder.locked(CLOSE_WAIT_S):
            if not self._path.parent.is_dir():  # it is made with the first page
                return
            data = _encoded(change(self.read()))
            n_bytes = reserved_bytes(sealed_bytes(len(data)))
            _, room = self._folder.room()
            if len(data) > MAX_FILE_BYTES or room.take(n_bytes) is not None or room.evicted:
                return
            self._folder.charge(room.written_bytes)
            self._folder.put(self._path, self._seal.seal(data, self._about))

    @property
    def _about(self) -> str:
        return f"{self._model}/{TOKENS_FILE}"


def _encoded(sequences: Sequence[Sequence[int]]) -> bytes:
    numbers = array("i")
    for tokens in sequences:
        numbers.append(len(tokens))
        numbers.extend(max(token, -1) for token in tokens)
    return MAGIC + numbers.tobytes()


def _decoded(data: bytes) -> Sequences:
    """What `_encoded` wrote; as much as there is of it."""
    numbers, found, at = array("i"), [], 0
    if not data.startswith(MAGIC) or len(data) > MAX_FILE_BYTES or len(data) % numbers.itemsize:
        return []
    numbers.frombytes(data[len(MAGIC) :])
    while at < len(numbers) and 0 < numbers[at] < len(numbers) - at:
        tokens = list(numbers[at + 1 : at + 1 + numbers[at]])
        found.append(tokens)
        at += 1 + len(tokens)
    return found
