"""Pictures to RGB pixels: upright, without transparency, 8 bits, the first frame.

The size is known from the header, and is checked before anything is decoded. Pillow reads only the
formats of `FORMATS`: others of its readers call other programs.
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from mlxkv.errors import MediaError, lacks_memory
from mlxkv.media.limits import MAX_PICTURE_BYTES, MAX_PIXELS, MAX_SCANS
from mlxkv.media.source import PathLike, name_of, opened

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    ImageSource: TypeAlias = PathLike | bytes | Image | np.ndarray
else:
    ImageSource: TypeAlias = object

FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "GIF",
    "HEIF",
    "AVIF",
    "TIFF",
    "BMP",
    "PPM",
)
"""What is read: MPO is the JPEG of some phones, with a second picture behind the first."""

READABLE = "JPEG, PNG, WebP, GIF, HEIC, AVIF, TIFF or BMP"


def picture(source: ImageSource, name: str = "") -> Image:
    """An RGB picture as a person sees it.

    EXIF orientation is applied, transparency laid over white, 16 bits cut to 8, CMYK and palettes
    converted; of several frames the first is taken.

    Args:
        source: path, bytes of a file, PIL image, or array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or
            `[H, W, 4]` of uint8, or of floats from 0 to 1.
        name: for messages.

    Raises:
        MediaError: it is no picture, is damaged, or is larger than allowed.
    """
    from PIL import Image

    name = name_of(source, name, "the picture")
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        with opened(source, name, MAX_PICTURE_BYTES) as file:
            return _decoded(file.read(), name)
    if not isinstance(source, Image.Image):
        source = _from_array(source, name)
    _check_size(source.size, name)
    return _flat(source, name)


def _decoded(content: bytes, name: str) -> Image:
    from io import BytesIO

    from PIL import Image, UnidentifiedImageError

    if content.startswith(b"\xff\xd8") and (n := content.count(b"\xff\xda")) > MAX_SCANS:
        raise MediaError(f"{name}: {n:,} scans in a JPEG file, and at most {MAX_SCANS} are allowed")
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        image = Image.open(BytesIO(content), formats=_formats(content[4:8] == b"ftyp"))
    except bombs as error:
        raise MediaError(f"{name}: more than the {MAX_PIXELS:,} pixels allowed") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: not a picture that can be read ({READABLE})") from error
    except Exception as error:
        raise _damaged(error, name) from error
    with image:
        _check_size(image.size, name)
        return _flat(image, name)


@cache
def _formats(heif: bool) -> tuple[str, ...]:
    """Those of `FORMATS` that Pillow has here; HEIF through pillow-heif, imported where needed."""
    from PIL import Image

    # Of what is large or damaged we say so in one line: Pillow's warning would only precede it.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    if heif:
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(form for form in FORMATS if form in Image.OPEN)


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{name}: a picture of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name}: {width} x {height} pixels, and at most {MAX_PIXELS:,} are allowed"
        )


def _flat(image: Image, name: str) -> Image:
    try:
        image.load()
        return _rgb(_upright(image))
    except Exception as error:
        raise _damaged(error, name) from error


def _damaged(error: Exception, name: str) -> Exception:
    """What a decoder's error means; a lack of memory stays one."""
    if lacks_memory(error):
        return error
    return MediaError(f"{name}: the picture is damaged")


def _upright(image: Image) -> Image:
    """Turned as its EXIF orientation says; as it is where that cannot be read."""
    from PIL.ExifTags import Base
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(Base.Orientation, 1))
    except Exception:  # a damaged note about a picture, not a damaged picture
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _eight_bits(image: Image) -> Image:
    """Gray levels of 16 bits, 32 bits or floats, as 8 bits: the high byte, as for 16-bit RGB."""
    import numpy as np
    from PIL import Image

    levels = np.asarray(image)
    if levels.dtype.kind == "f":
        levels = np.nan_to_num(levels)
        levels = np.rint(levels * 255) if levels.max() <= 1 else levels
    elif levels.max() > 255:
        levels = levels >> 8
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def _from_array(source: object, name: str) -> Image:
    import numpy as np
    from PIL import Image

    if not isinstance(source, np.ndarray):
        raise MediaError(
            f"{name}: a picture is a path, bytes, a PIL image or a NumPy array; "
            f"got {type(source).__name__}"
        )
    shape = source.shape
    if len(shape) == 3 and shape[2] == 1:
        source = source[:, :, 0]
    if (
        source.ndim not in (2, 3)
        or not source.size
        or (source.ndim == 3 and shape[2] not in (3, 4))
    ):
        raise MediaError(f"{name}: an array [height, width, 3 or 4] is needed; got {list(shape)}")
    _check_size((shape[1], shape[0]), name)
    if source.dtype.kind == "f":
        if not (source.min() >= 0 and source.max() <= 1):
            raise MediaError(f"{name}: an array of floats must be within 0 to 1")
        source = np.rint(source * 255).astype(np.uint8)
    if source.dtype != np.uint8:
        raise MediaError(f"{name}: an array of uint8 or floats is needed; got {source.dtype}")
    return Image.fromarray(np.ascontiguousarray(source))
