"""What a file is, by its first bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlxkv.media.kinds import HEAD, kind_of
from mlxkv.media.parts import content_bytes, is_same

SOUND = b"RIFF\xec\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0" + bytes(200)


def picture(form: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize(
    "form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "ICO", "AVIF"]
)
def test_pictures(form):
    head = picture(form)[:HEAD]
    assert kind_of(head) == "image"
    assert (kind_of(head, read_alone=True) == "image") == (form not in ("JPEG2000", "ICO"))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "image"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "image"),
        (b"\0\0\0\x1cftypM4A \0\0\0\0", "audio"),
        (b"fLaC\0\0\0\x22", "audio"),
        (b"ID3\x04\0\0\0\0\0\0" + b"\xff\xfb\x90\x64", "audio"),
        (SOUND[:HEAD], "audio"),
        (b"a text", None),
        (b"", None),
    ],
)
def test_recordings_and_others(head, kind):
    assert kind_of(head) == kind


def test_messages_with_arrays_are_compared_and_their_bytes_counted():
    def heard(sound: Any, text: str = "a") -> list[Any]:
        parts = [{"type": "audio", "audio": sound}, {"type": "text", "text": text}]
        return [{"role": "user", "content": parts}]

    array = np.zeros(4, np.float32)
    assert is_same(heard((array, 16_000)), heard((array, 16_000)))
    assert not is_same(heard((array, 16_000)), heard((array.copy(), 16_000)))
    assert is_same(heard(b"RIFF"), heard(b"RIFF")) and not is_same(heard(b"RIFF"), heard(b"RIF"))
    assert not is_same(heard(b"RIFF"), heard(b"RIFF", "b"))
    assert not is_same(heard(b"RIFF")[0], {**heard(b"RIFF")[0], "name": "x"})
    assert content_bytes(heard((array, 16_000))) == 16 and content_bytes(heard(b"RIFF")) == 4
