"""What a field with a picture or sound holds: base64, or a data URL (RFC 2397).

Clients differ: base64 comes with line breaks, without its padding or in the alphabet of URLs, data
URLs with parameters or percent-encoded, and with the type of another format. What a file is its
content says, not the type that came with it.
"""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]{0,31}):", re.ASCII)
_URL_ALPHABET = str.maketrans("-_", "+/")
_MAX_HEAD = 1024
"""Characters of a data URL before its comma."""


def scheme_of(text: str) -> str:
    """The scheme of a URL in small letters; "" for another text."""
    found = _SCHEME.match(text)
    return found[1].lower() if found else ""


def decoded(text: str) -> bytes:
    """The bytes of base64, or of a data URL.

    Raises:
        ValueError: neither, or empty; the text says what is wrong.
    """
    data = _of_data_url(text) if scheme_of(text) == "data" else _of_base64(text)
    if not data:
        raise ValueError("is empty")
    return data


def _of_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or len(head) > _MAX_HEAD:
        raise ValueError("is a data URL without a comma: data:image/png;base64,...")
    is_base64 = head.rpartition(";")[2].strip().lower() == "base64"
    if not is_base64:
        return unquote_to_bytes(body)
    return _of_base64(unquote_to_bytes(body).decode("latin-1") if "%" in body else body)


def _of_base64(text: str) -> bytes:
    compact = "".join(text.split()).translate(_URL_ALPHABET).rstrip("=")
    padded = compact + "=" * (-len(compact) % 4)
    try:
        return binascii.a2b_base64(padded, strict_mode=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not base64") from None
