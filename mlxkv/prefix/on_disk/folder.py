"""The folder of pages on disk: its lock, its files, and their eviction.

Invariants:
- A process that writes or evicts holds `lock`. So files that are in `tmp` when one gets the lock
  are a dead process's, and are removed.
- Nothing is written before there is room for it: the folder, with directories, manifests and
  temporary files, never takes more than the cap.
- A file appears by a rename, complete or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxkv.base import durable, time_machine
from mlxkv.base.seal import HEAD_BYTES, MAGIC, first_bytes, sealed_bytes
from mlxkv.prefix.eviction import (
    SHARED_PART,
    SLACK_BYTES,
    DiskLimits,
    Room,
    Scan,
    Stored,
    allocated_bytes,
    eviction_order,
    file_system,
    shared_pages,
)
from mlxkv.prefix.on_disk.format import MAX_HEADER_BYTES, MAX_PAGE_BYTES, PageKey

_DAY_S = 86_400
SHARED_FILE = "shared.json"
"""In a model's folder: the last page of each prefix that many sequences share, see `shared`."""
TOKENS_FILE = "tokens"
"""The same of tokens of earlier sequences, see `token_file`."""
_BESIDE = ("model.json", SHARED_FILE, TOKENS_FILE)
_PAGE = re.compile(r"[0-9a-f]{32}")


