"""API keys: those of the command line, and those of a file that may change while the server runs.

Invariants:
- A file that cannot be read any more, or holds no key, changes nothing: the keys stay.
- A key is compared with all keys, by their hashes, so that the time does not reveal a match.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlxkv.base import regular
from mlxkv.errors import UsageError
from mlxkv.server.config import ServerConfig, check_keys

_log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often it is looked whether the file has changed."""
_MAX_BYTES = 1 << 20


class ApiKeys:
    """The keys of one server.

    Raises:
        UsageError: the file cannot be read, or holds no key or an invalid one.
    """

    def __init__(self, config: ServerConfig):
        self._fixed, self._path = config.api_keys, config.api_key_file
        self._looked_at = time.monotonic()
        self._version: object = None
        self._owners: Mapping[bytes, str] = {}
        self.keys: Sequence[str] = ()
        if self._path is not None:
            self._version = _version(self._path)
            _warn_of_readers(self._path)
        self._set(read_keys(self._path) if self._path is not None else ())

    def __bool__(self) -> bool:
        return bool(self._owners)

    def owner(self, key: str) -> str | None:
        """The owner's name of a key; None for an unknown key."""
        self._look()
        digest, found = _digest(key), None
        for known, owner in self._owners.items():
            if hmac.compare_digest(known, digest):
                found = owner
        return found

    def _set(self, more: Sequence[str]) -> None:
        self.keys = tuple(dict.fromkeys([*self._fixed, *more]))
        self._owners = {_digest(key): owner_of(key) for key in self.keys}

    def _look(self) -> None:
        """Read the file again if it has changed."""
        now = time.monotonic()
        if self._path is None or now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        try:
            version = _version(self._path)
            if version == self._version:
                return
            self._version = version
            self._set(read_keys(self._path))
        except UsageError as error:
            _log.warning("the API keys stay as they were: %s", error)
            return
        _warn_of_readers(self._path)
        _log.warning("%s has changed: there are %d API keys", self._path, len(self.keys))


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file: one a line; empty lines and those that begin with # are left out.

    Raises:
        UsageError: it cannot be read, or holds no key or an invalid one.
    """
    try:
        with regular.open_file(path) as file:
            text = file.read(_MAX_BYTES + 1).decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"{path}: {reason}", field="api_key_file") from None
    lines = [line.strip() for line in text.splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys or len(text) > _MAX_BYTES:
        problem = "more than 1 MiB" if keys else "no key in it"
        raise UsageError(f"{path}: {problem}", field="api_key_file")
    check_keys(keys, "api_key_file")
    return keys


def owner_of(key: str) -> str:
    """The owner's name under which a key's pages are stored."""
    return hashlib.sha256(b"mlxkv owner\0" + key.encode()).hexdigest()[:32]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _version(path: Path) -> object:
    """Differs when the file was written.

    Raises:
        UsageError: it is not there, or not a file.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", field="api_key_file") from None
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{path} is not a file", field="api_key_file")
    return found.st_mtime_ns, found.st_size, found.st_ino


def _warn_of_readers(path: Path) -> None:
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        _log.warning("%s can be read or written by others: chmod 600 it", path)
