"""Pages of one model, in RAM and on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from mlxkv.base.paths import kv_dir
from mlxkv.kv.types import STEP
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.disk import PageDisk
from mlxkv.prefix.eviction import check_cap
from mlxkv.prefix.layout import Kinds
from mlxkv.prefix.pages import Pages

if TYPE_CHECKING:
    pass


def fingerprint_in(root: Path, path: Path, dtype: str, kv_type: str) -> str:
    """What a model's KV is called in a folder of pages, which keeps the hash of its weights."""
    from mlxkv.prefix.fingerprint import fingerprint

    return fingerprint(path, dtype=dtype, kv_type=kv_type, cache=root / "fingerprints.json")


def open_pages(
    model: CausalLM,
    path: Path,
    kv_type: str,
    budget_bytes: int,
    folder: Path | None = None,
    owner: str = "",
) -> Pages | None:
    """The pages of a loaded model; None where a layer keeps something else than KV.

    Args:
        model: as `load_model` gives it.
        path: its directory, which says what its pages are called on disk.
        kv_type: format of the KV.
        budget_bytes: what pages may take in RAM.
        folder: where they are on disk; None for the user's own.
        owner: whose they are, if not everybody's.

    Raises:
        UsageError: MLXKV_KV_DISK is no size.
    """
    kinds = Kinds.of(model.cache_specs())
    check_cap()
    if kinds is None:
        return None
    dtype = str(model.compute_dtype).rpartition(".")[2]

    def open_disk() -> PageDisk | None:
        from mlxkv.prefix.eviction import DiskLimits
        from mlxkv.prefix.writer import PageFiles

        root = folder or kv_dir()
        limits = DiskLimits.for_folder(root)
        if limits.cap_bytes == 0:
            return None
        name = fingerprint_in(root, path, dtype, kv_type)
        if owner:
            name = hashlib.sha256(f"{name} {owner}".encode()).hexdigest()[: len(name)]
        near = -(-kinds.reach // STEP) + 1 if kinds.window else 0
        return PageDisk(PageFiles(root, name, limits, window_pages=near), kinds, dtype)

    return Pages(kinds, budget_bytes, model.stable_tokens, open_disk)
