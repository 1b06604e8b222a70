"""Saved KV as one file that can be copied to another machine."""

from __future__ import annotations

import os
import secrets
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mlxkv.base import durable
from mlxkv.errors import CheckpointError, OutputError
from mlxkv.prefix.format import DamagedPage, PageFile, PageKey, decode, encode
from mlxkv.saved_kv.manifest import (
    _EPOCH,
    _MANIFEST,
    _ZIP_ERRORS,
    MAX_MANIFEST_BYTES,
    NamedKV,
    _chain,
)


def _member(key: PageKey) -> str:
    return f"pages/{key.file_name}"


def write_archive(file: Path, named: NamedKV, pages: Iterable[PageFile]) -> None:
    """Write a manifest and its pages into one file, which is complete or not there.

    Args:
        file: need not exist.
        named: the manifest.
        pages: of all its keys.

    Raises:
        OutputError: the file cannot be written.
    """
    with _new_archive(file) as archive:
        archive.writestr(zipfile.ZipInfo(_MANIFEST, _EPOCH), named.to_json())
        for page in pages:
            info = zipfile.ZipInfo(_member(page.key), _EPOCH)
            archive.writestr(info, encode(page, named.fingerprint))


@contextmanager
def open_archive(file: Path) -> Iterator[tuple[NamedKV, Iterator[PageFile]]]:
    """An archive's manifest, and its pages one by one, each checked before it is given.

    Raises:
        CheckpointError: there and while pages are taken: it is damaged, or holds anything else.
        FileNotFoundError: there is no such file.
    """
    with ExitStack() as stack:
        with _damage_in(file):
            archive = stack.enter_context(zipfile.ZipFile(file))
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
    """An archive beside the file that becomes it, or is removed.

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
    """The manifest of an archive that holds it, its pages, and nothing else.

    Raises:
        ValueError: anything else.
    """
    members = archive.infolist()
    plain = all(
        member.compress_type == zipfile.ZIP_STORED
        and not member.flag_bits & 1
        and member.compress_size == member.file_size
        for member in members
    )
    # Members that overlap are one small file that unpacks into a huge one.
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
    """The pages of an archive, each checked before it is given.

    Raises:
        CheckpointError: one is not what its name says, or another model's.
    """
    pages = _chain(named.tokens)
    for key in named.keys:
        with _damage_in(file):
            page, fingerprint = decode(archive.read(_member(key)), key)
            if fingerprint != named.fingerprint or page.start != pages[key.name][0]:
                raise DamagedPage("a page of another model or place")
        yield page
