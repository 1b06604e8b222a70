"""The manifest of saved KV: its name, prompt, model and pages."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlxkv.base.paths import NAME
from mlxkv.media.prompt import PromptMedia
from mlxkv.media.types import KINDS, Medium
from mlxkv.prefix.on_disk.format import MAX_TOKENS, ROOT, PageKey, page_name

MANIFEST_VERSION = 4
"""1 has no `quarantine` and no `media`, 2 has no `media`; they are written where those are empty. 3
is an encrypted one's, see `sealed`.
"""
MAX_NAME = 100
MAX_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class NamedKV:
    """KV that was saved under a name.

    Args:
        name: as the user types it.
        fingerprint: of the model, its dtype and the KV format.
        model: its name, as the user typed it.
        n_tokens: tokens of the prompt.
        keys: of its pages, trunk first.
        text: the prompt, as it was given.
        messages: the conversation, if it was one.
        tokens: int32, little-endian.
        created: seconds since 1970.
        pinned: whether its pages are never evicted.
        kv_type: format of the KV.
        dtype: that the model computed in.
        quarantine: fingerprint under which the pages of an import lie, apart from the model's,
            until a sample of them was computed and compared; "" once they are trusted.
        media: pictures and sound among the tokens, without their content.
    """

    name: str
    fingerprint: str
    model: str
    n_tokens: int
    keys: tuple[PageKey, ...]
    text: str
    messages: tuple[Mapping[str, Any], ...] | None
    tokens: bytes
    created: float
    pinned: bool
    kv_type: str
    dtype: str
    quarantine: str = ""
    media: tuple[Medium, ...] = ()

    @property
    def pages_fingerprint(self) -> str:
        """The fingerprint under which its pages lie."""
        return self.quarantine or self.fingerprint

    def to_json(self) -> bytes:
        """Encode the manifest.

        Raises:
            ValueError: `from_json` would refuse it.
        """
        _check(self, len(self.keys))
        raw = {field: getattr(self, field) for field in self.__dataclass_fields__}
        raw["keys"] = [key.file_name for key in self.keys]
        raw["tokens"] = base64.b64encode(self.tokens).decode("ascii")
        raw["messages"] = None if self.messages is None else list(self.messages)
        raw["media"] = [_medium_to_json(medium) for medium in self.media]
        version = _version(raw)
        if not raw["media"]:
            del raw["media"]
        if not raw["quarantine"] and version < MANIFEST_VERSION:
            del raw["quarantine"]
        return json.dumps({"version": version, **raw}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> NamedKV:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is no manifest, or its pages are not those of its tokens.
        """
        try:
            raw = json.loads(data)
            raw.setdefault("quarantine", "")
            raw.setdefault("media", [])
            if raw.pop("version") != _version(raw) or set(raw) != set(cls.__dataclass_fields__):
                raise ValueError("other fields than a manifest has, or another version")
            keys = [PageKey.parse(name) for name in raw["keys"]]
            messages = raw["messages"]
            named = cls(**{
                **raw,
                "keys": tuple(key for key in keys if key is not None),
                "tokens": base64.b64decode(raw["tokens"], validate=True),
                "messages": None if messages is None else tuple(messages),
                "media": tuple(map(_medium_from_json, raw["media"])),
            })  # fmt: skip
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a manifest ({error})") from error
        _check(named, len(keys))
        return named


def _check(named: NamedKV, n_keys: int) -> None:
    """ValueError unless the fields of a manifest are what they should be."""
    texts = (named.name, named.fingerprint, named.model, named.text, named.kv_type, named.dtype)
    if not all(isinstance(value, str) for value in texts) or type(named.pinned) is not bool:
        raise ValueError("a field of another type")
    if not isinstance(named.created, int | float) or not 0 <= named.created < 1e11:
        raise ValueError("a time that cannot be")
    if named.messages is not None and not (
        named.messages and all(map(_is_message, named.messages))
    ):
        raise ValueError("messages that are none")
    fingerprints = named.fingerprint, named.quarantine or named.fingerprint
    if not all(isinstance(x, str) and re.fullmatch(r"[0-9a-f]{64}", x) for x in fingerprints):
        raise ValueError("no fingerprint")
    if not is_name(named.name) or type(named.n_tokens) is not int:
        raise ValueError("a name or a number of tokens that cannot be")
    if named.n_tokens * 4 != len(named.tokens):
        raise ValueError("tokens that cannot be")
    _check_media(named)
    pages = page_chain(named.tokens)
    chain = [PageKey(*pages[key.name][1:], key.part) for key in named.keys if key.name in pages]
    if not chain or chain != [*named.keys] or len(chain) != n_keys or len(set(chain)) != n_keys:
        raise ValueError("pages that are not those of its tokens")


def _check_media(named: NamedKV) -> None:
    """ValueError unless the tokens below 0 are those of the media, each whole."""
    tokens, media = memoryview(named.tokens).cast("i").tolist(), PromptMedia(named.media)
    if any(not 0 < medium.n_tokens <= len(tokens) for medium in named.media):
        raise ValueError("media of a length that cannot be")
    n_covered = 0
    for start, stop, medium in media.spans(tokens):
        if tuple(tokens[start:stop]) != medium.ids:
            raise ValueError("tokens that are not those of its media")
        n_covered += stop - start
    if n_covered != sum(token < 0 for token in tokens):
        raise ValueError("tokens that cannot be")


def _version(raw: Mapping[str, Any]) -> int:
    """The oldest version that has what a manifest says."""
    return MANIFEST_VERSION if raw["media"] else 2 if raw["quarantine"] else 1


def _medium_to_json(medium: Medium) -> dict[str, Any]:
    return {
        "kind": medium.kind,
        "digest": medium.digest.hex(),
        "n_tokens": medium.n_tokens,
        "token": medium.token,
        "name": medium.name,
    }


def _medium_from_json(raw: Mapping[str, Any]) -> Medium:
    """The inverse of `_medium_to_json`.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: something else.
    """
    medium = Medium(**{**raw, "digest": bytes.fromhex(raw["digest"])})
    numbers = type(medium.n_tokens) is int and type(medium.token) is int and medium.token >= 0
    is_named = isinstance(medium.name, str) and medium.name.isprintable()
    if medium.kind not in KINDS or not numbers or not is_named or len(medium.digest) != 32:
        raise ValueError("a medium that cannot be")
    return replace(medium, data=None)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def page_chain(tokens: bytes) -> dict[str, tuple[int, str, str, int]]:
    """Name -> (start, parent, name, n_tokens) of the pages of a sequence."""
    pages: dict[str, tuple[int, str, str, int]] = {}
    parent = ROOT
    for start in range(0, len(tokens), 4 * MAX_TOKENS):
        some = tokens[start : start + 4 * MAX_TOKENS]
        name = page_name(parent, some)
        pages[name] = (start // 4, parent, name, len(some) // 4)
        parent = name
    return pages


def is_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None and len(name) <= MAX_NAME
