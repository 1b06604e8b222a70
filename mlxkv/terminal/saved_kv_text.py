"""What `mlxkv kv` prints of saved KV."""

from __future__ import annotations

import datetime
import textwrap
from collections import Counter
from typing import Any

from mlxkv.base.seal import VARIABLE
from mlxkv.base.units import human_bytes
from mlxkv.generation.kv_check import KVReport
from mlxkv.media.types import AUDIO, IMAGE
from mlxkv.prefix.on_disk.folder import Folder
from mlxkv.saved_kv.gc import GcReport
from mlxkv.saved_kv.manifest import NamedKV
from mlxkv.saved_kv.registry import KVNames
from mlxkv.terminal.console import table

SHOWN_TEXT = 400
MEDIA = {IMAGE: "pictures", AUDIO: "sound"}
"""Kind -> its row."""
_UNTRUSTED = "not yet: imported, and its KV serves no prompt before a part of it was computed here"


def summary_dict(names: KVNames) -> dict[str, Any]:
    """All names, and what the folder takes."""
    folder = Folder(names.root, names.limits)
    scan = folder.scan()
    return {
        "names": [card_dict(names, saved) for saved in names.list()],
        "locked_names": names.n_locked(),
        "folder": str(names.root),
        "bytes": scan.n_bytes,
        "pages": len(scan.pages),
        "cap_bytes": names.limits.cap_bytes,
        "written_today_bytes": folder.written_today(),
        "daily_bytes": names.limits.daily_bytes,
    }


def summary_text(names: KVNames) -> str:
    """A table of all names, and a line on what the folder takes."""
    about = summary_dict(names)
    rows = [
        (
            card["name"],
            card["model"],
            f"{card['tokens']:,}",
            human_bytes(card["bytes"]),
            "pinned" if card["pinned"] else "",
            card["created"][:16].replace("T", " "),
        )
        for card in about["names"]
    ]
    header = ("NAME", "MODEL", "TOKENS", "SIZE", "PINNED", "SAVED")
    total = (
        f"{human_bytes(about['bytes'])} of {human_bytes(about['cap_bytes'])} in "
        f"{about['pages']:,} files, those of unnamed prefixes included; "
        f"{human_bytes(about['written_today_bytes'])} of {human_bytes(about['daily_bytes'])} "
        "written today"
    )
    listed = table(header, rows, right=("TOKENS", "SIZE")) if rows else "nothing is saved yet"
    if locked := about["locked_names"]:
        total += f"\n{locked:,} more are encrypted with another key ({VARIABLE})"
    return f"{listed}\n\n{total}"


def card_dict(names: KVNames, saved: NamedKV) -> dict[str, Any]:
    """One name."""
    missing = len(names.missing(saved))
    return {
        "name": saved.name,
        "model": saved.model,
        "tokens": saved.n_tokens,
        "bytes": names.nbytes(saved),
        "files": len(saved.keys),
        "missing_files": missing,
        "pinned": saved.pinned,
        "created": datetime.datetime.fromtimestamp(saved.created).isoformat(timespec="seconds"),
        "dtype": saved.dtype,
        "kv_type": saved.kv_type,
        "kind": "text" if saved.messages is None else "chat",
        "fingerprint": saved.fingerprint,
        "trusted": not saved.quarantine,
        "media": [
            {"kind": medium.kind, "name": medium.name, "tokens": medium.n_tokens}
            for medium in saved.media
        ],
        "text": saved.text,
    }


def card_text(names: KVNames, saved: NamedKV) -> str:
    """One name, with the head of its text."""
    card = card_dict(names, saved)
    lost = card["missing_files"]
    kinds = Counter(medium.kind for medium in saved.media)
    rows = (
        ("name", saved.name),
        ("model", f"{saved.model} ({saved.dtype}, {saved.kv_type})"),
        ("kind", "a text to continue" if saved.messages is None else "the start of a chat"),
        ("tokens", f"{saved.n_tokens:,}"),
        *((word, f"{kinds[kind]:,}") for kind, word in MEDIA.items() if kinds[kind]),
        ("size", f"{human_bytes(card['bytes'])} in {card['files']} files"),
        ("state", f"{lost} files are gone and will be computed again" if lost else "complete"),
        ("pinned", "yes" if saved.pinned else "no"),
        *([("trusted", _UNTRUSTED)] if saved.quarantine else []),
        ("saved", card["created"].replace("T", " ")),
        ("fingerprint", saved.fingerprint),
    )
    head = textwrap.shorten(saved.text, SHOWN_TEXT, placeholder=" ...")
    return "\n".join(f"{name:<12} {text}" for name, text in rows) + f"\n\n{head}"


def check_text(report: KVReport) -> str:
    """What was compared, and whether it is the same."""
    compared = f"{report.name}: {report.n_checked:,} of {report.n_tokens:,} tokens computed again"
    if (false := report.false_span) is not None:
        return (
            f"{compared}\nFAILED: the KV of tokens {false.start:,} to {false.stop - 1:,} differs "
            f"by {false.difference:.2g}, allowed {report.tolerance:.2g}"
        )
    if not report.passed:
        return f"{compared}\nFAILED: none of its KV is on disk any more; save it again"
    worst = max(span.difference or 0.0 for span in report.spans)
    return f"{compared}\nall agree: they differ by {worst:.2g}, allowed {report.tolerance:.2g}"


def gc_text(report: GcReport) -> str:
    """What a clean-up did."""
    rows = (
        ("leftovers", report.leftovers, report.leftover_bytes),
        ("damaged", report.damaged, report.damaged_bytes),
        ("over the cap", report.evicted, report.evicted_bytes),
        ("left", report.n_pages, report.n_bytes),
    )
    return "\n".join(f"{name:<14} {n:>7,} files  {human_bytes(size)}" for name, n, size in rows)
