"""One page as bytes: a safetensors file with its identity and a checksum.

Invariants:
- `decode` returns a page only after every check: safetensors' own, the format, the name, which
  follows from the tokens and the page before it, and the checksum or a cipher's tag.
- The checksum covers all that is returned: tensors' names, dtypes, shapes and bytes, and every
  entry of the metadata; not blanks between JSON tokens.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

FORMAT_VERSION = 1
ROOT = "0" * 32
"""The parent of a sequence's first page."""
MAX_TOKENS = 256
"""Tokens of a whole page: `cache.STEP`, which cannot be imported without MLX."""
MAX_HEADER_BYTES = 1 << 20
MAX_PAGE_BYTES = 4 << 30
_FILE_NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{32})\.(\d{3})\.(full|window)\.safetensors")
_ENTRIES = {"format", "fingerprint", "parent", "start", "tokens", "dtypes", "part", "sha256"}


class DamagedPage(ValueError):
    """Bytes that are no page, or another page; only raised among modules that read pages."""


@dataclass(frozen=True, slots=True)
class PageKey:
    """The name of one part of a page.

    Args:
        parent: name of the page before it; `ROOT` for the first.
        name: `page_name(parent, tokens)`.
        n_tokens: 256, or fewer for a tip.
        part: `full` or `window`.
    """

    parent: str
    name: str
    n_tokens: int
    part: str

    @property
    def file_name(self) -> str:
        """The file's name in its model's folder."""
        return f"{self.parent}.{self.name}.{self.n_tokens:03}.{self.part}.safetensors"

    @classmethod
    def parse(cls, file_name: str) -> PageKey | None:
        """The inverse of `file_name`; None for any other file."""
        found = _FILE_NAME.fullmatch(file_name)
        if found is None or not 1 <= int(found[3]) <= MAX_TOKENS:
            return None
        return cls(found[1], found[2], int(found[3]), found[4])


@dataclass(frozen=True, slots=True)
class PageFile:
    """One part of a page.

    Args:
        key: its name.
        start: position of its first token.
        tokens: int32, little-endian, 4 * n_tokens bytes.
        tensors: by name.
        dtypes: MLX's name of each tensor's dtype; bfloat16 is stored as the bits of uint16.
    """

    key: PageKey
    start: int
    tokens: bytes
    tensors: Mapping[str, np.ndarray]
    dtypes: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(array.nbytes for array in self.tensors.values())

    @property
    def bound_bytes(self) -> int:
        """An upper bound of the encoded file's bytes."""
        names = sum(len(json.dumps(name)) * 2 + 300 for name in self.tensors)
        return self.nbytes + names + 2 * len(self.tokens) + 2048


def page_name(parent: str, tokens: bytes) -> str:
    """The name of a page, 32 hex digits of a hash: depends on all tokens up to its end.

    `parent` is the name of the page before it, `tokens` are int32, little-endian.
    """
    return hashlib.sha256(parent.encode("ascii") + tokens).hexdigest()[:32]


def encode(page: PageFile, fingerprint: str) -> bytes:
    """The bytes of a page's file."""
    import numpy as np  # 40 ms that only a process with pages pays
    from safetensors.numpy import save

    assert set(page.tensors) == set(page.dtypes) and page.tensors
    assert page_name(page.key.parent, page.tokens) == page.key.name
    assert len(page.tokens) == 4 * page.key.n_tokens
    # safetensors writes an array's memory as it lies.
    tensors = {name: np.asarray(array, order="C") for name, array in page.tensors.items()}
    entries = {
        "format": str(FORMAT_VERSION),
        "fingerprint": fingerprint,
        "parent": page.key.parent,
        "part": page.key.part,
        "start": str(page.start),
        "tokens": base64.b64encode(page.tokens).decode("ascii"),
        "dtypes": json.dumps(dict(sorted(page.dtypes.items()))),
    }
    return save(tensors, {**entries, "sha256": _checksum(entries, tensors)})


def decode(data: bytes, key: PageKey, *, authentic: bool = False) -> tuple[PageFile, str]:
    """A page and its model's fingerprint, from its file's bytes.

    Args:
        data: the bytes.
        key: of the page.
        authentic: whether decryption has shown that nothing was changed: the checksum, which takes
            as long, is left out.

    Raises:
        DamagedPage: `encode` did not make them for this key.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedPage(f"not a safetensors file ({error})") from error
    # The library gives the metadata only of a file that it maps, and a bad sector under a mapping
    # kills the process. It has just accepted this header, so reading it again is safe.
    entries = _metadata(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start, tokens = _identify(entries, key)
    sha256 = entries.pop("sha256")
    if not authentic and _checksum(entries, tensors) != sha256:
        raise DamagedPage("the checksum differs")
    dtypes = json.loads(entries["dtypes"])
    return PageFile(key, start, tokens, tensors, dtypes), entries["fingerprint"]


def decode_tokens(header: bytes, key: PageKey) -> bytes:
    """The tokens of a page, checked against its name, from the JSON behind its first 8 bytes.

    Raises:
        DamagedPage: it is the header of something else.
    """
    return _identify(_metadata(header), key)[1]


def _metadata(header: bytes) -> dict[str, str]:
    try:
        entries = json.loads(header)["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedPage("no metadata") from error
    if not isinstance(entries, dict) or set(entries) != _ENTRIES:
        raise DamagedPage("other metadata")
    if not all(isinstance(value, str) for value in entries.values()):
        raise DamagedPage("metadata that is no text")
    return entries


def _identify(entries: Mapping[str, str], key: PageKey) -> tuple[int, bytes]:
    """(start, tokens) of a header, checked to be this page's."""
    if entries["format"] != str(FORMAT_VERSION):
        raise DamagedPage(f"format {entries['format']}")
    try:
        tokens = base64.b64decode(entries["tokens"], validate=True)
        start = int(entries["start"])
    except ValueError as error:
        raise DamagedPage("metadata that cannot be read") from error
    if (entries["parent"], entries["part"]) != (key.parent, key.part) or start < 0:
        raise DamagedPage("another page's metadata")
    if len(tokens) != 4 * key.n_tokens or page_name(key.parent, tokens) != key.name:
        raise DamagedPage("the name is not that of the tokens")
    return start, tokens


def _checksum(entries: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    shapes = [(name, x.dtype.str, list(x.shape)) for name, x in sorted(tensors.items())]
    digest = hashlib.sha256(json.dumps([sorted(entries.items()), shapes]).encode())
    for _, array in sorted(tensors.items()):
        digest.update(array.reshape(-1).view("u1").data)
    return digest.hexdigest()
