"""Bytes and counts as text."""

from __future__ import annotations

import re

from mlxkv.errors import UsageError

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


def human_bytes(n_bytes: int) -> str:
    """`n_bytes` with a binary unit: 93.8 MiB."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB" if size < 1024 else f"{size / 1024:.2f} TiB"


def told_apart(more: int, less: int) -> tuple[str, str]:
    """Two sizes as text, in bytes where rounding would make both read the same."""
    texts = human_bytes(more), human_bytes(less)
    if texts[0] == texts[1] and more != less:
        return f"{more:,} bytes", f"{less:,} bytes"
    return texts


def parse_bytes(text: str | int | None) -> int | None:
    """Bytes from "16GiB", "500MB", a number, or None and "auto" (None).

    Raises:
        UsageError: it is none of these.
    """
    if text is None or text == "auto":
        return None
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"must be like 16GiB, 500MB or auto; got {text!r}", field="memory")
    return int(float(match[1]) * _UNITS[match[2]])


def human_count(n: int) -> str:
    """A count of parameters: 134.5M."""
    for limit, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K")):
        if n >= limit:
            return f"{n / limit:.1f}{unit}"
    return str(n)