class Folder:
    """The files of all models' pages, of named KV and of the bookkeeping.

    Args:
        root: the folder; need not exist.
        limits: of the folder.

    Attributes:
        pages: folder of the models' folders.
        names: folder of the manifests.
        n_cleared: files of dead processes that were removed.
        cleared_bytes: what they took.
    """

    def __init__(self, root: Path, limits: DiskLimits):
        self.root = root
        self.limits = limits
        self.pages = root / "pages"
        self.names = root / "names"
        self._tmp = root / "tmp"
        self._written = root / "written.json"
        self._manifests: dict[str, tuple[tuple[int, ...], Mapping[tuple[str, str], bool]]] = {}
        self._n_temporary = 0
        self._is_excluded = False
        self.n_cleared = 0
        self.cleared_bytes = 0

    @contextmanager
    def locked(self, wait_s: float) -> Iterator[None]:
        """Hold the lock among all processes, and remove dead processes' files from `tmp`.

        Raises:
            OSError: the folder cannot be written, or another process holds it (TimeoutError).
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.pages, self.names, self._tmp):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._exclude_from_backups()
        lock = _acquire(self.root / "lock", wait_s)
        try:
            self._clear_tmp()
            yield
        finally:
            # A child forked meanwhile has the lock too: closing would not release it.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _exclude_from_backups(self) -> None:
        """Exclude pages, which can be computed again and change every day; not names."""
        if not self._is_excluded:
            for folder in (self.pages, self._tmp):
                time_machine.exclude(folder)
            self._is_excluded = True

    def _clear_tmp(self) -> None:
        with os.scandir(self._tmp) as entries:
            for entry in entries:
                with suppress(OSError):
                    n_bytes = allocated_bytes(entry.stat(follow_symlinks=False))
                    Path(entry.path).unlink()
                    self.n_cleared += 1
                    self.cleared_bytes += n_bytes

    def scan(self) -> Scan:
        """The folder's pages and bytes, without files that are removed meanwhile."""
        pages: list[Stored] = []
        n_bytes = 0
        with suppress(OSError):
            n_bytes = allocated_bytes(self.root.stat())
        folders = [str(self.root)]
        while folders:
            folder = folders.pop()
            with suppress(OSError), os.scandir(folder) as entries:
                model = Path(folder).name if Path(folder).parent == self.pages else None
                for entry in entries:
                    with suppress(OSError):
                        about = entry.stat(follow_symlinks=False)
                        n_bytes += allocated_bytes(about)
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        elif model is not None and (key := PageKey.parse(entry.name)):
                            size = allocated_bytes(about)
                            pages.append(Stored(model, key, size, about.st_mtime_ns))
        return Scan(n_bytes, tuple(pages))

    def room(self, wanted: Collection[Stored] = ()) -> tuple[Scan, Room]:
        """A scan, and the room for writing.

        `wanted`: pages about to be written: neither they nor pages before them are evicted.
        """
        scan = self.scan()
        order = self._order(scan.pages, wanted)
        system = file_system(self.root)
        free = system.f_bavail * system.f_frsize
        return scan, Room(scan, self.limits, free, self.written_today(), order)

    def most_bytes(self) -> int:
        """An upper bound of the bytes that a name's pages may take, those that are here included:
        as if all other pages were evicted for them."""
        scan, system = self.scan(), file_system(self.root)
        here = sum(page.n_bytes for page in scan.pages)
        free = system.f_bavail * system.f_frsize - self.limits.free_bytes + here
        return max(0, min(self.limits.cap_bytes - SLACK_BYTES, free))

    def _order(self, pages: Collection[Stored], wanted: Collection[Stored]) -> Iterator[Stored]:
        near = {model: self._window_pages(model) for model in {page.model for page in pages}}
        shared = {model: [*self.shared(model).values()] for model in near}
        spared_bytes = int(SHARED_PART * self.limits.cap_bytes)
        spared = shared_pages(pages, near, shared, spared_bytes)
        yield from eviction_order(pages, wanted, near, self._named(), spared)

    def _window_pages(self, model: str) -> int | None:
        try:
            near = json.loads((self.pages / model / "model.json").read_bytes())["window_pages"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return near if isinstance(near, int) else None

    def shared(self, model: str) -> dict[str, str]:
        """The last page of each shared prefix of a model, by its name; the latest last."""
        try:
            raw = json.loads((self.pages / model / SHARED_FILE).read_bytes())
            return {
                name: last
                for name, last in raw.items()
                if isinstance(last, str) and _PAGE.fullmatch(last)
            }
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}

    def open_model(self, model: str, window_pages: int) -> Path:
        """The folder of a model's pages; records `window_pages` there.

        Raises:
            OSError: it cannot be written.
        """
        folder = self.pages / model
        folder.mkdir(mode=0o700, exist_ok=True)
        if self._window_pages(model) != window_pages:
            self.put(folder / "model.json", json.dumps({"window_pages": window_pages}).encode())
        return folder

    def _named(self) -> Mapping[tuple[str, str], bool]:
        """(model, file name) of each page of named KV -> whether it is pinned."""
        named: dict[tuple[str, str], bool] = {}
        with suppress(OSError):
            for path in self.names.glob("*.json"):
                for page, pinned in self._manifest(path).items():
                    named[page] = pinned or named.get(page, False)
        return named

    def _manifest(self, path: Path) -> Mapping[tuple[str, str], bool]:
        # A long prompt's manifest has megabytes, and a full folder reads it at every batch.
        try:
            about = path.stat()
            signature = (about.st_ino, about.st_size, about.st_mtime_ns)
            known = self._manifests.get(path.name)
            if known is None or known[0] != signature:
                raw = json.loads(path.read_bytes())
                model = (raw.get("quarantine") or raw["fingerprint"])[:32]
                pinned = bool(raw["pinned"])
                known = signature, {(model, file_name): pinned for file_name in raw["keys"]}
                self._manifests[path.name] = known
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return known[1]

    def evict(self, pages: Iterable[Stored]) -> None:
        """Delete files.

        Raises:
            OSError: one cannot be deleted, so there is less room than planned.
        """
        for page in pages:
            (self.pages / page.model / page.key.file_name).unlink(missing_ok=True)

    def drop_model(self, model: str) -> None:
        """Delete all pages of one model."""
        folder = self.pages / model
        with suppress(OSError):
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()

    def sync_names(self, folder: Path) -> None:
        """Make the names in a folder, and the folder's own, survive a power cut.

        Raises:
            OSError: it cannot be synced.
        """
        for path in (folder, folder.parent, self.root):
            durable.sync_path(path)

    def drop_empty_models(self) -> None:
        """Delete the folders of models that have no page left."""
        for folder in [path for path in self.pages.iterdir() if path.is_dir()]:
            with suppress(OSError):
                if {path.name for path in folder.iterdir()} <= set(_BESIDE):
                    for name in _BESIDE:
                        (folder / name).unlink(missing_ok=True)
                    folder.rmdir()

    def written_today(self) -> int:
        """Bytes that count against the daily budget, since midnight UTC."""
        try:
            raw = json.loads(self._written.read_bytes())
            return int(raw["bytes"]) if raw["day"] == _today() else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def charge(self, written_bytes: int) -> None:
        """Record the bytes written today, before they are written: so none are uncounted.

        Raises:
            OSError: it cannot be written.
        """
        self.put(self._written, json.dumps({"day": _today(), "bytes": written_bytes}).encode())

    def put(self, path: Path, data: bytes, *, sync: Callable[[int], None] | None = None) -> None:
        """Write a file, complete or not at all.

        Args:
            path: where.
            data: all of it.
            sync: called with the written file's descriptor before the file appears: `durable.sync`
                where nothing but the whole file will do, `os.fsync` where a checksum tells and
                `sync_names` follows. Unnamed pages need neither: half a page is a miss, and costs
                as much as no page.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        self._n_temporary += 1
        temporary = self._tmp / f"{os.getpid()}-{id(self):x}-{self._n_temporary}"
        durable.write_as(temporary, path, data, mode=0o600, written=sync)


def read_page(path: str, *, header_only: bool = False) -> bytes:
    """A page's file, or what of it has its header; b"" for a file that cannot be a page.

    Raises:
        OSError: there is no such file, or it cannot be opened.
    """
    # Opening must not wait (a pipe) or follow a link.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return b""
        raise
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_PAGE_BYTES:
        os.close(handle)
        return b""
    with os.fdopen(handle, "rb", buffering=0) as file:
        try:
            if not header_only:
                return file.readall()
            start = file.read(8)
            if start == MAGIC:
                head = start + file.read(HEAD_BYTES - 8)
                n_first = min(first_bytes(head), MAX_HEADER_BYTES)
                return head + file.read(sealed_bytes(n_first))
            length = int.from_bytes(start, "little")
            return start + file.read(length) if length <= MAX_HEADER_BYTES else b""
        except OSError:
            return b""  # a bad sector: as damaged as a wrong byte


def _acquire(path: Path, wait_s: float) -> int:
    """A descriptor that holds the lock.

    Polled, because a process that was stopped (Ctrl-Z) holds it for as long as it likes.
    """
    end = time.monotonic() + wait_s
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have deleted the folder and created it again.
            if path.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        except BlockingIOError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        if time.monotonic() > end:
            raise TimeoutError(f"{path}: another process holds it")
        time.sleep(random.uniform(0.001, 0.004))


def _today() -> int:
    return int(time.time() // _DAY_S)
