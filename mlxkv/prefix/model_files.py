"""Where one model's pages lie on disk, and as which bytes: encrypted where there is a key.

Encrypted, the folder's name and the names of its files are masked (`base.seal`); what a file is
authenticated with is its place, so that no two can be exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from mlxkv.base.seal import Seal, UnsealError
from mlxkv.prefix.eviction import Stored
from mlxkv.prefix.on_disk.folder import Folder, read_page
from mlxkv.prefix.on_disk.format import (
    DamagedPage,
    PageFile,
    PageKey,
    decode,
    decode_tokens,
    encode,
)


class ModelFiles:
    """The files of one model's pages.

    Args:
        folder: of all models' pages.
        fingerprint: of the model.
        seal: how the files are written.

    Attributes:
        model: name of their folder.
    """

    def __init__(self, folder: Folder, fingerprint: str, seal: Seal):
        self.seal, self.fingerprint = seal, fingerprint
        self.model = seal.fingerprint(fingerprint)[:32]
        self._path = f"{folder.pages / self.model}{os.sep}"

    def on_disk(self, key: PageKey) -> PageKey:
        """The key that a page's file is named by."""
        return on_disk(self.seal, key)

    def meant(self, key: PageKey) -> PageKey:
        """The inverse of `on_disk`."""
        return meant(self.seal, key)

    def path(self, key: PageKey) -> str:
        """A page's file."""
        return self._path + self.on_disk(key).file_name

    def nbytes(self, key: PageKey) -> int:
        """Bytes of a page's file; 0 if there is none."""
        try:
            return os.stat(self.path(key)).st_size  # noqa: PTH116
        except OSError:
            return 0

    def stored(self, key: PageKey, n_bytes: int, used_ns: int) -> Stored:
        """A page as `eviction` knows it."""
        return Stored(self.model, self.on_disk(key), n_bytes, used_ns)

    def present(self) -> Iterator[PageKey]:
        """The pages that are there."""
        with suppress(OSError), os.scandir(self._path) as entries:
            for entry in entries:
                if key := PageKey.parse(entry.name):
                    yield self.meant(key)

    def read(self, key: PageKey, *, header_only: bool = False) -> bytes:
        """A page's file, see `read_page`; raises OSError."""
        return read_page(self.path(key), header_only=header_only)

    def encode(self, page: PageFile) -> bytes:
        """The bytes of a page's file."""
        data = encode(page, self.fingerprint)
        place = _place(self.model, self.on_disk(page.key))
        return self.seal.seal(data, place, 8 + int.from_bytes(data[:8], "little"))

    def decode(self, data: bytes, key: PageKey) -> PageFile:
        """The inverse of `encode`.

        Raises:
            DamagedPage: it is damaged, or another page.
        """
        page, fingerprint = decode_sealed(self.seal, data, key, self.model)
        if fingerprint != self.fingerprint:
            raise DamagedPage("a page of another model")
        return page

    def decode_tokens(self, data: bytes, key: PageKey) -> bytes:
        """The tokens of a page, from its file's header.

        Raises:
            DamagedPage: it is damaged, or another page.
        """
        place = _place(self.model, self.on_disk(key))
        try:
            header = self.seal.unseal(data, place, first_only=True)
        except UnsealError as error:
            raise DamagedPage(str(error)) from error
        return decode_tokens(header[8:], key)


def on_disk(seal: Seal, key: PageKey) -> PageKey:
    """The key that a page's file is named by."""
    if not seal.is_on:
        return key
    return PageKey(seal.masked(key.parent), seal.masked(key.name), key.n_tokens, key.part)


def meant(seal: Seal, key: PageKey) -> PageKey:
    """The inverse of `on_disk`."""
    if not seal.is_on:
        return key
    return PageKey(seal.unmasked(key.parent), seal.unmasked(key.name), key.n_tokens, key.part)


def decode_sealed(seal: Seal, data: bytes, key: PageKey, model: str) -> tuple[PageFile, str]:
    """A page and its model's fingerprint, from a file that may be encrypted.

    Args:
        seal: how the folder's files are written.
        data: the file's bytes.
        key: what the page must be.
        model: name of the file's folder.

    Raises:
        DamagedPage: it is damaged, or another page.
    """
    try:
        content = seal.unseal(data, _place(model, on_disk(seal, key)))
        return decode(content, key, authentic=seal.is_on)
    except UnsealError as error:
        raise DamagedPage(str(error)) from error


def _place(model: str, key: PageKey) -> str:
    return f"{model}/{key.file_name}"
