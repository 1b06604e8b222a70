"""Pages of one model, in RAM and on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from mlxkv.base.paths import kv_dir
from mlxkv.base.seal import seal_of_environment
from mlxkv.kv.types import STEP, CacheSpec
from mlxkv.prefix.eviction import check_cap
from mlxkv.prefix.layout import Kinds
from mlxkv.prefix.on_disk.disk import PageDisk
from mlxkv.prefix.pages import Pages


class CachedModel(Protocol):
    """A model as pages see it, such as `nn.model.CausalLM`."""

    @property
    def stable_tokens(self) -> int | None:
        """Tokens up to which KV does not depend on later tokens; None for all."""
        ...

    @property
    def adapter_key(self) -> str:
        """Names the adapters that change it; "" without one."""
        ...

    @property
    def compute_dtype(self) -> mx.Dtype:
        """The dtype of its KV."""
        ...

    def cache_specs(self) -> list[CacheSpec | None]:
        """One per layer."""
        ...


@dataclass(frozen=True, slots=True)
class Group:
    """Some of a model's layers, which have pages apart.

    Args:
        name: tells their pages on disk from those of others of the same model.
        kinds: of their caches.
        made: makes the pages, of what `Pages` takes.
    """

    name: str
    kinds: Kinds
    made: Callable[..., Pages]


def fingerprint_in(root: Path, path: Path, dtype: str, kv_type: str, adapters: str = "") -> str:
    """The fingerprint of a model's KV, with the hash of its weights kept in the pages' folder."""
    from mlxkv.prefix.fingerprint import fingerprint

    cache = root / "fingerprints.json"
    return fingerprint(path, dtype=dtype, kv_type=kv_type, cache=cache, adapters=adapters)


def open_pages(
    model: CachedModel,
    path: Path,
    kv_type: str,
    budget_bytes: int,
    folder: Path | None = None,
    owner: str = "",
    group: Group | None = None,
) -> Pages | None:
    """The pages of a loaded model; None where `Kinds.of` has none.

    Args:
        model: as `load_model` returns it.
        path: its directory: pages on disk belong to its weights.
        kv_type: format of the KV.
        budget_bytes: bytes that pages may take in RAM.
        folder: folder of pages on disk; None for the user's default.
        owner: only requests of this owner share the pages; empty: all requests.
        group: layers that they are of; None for all.

    Raises:
        UsageError: MLXKV_KV_DISK is not a size, or MLXKV_KV_KEY no key.
    """
    kinds = Kinds.of(model.cache_specs()) if group is None else group.kinds
    check_cap()
    seal_of_environment()  # a bad key is an error before anything is computed
    if kinds is None:
        return None
    dtype = str(model.compute_dtype).rpartition(".")[2]

    def open_disk() -> PageDisk | None:
        from mlxkv.prefix.eviction import DiskLimits
        from mlxkv.prefix.on_disk.writer import PageFiles

        root = folder or kv_dir()
        limits = DiskLimits.for_folder(root)
        if limits.cap_bytes == 0:
            return None
        key = model.adapter_key if group is None else f"{model.adapter_key} {group.name}"
        name = fingerprint_in(root, path, dtype, kv_type, key)
        if owner:
            name = hashlib.sha256(f"{name} {owner}".encode()).hexdigest()[: len(name)]
        near = -(-kinds.reach // STEP) + 1 if kinds.window and not kinds.states else 0
        return PageDisk(PageFiles(root, name, limits, window_pages=near), kinds, dtype)

    made = Pages if group is None else group.made
    return made(kinds, budget_bytes, model.stable_tokens, open_disk)
