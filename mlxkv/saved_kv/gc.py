"""Remove what is damaged or unreachable from the KV folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlxkv.base import regular
from mlxkv.base.seal import MAGIC, Seal, seal_of_environment
from mlxkv.prefix.eviction import DiskLimits, allocated_bytes
from mlxkv.prefix.model_files import decode_sealed, meant
from mlxkv.prefix.on_disk.folder import Folder, read_page
from mlxkv.prefix.on_disk.format import DamagedPage, PageKey, decode
from mlxkv.saved_kv.manifest import MANIFEST_VERSION
from mlxkv.saved_kv.registry import KVNames
from mlxkv.saved_kv.sealed import SEALED_VERSION, OtherKeyError, decode_manifest


@dataclass(frozen=True, slots=True)
class GcReport:
    """Files that a clean-up removed, with their bytes, and what is left.

    Args:
        leftovers: files of writers that died.
        damaged: incomplete or damaged pages and manifests.
        evicted: pages over the cap.
        n_pages: pages that are left.
        n_bytes: of the whole folder now.
    """

    leftovers: int = 0
    leftover_bytes: int = 0
    damaged: int = 0
    damaged_bytes: int = 0
    evicted: int = 0
    evicted_bytes: int = 0
    n_pages: int = 0
    n_bytes: int = 0


def gc(root: Path, limits: DiskLimits | None = None) -> GcReport:
    """Remove files of writers that died, damaged files, and pages over the cap.

    Reads and checks every page.

    Raises:
        OutputError: the folder cannot be written.
    """
    names = KVNames(root, limits)
    folder, seal = names._folder, seal_of_environment()
    if not root.is_dir():
        return GcReport()
    damaged = [*_damaged_manifests(folder, seal), *_damaged_pages(folder, seal)]
    damaged_bytes = sum(_remove(path) for path in damaged)
    with names._writing():
        _, room = folder.room()
        folder.evict(room.evicted)
        folder.drop_empty_models()
    left = folder.scan()
    return GcReport(
        leftovers=folder.n_cleared,
        leftover_bytes=folder.cleared_bytes,
        damaged=len(damaged),
        damaged_bytes=damaged_bytes,
        evicted=len(room.evicted),
        evicted_bytes=sum(page.n_bytes for page in room.evicted),
        n_pages=len(left.pages),
        n_bytes=left.n_bytes,
    )


def _damaged_manifests(folder: Folder, seal: Seal) -> Iterator[Path]:
    for path in folder.names.glob("*.json"):
        with suppress(OSError):
            data = regular.read_bytes(path)
            try:
                decode_manifest(data, path.stem, seal)
            except OtherKeyError:
                continue
            except ValueError:
                if not _is_newer(data):
                    yield path


def _is_newer(manifest: bytes) -> bool:
    """Whether a later mlxkv wrote it: it is not damaged then."""
    try:
        return json.loads(manifest)["version"] > max(MANIFEST_VERSION, SEALED_VERSION)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _damaged_pages(folder: Folder, seal: Seal) -> list[Path]:
    paths = list(folder.pages.glob("*/*.safetensors"))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda path: _is_damaged(path, seal), paths)
        return [path for path, bad in zip(paths, found, strict=True) if bad]


def _is_damaged(path: Path, seal: Seal) -> bool:
    """Whether a file is no page; pages of another key are not known to be damaged."""
    key, model = PageKey.parse(path.name), path.parent.name
    if key is None:
        return True
    try:
        data = read_page(str(path))
        if seal.is_foreign(data):
            return False
        if not data.startswith(MAGIC):
            return decode(data, key)[1][:32] != model
        fingerprint = decode_sealed(seal, data, meant(seal, key), model)[1]
    except DamagedPage:
        return True
    except OSError:
        return False
    return seal.fingerprint(fingerprint)[:32] != model


def _remove(path: Path) -> int:
    """Delete a file, and return its bytes."""
    with suppress(OSError):
        n_bytes = allocated_bytes(path.lstat())
        path.unlink()
        return n_bytes
    return 0
