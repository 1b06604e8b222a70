"""A model's reader of pictures and sound, and what it has read: each file once."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.errors import MediaError
from mlxkv.media.types import AUDIO, IMAGE, KINDS, Medium

if TYPE_CHECKING:
    from mlxkv.media.reader import MediaReader

MAX_DATA_BYTES = 64 << 20
"""Bytes of decoded media that are kept: of about eight pictures."""
MAX_KNOWN = 4096
"""Files that are known without being decoded again, as long as their KV or rows are kept."""
NAMES = {IMAGE: "pictures", AUDIO: "sound"}

Read = Callable[[], tuple[Medium, ...]]


class MediaSide:
    """Reads the media of one model's prompts; from any thread, and without MLX.

    Args:
        path: the model's directory.
        kinds: those whose encoders the model has; None for all that its files say.
    """

    def __init__(self, path: Path, kinds: Collection[str] | None = None):
        self._path, self._kinds = path, kinds
        self._lock = threading.Lock()
        self._known: OrderedDict[object, tuple[Medium, ...]] = OrderedDict()
        self._data: OrderedDict[object, tuple[Mapping[str, Any], ...]] = OrderedDict()

    @cached_property
    def reader(self) -> MediaReader | None:
        """Of the model's files; None for a model that takes text alone."""
        from mlxkv.media.reader import reader_of  # few prompts have media

        return reader_of(self._path)

    @cached_property
    def kinds(self) -> frozenset[str]:
        """What the model takes beside text."""
        own = frozenset() if self.reader is None else self.reader.kinds
        return own if self._kinds is None else own & frozenset(self._kinds)

    def read(self, kind: str, part: Mapping[str, Any], owner: str = "") -> tuple[Medium, ...]:
        """The media of a part of a message, most often one.

        Args:
            kind: of the part.
            part: of a message, see `media.parts`.
            owner: see `Medium`; another's part is decoded again.

        Raises:
            MediaError: the model takes no such thing, or it cannot be read.
        """
        source, name, budget = part[kind], str(part.get("name") or ""), part.get("budget")
        if not name and isinstance(source, str | os.PathLike):
            name = Path(source).name
        if kind not in self.kinds:
            said = f" ({name})" if name else ""
            takes = " and ".join(["text", *(NAMES[k] for k in KINDS if k in self.kinds)])
            raise MediaError(f"this model takes {takes} only, and no {NAMES[kind]}{said}")
        if budget is not None and (kind != IMAGE or type(budget) is not int):
            raise MediaError(f"budget must be a number of tokens of a picture; got {budget!r}")

        def read() -> tuple[Medium, ...]:
            assert self.reader is not None
            if kind == AUDIO:
                found = self.reader.audio(source, name=name)
            else:
                found = (self.reader.image(source, budget, name=name),)
            return tuple(replace(medium, owner=owner) for medium in found)

        key = _key(source)
        return read() if key is None else self._once((owner, kind, budget, key), name, read)

    def _once(self, key: object, name: str, read: Read) -> tuple[Medium, ...]:
        with self._lock:
            known, data = self._known.get(key), self._data.get(key)
            if known is not None:
                self._known.move_to_end(key)
            if data is not None:
                self._data.move_to_end(key)
        if known is None:
            media = read()
            self._keep(key, media)
            return media
        again: tuple[Mapping[str, Any], ...] = data or tuple(
            _Unread(self, key, i, medium, read) for i, medium in enumerate(known)
        )
        return tuple(_with(m, name or m.name, d) for m, d in zip(known, again, strict=True))

    def _keep(self, key: object, media: tuple[Medium, ...]) -> None:
        with self._lock:
            self._known[key] = tuple(_with(medium, medium.name, None) for medium in media)
            self._data[key] = tuple(medium.data or {} for medium in media)
            while len(self._known) > MAX_KNOWN:
                self._data.pop(self._known.popitem(last=False)[0], None)
            while self._data and sum(map(_nbytes, self._data.values())) > MAX_DATA_BYTES:
                self._data.popitem(last=False)

    def again(self, key: object, read: Read) -> tuple[Medium, ...]:
        """Decode once more what was known."""
        media = read()
        self._keep(key, media)
        return media


class _Unread(Mapping[str, Any]):
    """Arrays of a file that was read before: decoded again if an encoder asks for them."""

    def __init__(self, side: MediaSide, key: object, i: int, medium: Medium, read: Read):
        self._side, self._key, self._i, self._medium, self._read = side, key, i, medium, read

    @cached_property
    def _arrays(self) -> Mapping[str, Any]:
        media = self._side.again(self._key, self._read)
        if len(media) <= self._i or media[self._i].digest != self._medium.digest:
            raise MediaError(f"{self._medium.name}: the file has changed while it was read")
        return media[self._i].data or {}

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _with(medium: Medium, name: str, data: Mapping[str, Any] | None) -> Medium:
    return replace(medium, name=name, data=data)


def _nbytes(data: tuple[Mapping[str, Any], ...]) -> int:
    return sum(array.nbytes for arrays in data for array in arrays.values())


def _key(source: Any) -> object | None:
    """What tells a source from others without decoding it; None where nothing does."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    if not isinstance(source, str | os.PathLike):
        return None
    try:
        about = Path(source).stat()
    except (OSError, ValueError):
        return None  # the reader says what is wrong
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns
