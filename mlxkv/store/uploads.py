"""Files that clients have sent, by the SHA-256 of their content, until models are made of them.

Invariants:
- A file lies under its digest once all of it is there and has that digest: it comes there by a
  rename, when it is on permanent storage.
- Content under a digest is never written to: a second link to it is a name to read it by.
- One that no request has named for `KEPT_S` is removed when the next one is sent, and so is what a
  process that was killed has left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlxkv.base import durable
from mlxkv.base.disk import check_space
from mlxkv.base.paths import models_dir
from mlxkv.checkpoint.adapter_files import FILES, GGUF, is_adapter
from mlxkv.errors import CheckpointError, OutputError, UsageError, shortened
from mlxkv.store.adapter_names import check_number
from mlxkv.store.adapters import AdapterRef

KEPT_S = 24 * 3600.0
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_MAGIC = b"GGUF"


def uploads_dir() -> Path:
    """Where they lie."""
    return models_dir() / ".uploads"


def path_of(digest: str) -> Path:
    """Where the file of a digest is, or will be.

    Raises:
        UsageError: it is no SHA-256.
    """
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise UsageError(f"a digest is sha256: and 64 digits of base 16; got {digest[:80]!r}")
    return uploads_dir() / match[1]


def find(digest: str) -> Path | None:
    """The file of a digest, which is kept from now on; None if it is not here.

    Raises:
        UsageError: as `path_of`.
    """
    path = path_of(digest)
    with contextlib.suppress(OSError):
        os.utime(path)
        return path
    return None


class Upload:
    """A file that is being sent.

    Args:
        digest: of its content.
        n_bytes: its length, where that is known.

    Raises:
        UsageError: as `path_of`.
        OutputError: there is no room for it.
    """

    def __init__(self, digest: str, n_bytes: int | None = None):
        self._path, self._hash = path_of(digest), hashlib.sha256()
        folder = uploads_dir()
        with _writing():
            folder.mkdir(parents=True, exist_ok=True)
            _remove_old(folder)
            check_space(folder, n_bytes or 0, "the file", "make room")
            descriptor, name = tempfile.mkstemp(prefix=".part-", dir=folder)
        self._file, self._part = os.fdopen(descriptor, "wb"), Path(name)

    def write(self, data: bytes) -> None:
        """Take what comes next; raises OutputError."""
        self._hash.update(data)
        with _writing():
            self._file.write(data)

    def finish(self) -> None:
        """Put the file under its digest.

        Raises:
            UsageError: its content has another.
            OutputError: it cannot be written.
        """
        if (got := self._hash.hexdigest()) != self._path.name:
            raise UsageError(f"the file's digest is sha256:{got}, not sha256:{self._path.name}")
        with _writing():
            self._file.flush()
            durable.sync(self._file.fileno())
            self._file.close()
            self._part.replace(self._path)

    def close(self) -> None:
        """Remove what is not finished."""
        with contextlib.suppress(OSError):  # on a full disk: it holds what could not be written
            self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink()


@contextlib.contextmanager
def adapters_of(files: Mapping[str, str], n_others: int = 0) -> Iterator[list[AdapterRef]]:
    """The adapters that sent files are, in a folder that is removed afterwards.

    Args:
        files: digests by names, of which the last part counts: adapter_config.json and its
            safetensors are one adapter, each .gguf file is another. Other files are left out.
        n_others: adapters that the model is made with beside them.

    Raises:
        UsageError: a digest that was not sent, no adapter among the files, too many adapters, or
            two files of one name.
        OutputError: the folder cannot be written.
    """
    if not files:
        yield []
        return
    found = {name: _found(name, digest) for name, digest in files.items()}
    with _writing():
        uploads_dir().mkdir(exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=".work-", dir=uploads_dir())
    with work as name:
        try:
            with _writing():
                refs = _laid_out(found, Path(name), n_others)
            yield refs
        except CheckpointError as error:  # the client does not know the folder
            error.text = error.text.replace(f"{name}/", "")
            raise


def _found(name: str, digest: str) -> Path:
    try:
        path = find(digest)
    except UsageError as error:
        raise UsageError(f"{shortened(name)!r}: {error}", field="adapters") from None
    if path is None:
        raise UsageError(
            f"{shortened(name)!r}: {digest} is not here: send the file to /api/blobs/{digest}",
            field="adapters",
        )
    return path


def _laid_out(found: Mapping[str, Path], work: Path, n_others: int) -> list[AdapterRef]:
    folder = work / "adapter"
    folder.mkdir()
    gguf = list[Path]()
    for name, path in found.items():
        base = re.split(r"[\\/]", name)[-1]
        if base in FILES:
            if (target := folder / base).exists():
                raise UsageError(f"must have one {base}; got two", field="adapters")
            _link(path, target)
        elif _is_gguf(path):
            gguf.append(path)
    n_found = len(gguf) + is_adapter(folder)
    if not n_found:
        raise UsageError(
            f"must have {FILES[0]} with {' or '.join(FILES[1:])}, or {GGUF} files; got "
            f"{', '.join(sorted(found))[:200]}",
            field="adapters",
        )
    check_number(n_found + n_others, "adapters")
    refs = list[AdapterRef]()
    for i, path in enumerate(gguf):
        (work / str(i)).mkdir()
        _link(path, target := work / str(i) / f"adapter{GGUF}")
        refs.append(AdapterRef(target))
    return [*refs, AdapterRef(folder)] if is_adapter(folder) else refs


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # a file system without links
        shutil.copyfile(path, target)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime <= KEPT_S:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"the file cannot be kept: {error.strerror}") from error
