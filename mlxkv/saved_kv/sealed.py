"""Manifests as files: encrypted where there is a key.

An encrypted one shows its pages by their masked names, so that a process without the key evicts
them after all others as well, and never if they are pinned. Its text and tokens are sealed.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from mlxkv.base.seal import Seal, UnsealError
from mlxkv.prefix.model_files import on_disk
from mlxkv.saved_kv.manifest import NamedKV

SEALED_VERSION = 3
_MODEL = re.compile(r"[0-9a-f]{32}")


class OtherKeyError(ValueError):
    """A manifest that is encrypted with another key; only raised within this room."""


def encode_manifest(named: NamedKV, seal: Seal) -> bytes:
    """A manifest's file.

    Raises:
        ValueError: `decode_manifest` would refuse it.
    """
    data = named.to_json()
    if not seal.is_on:
        return data
    folder = seal.fingerprint(named.pages_fingerprint)
    shown = {
        "version": SEALED_VERSION,
        "fingerprint": folder,
        "quarantine": folder if named.quarantine else "",
        "pinned": named.pinned,
        "keys": [on_disk(seal, key).file_name for key in named.keys],
        "sealed": base64.b64encode(seal.seal(data, _place(named.name))).decode("ascii"),
    }
    return json.dumps(shown).encode()


def decode_manifest(data: bytes, name: str, seal: Seal) -> NamedKV:
    """The inverse of `encode_manifest`, or of `NamedKV.to_json`.

    Raises:
        OtherKeyError: it is encrypted with another key.
        ValueError: it is damaged, or another name's.
    """
    raw = _shown(data)
    if raw.get("version") != SEALED_VERSION:
        return NamedKV.from_json(data)
    sealed = raw.get("sealed")
    if not isinstance(sealed, str):
        raise ValueError("no manifest")
    content = base64.b64decode(sealed, validate=True)
    if seal.is_foreign(content):
        raise OtherKeyError
    try:
        return NamedKV.from_json(seal.unseal(content, _place(name)))
    except UnsealError as error:
        raise ValueError(str(error)) from error


def quarantine_of(data: bytes) -> str:
    """The folder of a manifest's pages, if they are not trusted; "" if they are. Needs no key."""
    found = _shown(data).get("quarantine")
    return found[:32] if isinstance(found, str) and _MODEL.match(found) else ""


def _shown(data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _place(name: str) -> str:
    return f"names/{name}"
