"""Formats of recordings, recognised by their first bytes; and whether a WAV file is whole."""

from __future__ import annotations

import struct
from typing import IO

from mlxkv.errors import MediaError

READABLE = "WAV, FLAC, MP3, OGG, M4A, AAC, WebM, AIFF, CAF or AMR"

_HEADS = (
    (0, b"fLaC", "flac"),
    (0, b"OggS", "ogg"),
    (4, b"ftyp", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (8, b"WAVE", "wav"),
    (8, b"AIFF", "aiff"),
    (8, b"AIFC", "aiff"),
    (0, b"caff", "caf"),
    (0, b"#!AMR", "amr"),
    (0, b"riff\x2e\x91\xcf\x11", "w64"),
)
"""Offset, bytes, and FFmpeg's name of the format."""

_UNKNOWN = 0x7FFF_0000
"""A WAV file's size from here on says that its writer did not know it: it wrote to a pipe."""

_HEADERS = 256
"""Bytes that a WAV file may lack: some writers count its headers as sound."""


def format_of(head: bytes) -> str | None:
    """FFmpeg's name of the format of a file that starts so; None for no sound."""
    for at, magic, name in _HEADS:
        if head[at : at + len(magic)] == magic:
            return name
    if head[:3] == b"ID3" and len(head) > 10:  # a tag before MP3, or before another format
        size = sum((head[9 - i] & 0x7F) << 7 * i for i in range(4))
        behind = head[10 + size :]
        return (format_of(behind) if behind[:3] != b"ID3" else None) or "mp3"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return "aac" if head[1] & 0xF6 == 0xF0 else "mp3" if head[1] & 0x06 else None
    return None


def check_wav(file: IO[bytes], name: str) -> None:
    """Refuse a WAV file that holds less sound than its header says, or much more.

    Where no sound is found FFmpeg may: some writers leave out the byte behind an odd size.

    Raises:
        MediaError: it holds less, or more.
    """
    end = file.seek(0, 2)
    file.seek(0)
    if file.read(4) != b"RIFF":
        return  # RF64 has its sizes elsewhere
    at = 12
    while at + 8 <= end:
        file.seek(at)
        kind, size = struct.unpack("<4sI", file.read(8))
        at += 8
        if kind == b"data":
            _check_data(file, name, size, end - at)
            return
        at += size + size % 2


def _check_data(file: IO[bytes], name: str, size: int, there: int) -> None:
    """Compare the size of a WAV file's sound with the bytes behind it."""
    if size == 0 or size >= _UNKNOWN:
        return
    behind = there - size
    if behind > size:
        file.seek(size + size % 2, 1)
        following = file.read(4)
        behind = 0 if following.strip().isalnum() and following.isascii() else behind
    missing = -behind
    if missing > max(_HEADERS, size // 100) or behind > size:
        raise MediaError(
            f"{name}: its header says {size:,} bytes of sound, and the file has {there:,}: it is "
            "damaged"
        )
