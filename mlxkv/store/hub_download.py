"""One file of a repository into huggingface_hub's cache, from where an earlier download ended.

The client keeps nothing of a file that was not finished, and waits 23 s without a network.

Invariants:
- A part of a blob lies beside it under `PART`, is locked while it grows, and is only ever added to.
- A blob appears by a rename when it has its length, and its SHA-256 where that is its key.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mlxkv.checkpoint.gguf_names import is_gguf
from mlxkv.errors import DownloadError, MlxkvError
from mlxkv.store.hub import PART
from mlxkv.store.hub_files import HubFile, Listing, checked_key

WAITS_S = (0.5, 1.0, 1.5)
"""Before each further try that follows one that brought no byte."""
_BLOCK = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_PASSING = (429, 500, 502, 503, 504)


@dataclass
class Download:
    """One file that is not in the cache.

    Args:
        listing: the repository.
        file: of it.
        blobs: the cache's folder for its contents.
        stop: set when the work is to end.

    Attributes:
        n_done: bytes that are here.
        trouble: why nothing comes at the moment; "" while it does.
    """

    listing: Listing
    file: HubFile
    blobs: Path
    stop: threading.Event
    n_done: int = 0
    trouble: str = ""
    blob: Path = field(init=False)

    def __post_init__(self) -> None:
        self.blob = self.blobs / (self.file.key or "")
        if self.file.key is not None and self._part.exists():
            self.n_done = self._part.stat().st_size

    def run(self) -> None:
        """Fetch the file; it is at `blob` afterwards, unless the work was to end.

        Raises:
            Exception: what the client, the disk or the check of the content raise.
        """
        if self.file.key is None:
            self.blob = self.blobs / self._ask_for_key()
        self.blobs.mkdir(parents=True, exist_ok=True)
        with self._opened() as out:
            if out is None:
                return
            self._read_again()
            self._fill(out)
            if not self.stop.is_set():
                self._check(out.tell())
                self._part.replace(self.blob)

    @property
    def _part(self) -> Path:
        return self.blob.with_name(self.blob.name + PART)

    def _url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.listing.repo_id, self.file.name, revision=self.listing.commit)

    def _ask_for_key(self) -> str:
        """What the hub calls the content, where its list does not tell."""
        from huggingface_hub import constants, get_hf_file_metadata

        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        found = get_hf_file_metadata(self._url(), timeout=timeout)
        named = f"{self.listing.commit}/{self.file.name}".encode()
        return checked_key(found.etag) or hashlib.sha1(named, usedforsecurity=False).hexdigest()

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes] | None]:
        """The part, locked, at its end; None where another process has finished the file."""
        while not self.stop.is_set():
            with self._part.open("ab", buffering=0) as out:
                self._lock(out.fileno())
                if self.blob.exists():
                    self._part.unlink(missing_ok=True)
                    yield None
                    return
                if self._is_ours(out.fileno()):
                    yield out
                    return
        yield None

    def _is_ours(self, descriptor: int) -> bool:
        """Whether the part is still the file that was opened: others may finish it."""
        try:
            return os.path.samestat(self._part.stat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _lock(self, descriptor: int) -> None:
        """Wait for a process that fetches the same."""
        while not self.stop.is_set():
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.trouble = "another process fetches it"
                self.stop.wait(0.2)
            except OSError:
                return None  # a file system without locks
        return None

    def _read_again(self) -> None:
        """Hash what is here."""
        self._digest = hashlib.sha256()
        with self._part.open("rb") as file:
            while (block := file.read(_BLOCK)) and not self.stop.is_set():
                self._digest.update(block)

    def _fill(self, out: IO[bytes]) -> None:
        """Fetch what is missing, again where the connection breaks."""
        n_failed = 0
        while not self.stop.is_set() and not self._is_whole(out.tell()):
            before = out.tell()
            try:
                return self._stream(out)
            except Exception as error:
                n_failed = 0 if out.tell() > before else n_failed + 1
                if not _passes(error):
                    raise
                if n_failed > len(WAITS_S):
                    raise self._broken(out.tell(), error) from error
            self.trouble = "connection lost, trying again"
            self.stop.wait(WAITS_S[max(n_failed - 1, 0)])
        return None

    def _broken(self, n_bytes: int, error: Exception) -> Exception:
        """The error after the last try."""
        if not n_bytes:
            return error
        # Of a repository with several GGUF files the name alone says too little.
        again = "the same pull" if is_gguf(self.file.name) else f"`mlxkv pull {self.listing.name}`"
        return DownloadError(
            f"{self.listing.name}: the connection broke ({type(error).__name__}). What came of "
            f"{self.file.name} is kept: {again} goes on"
        )

    def _is_whole(self, n_bytes: int) -> bool:
        return self.file.n_bytes is not None and n_bytes >= max(self.file.n_bytes, 1)

    def _stream(self, out: IO[bytes]) -> None:
        """One request for what is missing.

        Raises:
            Exception: the connection breaks, or the hub refuses.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        start = self.n_done = out.tell()
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", self._url(), headers=headers, timeout=timeout) as answer:
            if start and not _goes_on(answer, start):
                out.truncate(0)
                out.seek(0)  # truncating alone leaves the position behind the end
                self._digest, self.n_done = hashlib.sha256(), 0
                if answer.status_code == 416:
                    raise ConnectionError("what was kept is no part of the file")
            hf_raise_for_status(answer)
            for chunk in answer.iter_bytes():
                if self.stop.is_set():
                    return
                write_all(out, chunk)
                self._digest.update(chunk)
                self.n_done += len(chunk)
                self.trouble = ""
        if self.file.n_bytes is not None and out.tell() < self.file.n_bytes:
            raise ConnectionError("the answer ended before the file did")

    def _check(self, n_bytes: int) -> None:
        """Remove what is not the file that was listed.

        Raises:
            DownloadError: it is not.
        """
        expected, name = self.blob.name, f"{self.listing.name}: {self.file.name}"
        problem = ""
        if self.file.n_bytes not in (None, n_bytes):
            problem = (
                f"{name} came with {n_bytes:,} bytes, and is listed with {self.file.n_bytes:,}"
            )
        elif _SHA256.fullmatch(expected) and self._digest.hexdigest() != expected:
            problem = f"{name} came damaged: its SHA-256 is not the one listed"
        if problem:
            self._part.unlink(missing_ok=True)
            raise DownloadError(f"{problem}; try again")


def write_all(out: IO[bytes], data: bytes) -> None:
    """Write all of it: a file without a buffer may take a part, on a disk that is nearly full."""
    rest = memoryview(data)
    while rest:
        rest = rest[out.write(rest) :]


def _goes_on(answer: Any, start: int) -> bool:
    """Whether a server answers a range with what follows `start`; an error says nothing."""
    if answer.status_code >= 400 and answer.status_code != 416:
        return True
    said = answer.headers.get("Content-Range", "")
    return answer.status_code == 206 and said.startswith(f"bytes {start}-")


def _passes(error: Exception) -> bool:
    """Whether another try may help."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in _PASSING
    if isinstance(error, MlxkvError | OfflineModeIsEnabled):
        return False
    own = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
    return not (isinstance(error, OSError) and error.errno in own)
