"""Pages on disk as MLX arrays: between `pages` (RAM) and `writer` (files, no MLX).

A file has a tensor for each array of each layer. Writing takes views of the part's one array, with
neither copy nor evaluation; reading joins the tensors to one array.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxkv.prefix.layout import WINDOW, Kinds, Link
from mlxkv.prefix.on_disk.fetch import PageFetcher
from mlxkv.prefix.on_disk.format import PageFile, PageKey
from mlxkv.prefix.on_disk.part import Layout, Part, Rows
from mlxkv.prefix.shared import SharedFile
from mlxkv.prefix.token_file import TokenFile

if TYPE_CHECKING:
    import numpy as np

    from mlxkv.prefix.on_disk.writer import PageFiles


_DTYPES = {str(x).rpartition(".")[2]: x for x in (mx.bfloat16, mx.float16, mx.float32, mx.uint32)}
"""Names in files -> dtypes of a page."""


class PageDisk:
    """The files of one model's pages, as parts with the KV of its layers.

    Args:
        files: of this model in this dtype and KV format.
        kinds: which layers a part has.
        dtype: of the model's computation.
    """

    def __init__(self, files: PageFiles, kinds: Kinds, dtype: str):
        self.files = files
        self.fetcher = PageFetcher(files.read)
        self.shared = SharedFile(files.folder, files.at.model, files.at.seal)
        self.past_tokens = TokenFile(files.folder, files.at.model, files.at.seal)
        self.dtype = dtype
        self._kinds = kinds

    @property
    def fingerprint(self) -> str:
        """Of the model, its dtype and KV format."""
        return self.files.fingerprint

    def __contains__(self, key: PageKey) -> bool:
        return key in self.files

    def children(self, parent: str) -> list[tuple[str, int]]:
        """(name, tokens) of the known pages behind a page."""
        return self.files.children(parent)

    def tokens(self, key: PageKey) -> bytes | None:
        """The tokens of a page, packed; only its header is read."""
        return self.files.tokens(key)

    def read(self, key: PageKey) -> tuple[bytes, Part] | None:
        """Tokens and KV of a page; None for a missing or damaged one."""
        return self._decoded(key, self.fetcher.take(key) or self.files.read(key))

    def write(
        self,
        pages: Iterable[tuple[PageKey, int, bytes, Part]],
        *,
        named: bool = False,
        wait: bool = False,
    ) -> None:
        """Write each new (key, start, tokens, KV) in the background.

        Args:
            pages: their arrays are evaluated.
            named: they belong to named KV, see `PageFiles.write`.
            wait: for room in the queue.
        """
        new = (page for page in pages if named or page[0] not in self.files)
        self.files.write((self._encoded(*page) for page in new), keep=named, wait=wait)

    def used(self, keys: Sequence[PageKey]) -> None:
        """Mark pages as used: the least recently used are evicted first."""
        self.files.used(keys)

    def shared_prefixes(self) -> dict[str, list[Link]]:
        """The shared prefixes that are here as a whole, by name; the latest last."""
        return self.shared.read(self.files.parents())

    def remove(self, key: PageKey) -> None:
        """Delete one file."""
        self.fetcher.take(key)
        self.files.remove(key)

    def flush(self) -> None:
        """Wait until the queue is written."""
        self.files.flush()

    def refusals(self) -> str:
        """Why pages were not written, for people."""
        refused = self.files.usage().refused
        return ", ".join(f"{reason}: {n}" for reason, n in refused.items()) or "evicted since"

    def close(self) -> None:
        """Write the queue and stop."""
        self.fetcher.clear()
        self.files.close()
        self.shared.close()

    def _encoded(self, key: PageKey, start: int, tokens: bytes, part: Part) -> PageFile:
        indices = self._kinds.caches(key.part)
        tensors: dict[str, np.ndarray] = {}
        dtypes: dict[str, str] = {}
        for (i, j), dtype, tensor in _tensors(part):
            name = f"{indices[i]}.{j}"
            tensors[name], dtypes[name] = tensor, str(dtype).rpartition(".")[2]
        return PageFile(key, start, tokens, tensors, dtypes)

    def _decoded(self, key: PageKey, file: PageFile | None) -> tuple[bytes, Part] | None:
        if file is None:
            return None
        is_state = self._kinds.states and key.part == WINDOW
        n_rows = 1 if is_state else key.n_tokens  # a state lies in the row of the last token
        layers: list[list[np.ndarray]] = []
        rows: list[list[Rows]] = []
        for index in self._kinds.caches(key.part):
            names = itertools.takewhile(
                file.tensors.__contains__, (f"{index}.{j}" for j in itertools.count())
            )
            found = {name: _rows(file, name, n_rows) for name in names}
            layers.append([file.tensors[name] for name in found])
            rows.append([x for x in found.values() if x is not None])
            if not found or None in found.values():
                self.files.remove(key)
                return None
        layout, stop = Layout.of(rows), file.start + key.n_tokens
        return file.tokens, Part(_words(layers, layout), layout, stop - n_rows, stop)


def _rows(file: PageFile, name: str, n_rows: int) -> Rows | None:
    """A tensor's rows; None where it is not a page's tensor of so many."""
    tensor, dtype = file.tensors[name], _DTYPES.get(file.dtypes.get(name, ""))
    if dtype is None or tensor.dtype != _numpy_dtype(dtype) or tensor.ndim != 4:
        return None
    B, H, n_tokens, D = tensor.shape
    return Rows(dtype, (B, H, D)) if n_tokens == n_rows else None


def _tensors(part: Part) -> Iterator[tuple[tuple[int, int], mx.Dtype, np.ndarray]]:
    """(layer, array of the layer), dtype and memory of each array; bfloat16, which NumPy lacks, as
    its bits."""
    import numpy as np  # 40 ms that a prompt of less than a page does not pay

    words, n_tokens = np.asarray(part.words), part.stop - part.start
    for block, start, stop in part.layout.spans(n_tokens):
        B, H, D = block.rows.shape
        shape = len(block.places), B, H, n_tokens, D
        arrays = words[start:stop].view(_numpy_dtype(block.rows.dtype)).reshape(shape)
        for place, array in zip(block.places, arrays, strict=True):
            yield place, block.rows.dtype, array


def _words(layers: Sequence[Sequence[np.ndarray]], layout: Layout) -> mx.array:
    """The tensors of each layer in one array."""
    import numpy as np

    tensors = [layers[i][j] for block in layout.blocks for i, j in block.places]
    word = _numpy_dtype(layout.word)
    return mx.array(np.concatenate([tensor.reshape(-1).view(word) for tensor in tensors]))


def _numpy_dtype(dtype: mx.Dtype) -> str:
    return "uint16" if dtype == mx.bfloat16 else str(dtype).rpartition(".")[2]
