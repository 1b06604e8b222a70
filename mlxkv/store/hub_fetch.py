"""Bring files of a repository into huggingface_hub's cache, and go on where an earlier pull ended.

They lie as the cache's documentation says: content in `blobs`, links to it in `snapshots`.

Invariant: links are made when all blobs are there, that of config.json last, and then the ref of
the revision.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxkv.base.disk import check_space
from mlxkv.checkpoint.weights import INDEX, indexed_files, weight_files
from mlxkv.errors import CheckpointError
from mlxkv.store import hub
from mlxkv.store.hub_download import Download
from mlxkv.store.hub_errors import translate
from mlxkv.store.hub_files import (
    HubFile,
    Listing,
    gguf_and_encoders,
    plain_weights,
    small_files,
)

Report = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes in all (0: unknown)."""

PARALLEL = 4
"""Files at a time: one connection seldom fills a line."""
POLL_S = 0.1
ENDS_S = 1.0
"""How long an error waits for the other downloads to end: the connections are theirs."""


def fetch_checkpoint(listing: Listing, report: Report) -> Path:
    """Fetch config, tokenizer and safetensors of a repository; the snapshot's folder.

    Only the weights that the index names are fetched, or those that would be loaded without one.

    Raises:
        ModelNotFound: the repository has no safetensors, or was removed meanwhile.
        DownloadError: no network, a gated repository, or what comes is not what was listed.
        OutputError: the disk is full.
    """
    weights = plain_weights(listing.files)
    if not weights:
        raise listing.nothing_to_read()
    if INDEX in listing.files:
        index = fetch_blobs(listing, [INDEX], report)[INDEX]
        with contextlib.suppress(CheckpointError):  # the loader says what is wrong with it
            weights = [name for name in indexed_files(index) if name in listing.files]
    else:
        weights = weight_files(weights)
    return fetch(listing, [*small_files(listing.files), *weights], report)


def fetch_gguf(listing: Listing, wanted: str | None, report: Report) -> Path:
    """Fetch a GGUF file of a repository, all its parts, and its encoders; the first part's path.

    Raises:
        ModelNotFound, UsageError: no file fits `wanted`, or more than one does.
        DownloadError, OutputError: as `fetch_checkpoint`.
    """
    names = gguf_and_encoders(listing, wanted)
    return fetch(listing, names, report) / names[0]


def fetch(listing: Listing, names: Sequence[str], report: Report) -> Path:
    """Bring files into the cache; the snapshot's folder. Raises as `fetch_checkpoint`."""
    blobs = fetch_blobs(listing, names, report)
    repo = hub.repo_folder(listing.repo_id)
    snapshot = repo / "snapshots" / listing.commit
    try:
        for name in sorted(blobs, key=lambda name: name == "config.json"):
            _link(blobs[name], snapshot / name)
        if listing.revision != listing.commit:
            ref = repo / "refs" / (listing.revision or "main")
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(listing.commit)
    except OSError as error:
        raise translate(listing.repo_id, error) from error
    return snapshot


def fetch_blobs(listing: Listing, names: Iterable[str], report: Report) -> dict[str, Path]:
    """Fetch files' contents; their paths by name. Raises as `fetch_checkpoint`."""
    try:
        return _Pull(listing, hub.repo_folder(listing.repo_id)).blobs(names, report)
    except Exception as error:  # the HTTP client behind it differs from version to version
        raise translate(listing.repo_id, error, listing.revision) from error


def _link(blob: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists():
        return
    link.unlink(missing_ok=True)  # its blob was deleted
    with contextlib.suppress(FileExistsError):  # another process was quicker
        link.symlink_to(os.path.relpath(blob, link.parent))


@dataclass(frozen=True, slots=True)
class _Pull:
    """One fetching of files of a repository into its folder of the cache."""

    listing: Listing
    repo: Path

    @property
    def snapshot(self) -> Path:
        return self.repo / "snapshots" / self.listing.commit

    def blobs(self, names: Iterable[str], report: Report) -> dict[str, Path]:
        """Name -> where its content lies, fetched if it was not here."""
        files = [self.listing.files[name] for name in dict.fromkeys(names)]
        here = {f.name: path for f in files if (path := self._found(f)) is not None}
        stop = threading.Event()
        missing: dict[str, Download] = {}  # by content, which two files may share
        for file in sorted(files, key=lambda file: file.n_bytes or 0):
            if file.name not in here:
                download = Download(self.listing, file, self.repo / "blobs", stop)
                missing.setdefault(file.key or file.name, download)
        if missing:
            self._check_room(list(missing.values()))
            _run(list(missing.values()), self.listing.name, stop, report)
        came = {f.name: missing[f.key or f.name].blob for f in files if f.name not in here}
        return here | came

    def _found(self, file: HubFile) -> Path | None:
        """Where a file's content lies; None if it is not here."""
        link = self.snapshot / file.name
        if link.exists():
            return link.resolve()
        if file.key is not None and (blob := self.repo / "blobs" / file.key).exists():
            return blob
        return None

    def _check_room(self, missing: Sequence[Download]) -> None:
        n_bytes = sum(max((each.file.n_bytes or 0) - each.n_done, 0) for each in missing)
        advice = "make room, or set HF_HUB_CACHE to another disk"
        check_space(self.repo.parent, n_bytes, f"downloading {self.listing.name}", advice)


def _next(todo: deque[Download]) -> Download | None:
    try:
        return todo.popleft()
    except IndexError:
        return None


def _run(downloads: Sequence[Download], name: str, stop: threading.Event, report: Report) -> None:
    """Run downloads, `PARALLEL` at a time; the first error ends all.

    Their threads do not keep the process from ending: one may wait for a byte for 10 s.
    """
    todo, failed = deque(downloads), deque[BaseException]()

    def work() -> None:
        try:
            while not stop.is_set() and (download := _next(todo)) is not None:
                download.run()
        except BaseException as error:
            failed.append(error)
            stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(PARALLEL, len(todo)))]
    total = sum(each.file.n_bytes or 0 for each in downloads)

    def tell() -> None:
        trouble = next((f" ({each.trouble})" for each in downloads if each.trouble), "")
        done = sum(each.n_done for each in downloads)
        report(f"fetching {name}{trouble}", min(done, total), total)

    try:
        for thread in threads:
            thread.start()
        while not failed and (alive := [thread for thread in threads if thread.is_alive()]):
            alive[0].join(POLL_S)
            tell()
        if not failed:
            tell()  # small files may have come before the first look
    finally:
        stop.set()
    if failed:
        ends_at = time.monotonic() + ENDS_S
        for thread in threads:
            thread.join(max(0.0, ends_at - time.monotonic()))
        raise failed[0]
