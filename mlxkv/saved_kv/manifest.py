"""The manifest of saved KV: its name, prompt, model and pages."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxkv.base.paths import NAME
from mlxkv.media.types import Medium
from mlxkv.prefix.on_disk.format import MAX_TOKENS, ROOT, PageKey, page_name

MANIFEST_VERSION = 2
"""1 has no `quarantine`, and is written where that is empty."""
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
        if not raw["quarantine"]:
            del raw["quarantine"]
        return json.dumps({"version": MANIFEST_VERSION if self.quarantine else 1, **raw}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> NamedKV:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is no manifest, or its pages are not those of its tokens.
        """
        try:
            raw = json.loads(data)
            version = MANIFEST_VERSION if raw.setdefault("quarantine", "") else 1
            if raw.pop("version") != version or set(raw) != set(cls.__dataclass_fields__):
                raise ValueError("other fields than a manifest has, or another version")
            keys = [PageKey.parse(name) for name in raw["keys"]]
            messages = raw["messages"]
            named = cls(**{
                **raw,
                "keys": tuple(key for key in keys if key is not None),
                "tokens": base64.b64decode(raw["tokens"], validate=True),
                "messages": None if messages is None else tuple(messages),
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
    if (
        named.n_tokens * 4 != len(named.tokens)
        or min(memoryview(named.tokens).cast("i"), default=0) < 0
    ):
        raise ValueError("tokens that cannot be")
    pages = page_chain(named.tokens)
    chain = [PageKey(*pages[key.name][1:], key.part) for key in named.keys if key.name in pages]
    if not chain or chain != [*named.keys] or len(chain) != n_keys or len(set(chain)) != n_keys:
        raise ValueError("pages that are not those of its tokens")


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
