"""Saved KV as one file that can be copied to another machine.

An archive is an uncompressed zip of the manifest and its pages' files, and of nothing else. Its
pages are checked like pages on disk.
"""

from __future__ import annotations

import os
import secrets
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from mlxkv.base import durable, regular
from mlxkv.errors import CheckpointError, OutputError
from mlxkv.prefix.on_disk.format import DamagedPage, PageFile, PageKey, decode, encode
from mlxkv.saved_kv.manifest import MAX_MANIFEST_BYTES, NamedKV, page_chain

_MANIFEST = "manifest.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    ValueError,
    OverflowError,
    OSError,
)
"""Raised by `zipfile` for damaged archives, which documents only BadZipFile."""


def _member(key: PageKey) -> str:
    return f"pages/{key.file_name}"


def write_archive(file: Path, named: NamedKV, pages: Iterable[PageFile]) -> None:
    """Write a manifest and the pages of all its keys into one file, complete or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    trusted = replace(named, quarantine="")  # elsewhere it is an import anyway
    with _new_archive(file) as archive:
        archive.writestr(zipfile.ZipInfo(_MANIFEST, _EPOCH), trusted.to_json())
        for page in pages:
            info = zipfile.ZipInfo(_member(page.key), _EPOCH)
            archive.writestr(info, encode(page, named.fingerprint))


@contextmanager
def open_archive(file: Path) -> Iterator[tuple[NamedKV, Iterator[PageFile]]]:
    """An archive's manifest and pages, each page checked when it is read.

    Raises:
        CheckpointError: it is damaged or holds anything else; pages raise it too.
        FileNotFoundError: there is no such file.
    """
    with ExitStack() as stack:
        with _damage_in(file):
            archive = stack.enter_context(
                zipfile.ZipFile(stack.enter_context(regular.open_file(file)))
            )
            named = _manifest_of(archive, file)
        yield named, _pages_of(archive, named, file)


@contextmanager
def _damage_in(file: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, CheckpointError):
        raise
    except _ZIP_ERRORS as error:
        raise CheckpointError(
            f"{file}: not a whole export of mlxkv ({error}); export it again"
        ) from error


@contextmanager
def _new_archive(file: Path) -> Iterator[zipfile.ZipFile]:
    """A new archive beside the file, renamed to it when complete, else removed.

    Raises:
        OutputError: it cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial-{secrets.token_hex(4)}")
    try:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w+b") as opened:
            with zipfile.ZipFile(opened, "w", zipfile.ZIP_STORED) as archive:
                yield archive
            opened.flush()
            durable.sync(opened.fileno())
        partial.rename(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _manifest_of(archive: zipfile.ZipFile, file: Path) -> NamedKV:
    """The manifest of an archive.

    Raises:
        ValueError: the archive holds anything but it and its pages.
    """
    members = archive.infolist()
    plain = all(
        member.compress_type == zipfile.ZIP_STORED
        and not member.flag_bits & 1
        and member.compress_size == member.file_size
        for member in members
    )
    # A small file with members that overlap can decompress to a huge one.
    if not plain or sum(member.file_size for member in members) > file.stat().st_size:
        raise ValueError("members that are compressed, encrypted or overlap")
    sizes = {member.filename: member.file_size for member in members}
    if sizes.get(_MANIFEST, MAX_MANIFEST_BYTES + 1) > MAX_MANIFEST_BYTES:
        raise ValueError("no manifest")
    named = NamedKV.from_json(archive.read(_MANIFEST))
    expected = {_MANIFEST, *(_member(key) for key in named.keys)}
    if set(sizes) != expected or len(members) != len(expected):
        raise ValueError("other members than the manifest lists")
    return named


def _pages_of(archive: zipfile.ZipFile, named: NamedKV, file: Path) -> Iterator[PageFile]:
    pages = page_chain(named.tokens)
    for key in named.keys:
        with _damage_in(file):
            page, fingerprint = decode(archive.read(_member(key)), key)
            if fingerprint != named.fingerprint or page.start != pages[key.name][0]:
                raise DamagedPage("a page of another model or place")
        yield page
