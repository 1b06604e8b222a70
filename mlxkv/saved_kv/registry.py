"""Named KV: a prompt whose pages are kept under a name. Imports no MLX.

A name is a manifest, `names/NAME.json`, that lists pages: ordinary files of `writer`, shared with
other prompts of the same beginning. Without the name they can be evicted again.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from mlxkv.base import durable, regular
from mlxkv.base.disk import check_space
from mlxkv.base.paths import is_listed
from mlxkv.base.seal import VARIABLE, seal_of_environment
from mlxkv.errors import CheckpointError, OutputError, UsageError
from mlxkv.prefix.eviction import DiskLimits, reserved_bytes
from mlxkv.prefix.model_files import ModelFiles
from mlxkv.prefix.on_disk.folder import Folder
from mlxkv.prefix.on_disk.format import PageFile, PageKey
from mlxkv.prefix.on_disk.writer import PageFiles
from mlxkv.saved_kv.archive import open_archive, write_archive
from mlxkv.saved_kv.manifest import MAX_NAME, NamedKV, is_name
from mlxkv.saved_kv.sealed import OtherKeyError, decode_manifest, encode_manifest, quarantine_of

_LOCK_WAIT_S = 30.0

Check = Callable[[NamedKV], Callable[[PageFile], None]]
"""Checks a manifest and returns the check of its pages; both raise ValueError."""


class KVNames:
    """The named KV of one folder.

    Args:
        root: the folder of all models' pages; need not exist.
        limits: of the folder; None for this machine's.
    """

    def __init__(self, root: Path, limits: DiskLimits | None = None):
        self.root = root
        self.limits = limits or DiskLimits.for_folder(root)
        self._folder = Folder(root, self.limits)
        self._seal = seal_of_environment()

    def save(self, named: NamedKV, *, replace: bool = False) -> None:
        """Give a prompt's pages a name.

        Args:
            named: its pages are on disk, or are being written.
            replace: whether the name may be taken already.

        Raises:
            UsageError: no valid name, one that is taken, or that differs from one in case only.
            OutputError: the manifest cannot be written.
        """
        path = self._path(named.name)
        self._check_on()
        if not replace:
            self._check_free(named.name)
        data = encode_manifest(named, self._seal)
        with self._writing():
            self.check_spelling(named.name)
            wanted = [self._at(named).stored(key, 0, 0) for key in named.keys]
            _, room = self._folder.room(wanted)
            if reason := room.take(reserved_bytes(len(data)), keep=True):
                raise OutputError(
                    f"{self.root}: no room to save {named.name!r} ({reason}); `mlxkv kv unpin` or "
                    "`mlxkv kv rm` something, or raise MLXKV_KV_DISK"
                )
            self._folder.evict(room.evicted)
            self._folder.put(path, data, sync=durable.sync)
            self._folder.sync_names(path.parent)

    def load(self, name: str) -> NamedKV:
        """The KV that was saved under a name.

        Raises:
            UsageError: there is no such name.
            CheckpointError: its manifest is damaged.
        """
        path = self._existing(name)
        try:
            return decode_manifest(regular.read_bytes(path), name, self._seal)
        except FileNotFoundError:
            raise self._unknown(name) from None
        except OtherKeyError:
            raise UsageError(
                f"{name!r} is encrypted with another key: set {VARIABLE} to the one it was saved "
                f"with, or `mlxkv kv rm {name}` and save it again"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise CheckpointError(
                f"{path}: a damaged manifest ({error}); `mlxkv kv rm {name}` and save it again"
            ) from error

    def list(self) -> list[NamedKV]:
        """All that can be read, sorted by name."""
        found = []
        for path in sorted(self._folder.names.glob("*.json")):
            with suppress(OSError, ValueError):
                found.append(decode_manifest(regular.read_bytes(path), path.stem, self._seal))
        return found

    def n_locked(self) -> int:
        """Names that are encrypted with another key."""
        n = 0
        for path in self._folder.names.glob("*.json"):
            try:
                decode_manifest(regular.read_bytes(path), path.stem, self._seal)
            except OtherKeyError:
                n += 1
            except (OSError, ValueError):
                pass
        return n

    def remove(self, name: str) -> None:
        """Forget a name; its pages stay until they are evicted, but for those of an import that
        is not trusted.

        Raises:
            UsageError: there is no such name.
            OutputError: it cannot be removed.
        """
        path, quarantine = self._existing(name), ""
        with suppress(OSError):
            quarantine = quarantine_of(regular.read_bytes(path))
        try:
            path.unlink()
        except FileNotFoundError:
            raise self._unknown(name) from None
        except OSError as error:
            raise OutputError(f"{self._path(name)}: {error.strerror}") from error
        if quarantine:
            self._drop_folder(quarantine)

    def trust(self, named: NamedKV, files: PageFiles | None = None) -> NamedKV:
        """Let the pages of an import serve every prompt that begins like its text.

        Args:
            named: as it is saved.
            files: the pages of its model, if they are open.

        Raises:
            OutputError: there is no room to write them.
        """
        if not named.quarantine:
            return named
        trusted = replace(named, quarantine="")
        held = PageFiles(self.root, named.quarantine, self.limits)
        found = (page for key in named.keys if (page := held.read(key)) is not None)
        opened = files or PageFiles(self.root, named.fingerprint, self.limits)
        try:
            self._write_pages(opened, trusted, found, held)
        finally:
            if files is None:
                opened.close()
        self.save(trusted, replace=True)
        self._drop(named.quarantine)
        return trusted

    def _drop(self, quarantine: str) -> None:
        self._drop_folder(self._seal.fingerprint(quarantine)[:32])

    def _drop_folder(self, model: str) -> None:
        with suppress(OutputError), self._writing():
            self._folder.drop_model(model)

    def _at(self, named: NamedKV) -> ModelFiles:
        return ModelFiles(self._folder, named.pages_fingerprint, self._seal)

    def pin(self, name: str) -> None:
        """Never evict a name's pages. Raises as `load` and `save` do."""
        self.save(replace(self.load(name), pinned=True), replace=True)

    def unpin(self, name: str) -> None:
        """Let a name's pages be evicted after all others. Raises as `load` and `save` do."""
        self.save(replace(self.load(name), pinned=False), replace=True)

    def is_pinned(self, name: str) -> bool:
        """Whether a name is saved and pinned.

        Raises:
            UsageError: no valid name.
        """
        self._path(name)
        return any(named.name == name and named.pinned for named in self.list())

    def check_spelling(self, name: str) -> None:
        """Refuse a new name that differs from a saved one in case only: on many file systems (APFS,
        NTFS) both are one file.

        Raises:
            UsageError: it does, or it is no valid name.
        """
        path = self._path(name)
        other = None if is_listed(path) else self._spelled_otherwise(name)
        if other is not None:
            raise UsageError(
                f"{name!r} differs from the saved {other!r} in case only, which many file systems "
                "ignore; choose another name"
            )

    def missing(self, named: NamedKV) -> list[PageKey]:
        """The pages of a name that were evicted or damaged."""
        files = PageFiles(self.root, named.pages_fingerprint, self.limits)
        return [key for key in named.keys if key not in files]

    def nbytes(self, named: NamedKV) -> int:
        """Bytes of a name's files."""
        return sum(map(self._at(named).nbytes, named.keys))

    def export(self, name: str, file: Path) -> None:
        """Write a name and its pages into one file, checked.

        Raises:
            UsageError: no such name, or the file is there already.
            CheckpointError: the manifest or a page is damaged or gone.
            OutputError: the file cannot be written.
        """
        named = self.load(name)
        if file.exists():
            raise UsageError(f"{file} is already there; remove it, or choose another file")
        check_space(
            file.absolute().parent, self.nbytes(named), f"{file}:", "choose a file on another disk"
        )
        write_archive(file, named, self._whole(named))

    def _whole(self, named: NamedKV) -> Iterator[PageFile]:
        """The pages of a name; raises CheckpointError where one is missing."""
        files = PageFiles(self.root, named.pages_fingerprint, self.limits)
        for key in named.keys:
            page = files.read(key)
            if page is None:
                raise CheckpointError(
                    f"{named.name!r} is incomplete: one of its pages was evicted or damaged; "
                    "save it again"
                )
            yield page

    def import_(
        self,
        file: Path,
        *,
        name: str | None = None,
        fingerprint: str | None = None,
        check: Check | None = None,
        trusted: bool = False,
    ) -> NamedKV:
        """Import a name, not pinned, and its pages from an exported file.

        Unless it is trusted, the pages are kept apart, for this name alone, until `trust`.

        Args:
            file: from `export`.
            name: to save it under, instead of its own.
            fingerprint: of the model that it must belong to.
            check: called with the manifest, returns what each page is called with; both raise
                ValueError for what this model did not compute.
            trusted: whether its pages may serve other prompts at once.

        Raises:
            UsageError: no such file, or the name is taken.
            CheckpointError: the file is damaged, holds anything else, or another model's KV.
            OutputError: there is no room for it.
        """
        self._check_on()
        try:
            with open_archive(file) as (named, pages):
                own = "" if trusted else hashlib.sha256(os.urandom(32)).hexdigest()
                named = replace(named, name=name or named.name, pinned=False, quarantine=own)
                if fingerprint is not None and named.fingerprint != fingerprint:
                    raise CheckpointError(
                        f"{file}: KV of {named.model} ({named.dtype}, {named.kv_type}), which is "
                        "not this model, or not as it is now; save it again with this one"
                    )
                self._check_free(named.name)
                with _false_in(file):
                    check_page = check(named) if check is not None else None
                self._keep_import(named, _checked(file, pages, check_page))
        except FileNotFoundError:
            raise UsageError(f"{file}: no such file") from None
        return named

    def _keep_import(self, named: NamedKV, pages: Iterable[PageFile]) -> None:
        files = PageFiles(self.root, named.pages_fingerprint, self.limits)
        try:
            self._write_pages(files, named, pages)
            self.save(named)
        except BaseException:
            files.close()
            if named.quarantine:
                self._drop(named.quarantine)
            raise
        files.close()

    def _check_on(self) -> None:
        if self.limits.cap_bytes == 0:
            raise UsageError("MLXKV_KV_DISK=0 switches KV on disk off; give it a size")

    def _check_free(self, name: str) -> None:
        if is_listed(self._path(name)):
            raise UsageError(
                f"{name!r} is already saved; `mlxkv kv rm {name}` first, or choose another name"
            )
        self.check_spelling(name)

    def _write_pages(
        self,
        files: PageFiles,
        named: NamedKV,
        pages: Iterable[PageFile],
        source: PageFiles | None = None,
    ) -> None:
        """Write the pages of a name, or those that `source` has; OutputError without room."""
        files.write(pages, keep=True, wait=True)
        files.flush()
        expected = [key for key in named.keys if source is None or key in source]
        if any(key not in files for key in expected):
            reasons = ", ".join(files.usage().refused)
            raise OutputError(
                f"{self.root}: no room for {named.name!r} ({reasons}); `mlxkv kv rm` something, or "
                "raise MLXKV_KV_DISK"
            )

    def _path(self, name: str) -> Path:
        if not is_name(name):
            raise UsageError(
                f"a saved KV's name has letters, digits, '.', '_' and '-', at most {MAX_NAME}; "
                f"got {name!r}"
            )
        return self._folder.names / f"{name}.json"

    def _existing(self, name: str) -> Path:
        path = self._path(name)
        if not is_listed(path):
            raise self._unknown(name)
        return path

    def _spelled_otherwise(self, name: str) -> str | None:
        """A saved name that differs in case only; names are ASCII."""
        saved = (path.stem for path in sorted(self._folder.names.glob("*.json")))
        return next((other for other in saved if other.lower() == name.lower()), None)

    def _unknown(self, name: str) -> UsageError:
        saved = [named.name for named in self.list()]
        close = self._spelled_otherwise(name) or next(
            iter(difflib.get_close_matches(name, saved, n=1)), None
        )
        hint = f"; did you mean {close}?" if close else "; `mlxkv kv ls` lists them"
        return UsageError(f"no KV is saved as {name!r}{hint}")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._folder.locked(_LOCK_WAIT_S):
                yield
        except TimeoutError as error:
            raise OutputError(f"{self.root}: another mlxkv is writing; try again") from error
        except OSError as error:
            raise OutputError(f"{self.root}: cannot be written ({error.strerror})") from error


def _checked(
    file: Path, pages: Iterator[PageFile], check_page: Callable[[PageFile], None] | None
) -> Iterator[PageFile]:
    """The pages of an archive, each after it was checked."""
    for page in pages:
        if check_page is not None:
            with _false_in(file):
                check_page(page)
        yield page


@contextmanager
def _false_in(file: Path) -> Iterator[None]:
    """Raise CheckpointError for what a check refuses."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; nothing was imported") from error
