"""What a file is by its first bytes: a picture, a recording or neither."""

from __future__ import annotations

from mlxkv.media.sound_formats import format_of
from mlxkv.media.types import AUDIO, IMAGE

HEAD = 64
"""First bytes that tell it."""

_PICTURES = (
    (0, b"\x89PNG"),
    (0, b"\xff\xd8\xff"),
    (0, b"GIF8"),
    (0, b"BM"),
    (0, b"II*\0"),
    (0, b"MM\0*"),
    (8, b"WEBP"),
    *((0, magic + space) for magic in (b"P5", b"P6") for space in (b" ", b"\n")),
)
_UNREAD = ((4, b"jP  "), (0, b"\0\0\1\0"))
"""Pictures of formats that are not read, JPEG 2000 and icons: what reads them says which are."""
_BRANDS = (b"hei", b"hev", b"mif", b"msf", b"avi")
"""Of HEIC and AVIF files, which begin as M4A files do."""


def kind_of(head: bytes, *, read_alone: bool = False) -> str | None:
    """`image`, `audio`, or None, of a file that starts so.

    Args:
        head: the first bytes.
        read_alone: leave out pictures of formats that are not read.
    """
    pictures = _PICTURES if read_alone else (*_PICTURES, *_UNREAD)
    if any(head.startswith(magic, at) for at, magic in pictures):
        return IMAGE
    if head[4:8] == b"ftyp" and head[8:11] in _BRANDS:
        return IMAGE
    return AUDIO if format_of(head) else None
