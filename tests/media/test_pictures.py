"""What is read as a picture: people's files as they are seen, and one line for all others."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxkv.media import pictures
from mlxkv.media.pictures import picture
from tests.media.refusals import refusal

CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
"""Red, green; blue, yellow."""


def squares(side: int = 16) -> Image.Image:
    return Image.fromarray(CORNERS.repeat(side, 0).repeat(side, 1))


def written(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def corners(image: Image.Image) -> np.ndarray:
    """Colours of the four quarters of a picture."""
    width, height = image.size
    at = [height // 4, height * 3 // 4], [width // 4, width * 3 // 4]
    return np.asarray(image)[np.ix_(*at)]


def close(image: Image.Image) -> bool:
    assert image.mode == "RGB"
    return bool(np.abs(corners(image).astype(int) - CORNERS).max() <= 40)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "HEIF", "AVIF"])
def test_every_format_reads_as_written(form: str) -> None:
    pictures._formats(heif=True)
    assert close(picture(written(squares(), form)))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright(orientation: int, form: str) -> None:
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = squares()
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert close(picture(written(stored, form, exif=exif)))


def turned(heif: bytes, quarters: int) -> bytes:
    """A HEIC file with a rotation of its own, as phones write it: anticlockwise."""

    def start(kind: bytes) -> int:
        return content.index(kind) - 4

    def number(at: int, more: int) -> int:
        value = int.from_bytes(content[at : at + 4], "big")
        content[at : at + 4] = (value + more).to_bytes(4, "big")
        return value

    content = bytearray(heif)
    data = (start(b"mdat") + 8).to_bytes(4, "big")
    number(content.index(data, start(b"iloc")), 10)
    for kind, more in ((b"meta", 10), (b"iprp", 10), (b"ipma", 1)):
        number(start(kind), more)
    at = start(b"ipco")
    end, at, n = at + number(at, 9), at + 8, 1
    while at < end:
        at, n = at + number(at, 0), n + 1
    which = start(b"ipma")
    content[which + 18] += 1
    behind = which + number(which, 0) - 1
    content[behind:behind] = bytes([0x80 | n])
    content[end:end] = b"\0\0\0\x09irot" + bytes([quarters])
    return bytes(content)


@pytest.mark.parametrize("quarters", range(4))
def test_a_phones_picture_stands_upright(quarters: int) -> None:
    pictures._formats(heif=True)
    back = (None, Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_90)
    turn = back[quarters]
    stored = squares() if turn is None else squares().transpose(turn)
    assert close(picture(turned(written(stored, "HEIF"), quarters)))
    exif = Image.Exif()
    exif[0x0112] = 6  # says so beside its rotation, and is not to be followed as well
    assert close(picture(written(squares(), "HEIF", exif=exif)))


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 255))
    indexed = clear.convert("P")
    indexed.info["transparency"] = indexed.getpixel((0, 0))
    for image in (clear, indexed, clear.convert("LA")):
        seen = picture(written(image, "PNG"))
        assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (0,) * 3]


def test_sixteen_bits_keep_their_high_byte() -> None:
    levels = np.array([[0, 0x1234, 0xFFFF]], np.uint16)
    seen = picture(written(Image.fromarray(levels), "PNG"))
    assert np.asarray(seen)[0, :, 0].tolist() == [0, 0x12, 0xFF]


def test_cmyk_and_palettes_become_rgb() -> None:
    assert close(picture(written(squares().convert("CMYK"), "TIFF")))
    assert close(picture(written(squares().convert("P"), "PNG")))


def test_the_first_frame_is_taken() -> None:
    frames = [squares(), Image.new("RGB", (32, 32))]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        content = written(frames[0], form, save_all=True, append_images=frames[1:])
        assert close(picture(content)), form


def test_arrays_and_images_are_read() -> None:
    image = squares()
    exact = np.asarray(image)
    for source in (image, exact, exact / 255, np.dstack([exact, exact[:, :, :1] * 0 + 255])):
        assert np.array_equal(np.asarray(picture(source)), exact)
    gray = np.asarray(picture(exact[:, :, 0]))
    assert np.array_equal(gray, exact[:, :, :1].repeat(3, 2))


def test_a_long_thin_picture_is_a_picture() -> None:
    assert picture(written(Image.new("L", (1, 30_000)), "PNG")).size == (1, 30_000)


def refused(source: object, name: str = "") -> str:
    return refusal(picture, source, name)


def test_a_damaged_file_gets_one_line() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "HEIF", "AVIF"):
        pictures._formats(heif=True)
        content = written(Image.fromarray(noise), form)
        assert refused(content[: len(content) // 2], "a.jpg").startswith("a.jpg: ")
    assert refused(b"Dear John,", "letter.jpg").startswith("letter.jpg: not a picture")


def test_what_is_no_file_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    assert refused(tmp_path / "empty.png") == "empty.png: the file is empty"
    assert refused(tmp_path / "none.png") == "none.png: No such file or directory"
    assert refused(str(tmp_path)) == f"{tmp_path.name}: Is a directory"
    os.mkfifo(tmp_path / "pipe.png")
    assert refused(tmp_path / "pipe.png") == "pipe.png: it is a pipe, not a file"
    assert "\\x00" not in refused("a\0b.png", "b.png")
    assert "URLs are not read here" in refused("https://example.com/a.png")
    assert refused(7).startswith("the picture: a picture is a path, bytes")
    assert refused(np.zeros((4, 4, 2), np.uint8)).endswith("got [4, 4, 2]")
    assert refused(np.zeros((4, 4), np.int64)).endswith("got int64")
    assert "0 to 1" in refused(np.full((4, 4), np.nan))


def test_bounds_hold_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    content = written(squares(), "JPEG", progressive=True)
    monkeypatch.setattr(pictures, "MAX_SCANS", 3)
    assert "at most 3" in refused(content)
    monkeypatch.undo()
    plain = written(squares(), "BMP")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1023)
    Image.init()  # a plugin that loads decodes a picture of its own
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert refused(plain, "a.bmp") == ("a.bmp: 32 x 32 pixels, and at most 1,023 are allowed")
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", len(content) - 1)
    assert "bytes" in refused(content)
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "more than the" in refused(content)
