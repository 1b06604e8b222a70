"""Pictures and recordings that go with a message: files, and what the microphone heard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.base.units import human_bytes
from mlxkv.errors import UsageError
from mlxkv.media.types import AUDIO, IMAGE

if TYPE_CHECKING:
    from mlxkv.terminal.backend import Speaker

WORDS = {IMAGE: "picture", AUDIO: "sound"}
PLURALS = {IMAGE: "pictures", AUDIO: "sound"}
_SUFFIXES = {
    IMAGE: "jpg jpeg png webp gif heic heif avif tif tiff bmp jp2 ppm pgm ico",
    AUDIO: "wav flac mp3 ogg oga opus m4a aac aif aiff aifc caf mka mp4 webm",
}
SUFFIXES = {f".{suffix}": kind for kind, line in _SUFFIXES.items() for suffix in line.split(" ")}
"""Of files' names -> what such a file is."""
Content = str | list[dict[str, Any]]
"""A message's text, or its parts in order."""


@dataclass(frozen=True)
class Attachment:
    """A picture or a recording.

    Args:
        kind: `image` or `audio`.
        name: for messages; printable.
        data: the bytes of its file.
        path: of the file, absolute; None for none.
    """

    kind: str
    name: str
    data: bytes
    path: str | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its bytes."""
        return hashlib.sha256(self.data).hexdigest()

    def __str__(self) -> str:
        return f"{WORDS[self.kind]} {self.name}, {human_bytes(len(self.data))}"


def kind_of(path: Path) -> str | None:
    """Whether a file is a picture or a recording, by its first bytes, else by its name; None for
    neither.
    """
    from mlxkv.media import kinds

    try:
        with path.open("rb") as file:
            head = file.read(kinds.HEAD)
    except OSError:
        return None
    return kinds.kind_of(head) or SUFFIXES.get(path.suffix.lower())


def read(path: Path, kind: str | None = None) -> Attachment:
    """A file as an attachment.

    Args:
        kind: what it has to be; None for either.

    Raises:
        UsageError: there is no such file, or it is not that.
    """
    from mlxkv.media.limits import MAX_PICTURE_BYTES, MAX_SOUND_BYTES
    from mlxkv.media.source import opened

    path, name = path.expanduser(), printable(path.name)
    if not path.is_file():
        why = "not a file" if path.exists() else "no such file"
        raise UsageError(f"{printable(str(path))}: {why}")
    found = kind_of(path)
    if found is None or kind not in (None, found):
        wanted = WORDS[kind] if kind else "picture or sound"
        raise UsageError(f"{name}: no {wanted} that can be read")
    most = MAX_PICTURE_BYTES if found == IMAGE else MAX_SOUND_BYTES
    with opened(path, name, most) as file:
        return Attachment(found, name, file.read(), str(path.resolve()))


def checked(path: Path, kind: str | None = None) -> Attachment:
    """A file as an attachment, decoded once: a damaged one is not found out with the message.

    Arguments as for `read`.

    Raises:
        UsageError: also for one that is damaged, or larger than allowed.
    """
    from mlxkv.media.pictures import picture
    from mlxkv.media.sound import decoded

    made = read(path, kind)
    decode = picture if made.kind == IMAGE else decoded
    decode(made.data, made.name)
    return made


def recorded() -> Attachment:
    """What the microphone hears until Enter is pressed.

    Raises:
        UsageError: see `microphone.record`.
    """
    from mlxkv.terminal.files import microphone

    return Attachment(AUDIO, "recording.wav", microphone.wav(*microphone.record()))


def check_able(speaker: Speaker, attached: Iterable[Attachment]) -> None:
    """Raise UsageError if a model cannot take them."""
    for each in attached:
        if each.kind not in speaker.media_kinds:
            raise UsageError(f"{each.name}: {speaker.name} takes no {PLURALS[each.kind]}")


def content(parts: Sequence[str | Attachment], budget: int | None = None) -> Content:
    """A message's content: its text alone, or its parts in order.

    Args:
        budget: most tokens of each picture, for models that let them be chosen.
    """
    made: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Attachment):
            made.append({"type": part.kind, part.kind: part.data, "name": part.name})
            if budget is not None and part.kind == IMAGE:
                made[-1]["budget"] = budget
        elif part.strip():
            made.append({"type": "text", "text": part.strip()})
    if all(isinstance(part, str) for part in parts):
        return "".join(part for part in parts if isinstance(part, str))
    return made


def text_of(content: Content) -> str:
    """A message as one line shows it."""
    if isinstance(content, str):
        return content
    names = (f"({WORDS[part['type']]} {printable(part['name'])})" if part["type"] in WORDS
             else part["text"] for part in content)  # fmt: skip
    return " ".join(names)


def printable(text: str) -> str:
    """Text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)
