"""Pages on disk as MLX arrays: between `pages` (RAM) and `page_files` (files, no MLX)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxkv.cache import STEP, Slice
from mlxkv.layers import CausalLM
from mlxkv.names import kv_dir
from mlxkv.page_format import PageFile, PageKey
from mlxkv.page_links import Kinds, Part
from mlxkv.page_room import check_cap
from mlxkv.pages import Pages

if TYPE_CHECKING:
    import numpy as np

    from mlxkv.page_files import PageFiles


class PageDisk:
    """The files of one model's pages, as slices of its layers.

    Args:
        files: of this model in this dtype and KV format.
        kinds: which layers a part has.
        dtype: what the model computes in.
    """

    def __init__(self, files: PageFiles, kinds: Kinds, dtype: str):
        self.files = files
        self.dtype = dtype
        self._kinds = kinds

    @property
    def fingerprint(self) -> str:
        """Of the model, its dtype and KV format."""
        return self.files.fingerprint

    def __contains__(self, key: PageKey) -> bool:
        return key in self.files

    def children(self, parent: str) -> list[tuple[str, int]]:
        """(name, tokens) of what is known behind a page."""
        return self.files.children(parent)

    def tokens(self, key: PageKey) -> bytes | None:
        """The tokens of a page, packed; only its header is read."""
        return self.files.tokens(key)

    def read(self, keys: Sequence[PageKey]) -> list[tuple[bytes, Part] | None]:
        """Tokens and slices of some pages; None for what is not there or damaged."""
        return [self._decoded(key, self.files.read(key)) for key in keys]

    def write(
        self,
        pages: Iterable[tuple[PageKey, int, bytes, Part]],
        *,
        named: bool = False,
        wait: bool = False,
    ) -> None:
        """Write (key, start, tokens, slices) in the background, if it is not there.

        Args:
            pages: their arrays are evaluated.
            named: they belong to named KV, see `PageFiles.write`.
            wait: for room in the queue.
        """
        new = (page for page in pages if named or page[0] not in self.files)
        self.files.write((self._encoded(*page) for page in new), keep=named, wait=wait)

    def used(self, keys: Sequence[PageKey]) -> None:
        """Say that pages were used: the least recently used are given up first."""
        self.files.used(keys)

    def remove(self, key: PageKey) -> None:
        """Delete one file."""
        self.files.remove(key)

    def flush(self) -> None:
        """Wait for what is being written."""
        self.files.flush()

    def refusals(self) -> str:
        """Why pages were not written, for people."""
        refused = self.files.usage().refused
        return ", ".join(f"{reason}: {n}" for reason, n in refused.items()) or "evicted since"

    def close(self) -> None:
        """Write what is queued and stop."""
        self.files.close()

    def _encoded(self, key: PageKey, start: int, tokens: bytes, part: Part) -> PageFile:
        indices = self._kinds.caches(key.part)
        arrays = {
            f"{i}.{j}": x
            for i, piece in zip(indices, part, strict=True)
            for j, x in enumerate(piece.arrays)
        }
        return PageFile(
            key,
            start,
            tokens,
            {name: _to_numpy(x) for name, x in arrays.items()},
            {name: str(x.dtype).rpartition(".")[2] for name, x in arrays.items()},
        )

    def _decoded(self, key: PageKey, file: PageFile | None) -> tuple[bytes, Part] | None:
        if file is None:
            return None
        slices = []
        for index in self._kinds.caches(key.part):
            arrays = []
            while (name := f"{index}.{len(arrays)}") in file.tensors:
                arrays.append(_to_mlx(file.tensors[name], file.dtypes[name]))
            if not arrays:
                self.files.remove(key)
                return None
            slices.append(Slice(tuple(arrays), file.start, file.start + key.n_tokens))
        mx.eval([piece.arrays for piece in slices])
        return file.tokens, tuple(slices)


def _to_numpy(x: mx.array) -> np.ndarray:
    """The array's own memory; NumPy has no bfloat16, whose bits it gets instead."""
    import numpy as np  # 40 ms that a prompt of less than a page does not pay

    return np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def _to_mlx(x: np.ndarray, dtype: str) -> mx.array:
    array = mx.array(x)
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array


def fingerprint_in(root: Path, path: Path, dtype: str, kv_type: str) -> str:
    """What a model's KV is called in a folder of pages, which keeps the hash of its weights."""
    from mlxkv.fingerprint import fingerprint

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
        from mlxkv.page_files import DiskLimits, PageFiles

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
