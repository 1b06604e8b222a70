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
_URL_ALPHABET = bytes.maketrans(b"-_", b"+/")
_SPACES = b" \t\r\n\v\f"
_BLOCK = 4 << 10
"""Bytes that are decoded at a time where each would become an object."""
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
        return _unquoted(body)
    return _of_base64(_unquoted(body).decode("latin-1") if "%" in body else body)


def _unquoted(text: str) -> bytes:
    """Percent-encoded bytes: in blocks, none of which ends within an escape."""
    quoted = text.encode()
    made, at = bytearray(), 0
    while at < len(quoted):
        end = at + _BLOCK
        if end < len(quoted) and (escape := quoted.rfind(b"%", end - 2, end)) >= 0:
            end = escape
        made += unquote_to_bytes(quoted[at:end])
        at = end
    return bytes(made)


def _of_base64(text: str) -> bytes:
    try:
        compact = text.encode("ascii").translate(_URL_ALPHABET, _SPACES).rstrip(b"=")
        return binascii.a2b_base64(compact + b"=" * (-len(compact) % 4), strict_mode=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("is not base64") from None
