"""Files of a folder encrypted at rest, under one key.

Invariants:
- A file is encrypted with a key of its own, HKDF-SHA256 of the folder's key and 32 random bytes, in
  segments of AES-256-GCM, each under a random nonce of 96 bits. Authenticated with each are its
  number, the sizes, and what the file is (its place), so that neither files nor segments can be
  exchanged, cut or joined.
- Names that say something of a text (hashes of its tokens) are masked by AES-256, one block each.
- With another key everything is elsewhere: a folder's fingerprint is an HMAC under the key. So what
  another key wrote is not found, and evicted in its turn.
- Without a key (`Plain`) everything is as it was.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import os
import re
from typing import Protocol

from mlxkv.errors import UsageError

VARIABLE = "MLXKV_KV_KEY"
KEYCHAIN = "keychain"
MAGIC = b"mlxkvAE1"
HEAD_BYTES = 60
"""Magic, the key's id (8), salt (32), bytes of the first segment (4) and of all of them (8)."""
SEGMENT_BYTES = 64 << 20
_NONCE_BYTES, _TAG_BYTES, _KEY_BYTES = 12, 16, 32


class UnsealError(ValueError):
    """Bytes that were not sealed with this key as this file."""


class Seal(Protocol):
    """How the files of a folder are written."""

    is_on: bool

    def fingerprint(self, text: str) -> str:
        """64 hex digits that stand for others in names of folders."""
        ...

    def masked(self, name: str) -> str:
        """32 hex digits that stand for a page's name in names of files."""
        ...

    def unmasked(self, name: str) -> str:
        """The inverse of `masked`."""
        ...

    def seal(self, data: bytes, about: str, n_first: int = 0) -> bytes:
        """The bytes of a file.

        Args:
            data: its content.
            about: what it is, and where.
            n_first: bytes that can be read without the others.
        """
        ...

    def unseal(self, data: bytes, about: str, *, first_only: bool = False) -> bytes:
        """The inverse of `seal`.

        Raises:
            UnsealError: it was not sealed with this key as this file.
        """
        ...

    def is_foreign(self, data: bytes) -> bool:
        """Whether a file was sealed with another key."""
        ...


class Plain:
    """Files as they are."""

    is_on = False

    def fingerprint(self, text: str) -> str:
        return text

    def masked(self, name: str) -> str:
        return name

    def unmasked(self, name: str) -> str:
        return name

    def seal(self, data: bytes, about: str, n_first: int = 0) -> bytes:
        return data

    def unseal(self, data: bytes, about: str, *, first_only: bool = False) -> bytes:
        return data

    def is_foreign(self, data: bytes) -> bool:
        return data.startswith(MAGIC)


class Sealed:
    """Files encrypted with a key of 32 bytes.

    Raises:
        UsageError: `cryptography` is not installed.
    """

    is_on = True

    def __init__(self, key: bytes):
        try:  # 40 ms, only with a key
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            raise UsageError(
                f"{VARIABLE} is set, and encryption needs `pip install 'mlxkv[crypto]'`"
            ) from None
        assert len(key) == _KEY_BYTES
        self._key = key
        self._id = self._derived(b"id")[:8]
        self._places = self._derived(b"places")
        # One block of AES is a permutation of names; nothing longer is ever encrypted so.
        self._names = Cipher(algorithms.AES(self._derived(b"names")), modes.ECB())

    def _derived(self, what: bytes, salt: bytes | None = None) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), _KEY_BYTES, salt, b"mlxkv " + what).derive(self._key)

    def fingerprint(self, text: str) -> str:
        return hmac.new(self._places, text.encode(), hashlib.sha256).hexdigest()

    def masked(self, name: str) -> str:
        return self._names.encryptor().update(bytes.fromhex(name)).hex()

    def unmasked(self, name: str) -> str:
        return self._names.decryptor().update(bytes.fromhex(name)).hex()

    def seal(self, data: bytes, about: str, n_first: int = 0) -> bytes:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        salt = os.urandom(32)
        n_first = n_first or min(len(data), SEGMENT_BYTES)
        sizes = n_first.to_bytes(4, "little") + len(data).to_bytes(8, "little")
        head = MAGIC + self._id + salt + sizes
        cipher = AESGCM(self._derived(b"file", salt))
        pieces = [head]
        view = memoryview(data)
        for i, (start, stop) in enumerate(_segments(n_first, len(data))):
            nonce = os.urandom(_NONCE_BYTES)
            pieces += [nonce, cipher.encrypt(nonce, view[start:stop], _about(about, head, i))]
        return b"".join(pieces)

    def unseal(self, data: bytes, about: str, *, first_only: bool = False) -> bytes:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        head = data[:HEAD_BYTES]
        if len(head) < HEAD_BYTES or head[:8] != MAGIC or head[8:16] != self._id:
            raise UnsealError("not encrypted with this key")
        n_first, n_bytes = first_bytes(head), int.from_bytes(head[52:60], "little")
        if n_first > n_bytes or (n_bytes > len(data) and not first_only):
            raise UnsealError("truncated")
        segments = [(0, n_first)] if first_only else _segments(n_first, n_bytes)
        whole = HEAD_BYTES + n_bytes + len(segments) * (_NONCE_BYTES + _TAG_BYTES)
        if len(data) != whole and not first_only:
            raise UnsealError("truncated")
        cipher = AESGCM(self._derived(b"file", head[16:48]))
        view, at, found = memoryview(data), HEAD_BYTES, []
        for i, (start, stop) in enumerate(segments):
            nonce, at = view[at : at + _NONCE_BYTES], at + _NONCE_BYTES
            sealed, at = view[at : at + stop - start + _TAG_BYTES], at + stop - start + _TAG_BYTES
            try:
                found.append(cipher.decrypt(nonce, sealed, _about(about, head, i)))
            except (InvalidTag, ValueError) as error:
                raise UnsealError("changed, or another file") from error
        return found[0] if len(found) == 1 else b"".join(found)

    def is_foreign(self, data: bytes) -> bool:
        return data.startswith(MAGIC) and data[8:16] != self._id


def _segments(n_first: int, n_bytes: int) -> list[tuple[int, int]]:
    """Start and end of each segment."""
    starts = [0, *range(n_first, n_bytes, SEGMENT_BYTES)] if n_bytes > n_first else [0]
    return list(zip(starts, [*starts[1:], n_bytes], strict=True))


def _about(about: str, head: bytes, i: int) -> bytes:
    return head + i.to_bytes(4, "little") + about.encode()


def first_bytes(head: bytes) -> int:
    """Bytes of the first segment, by a sealed file's head."""
    return int.from_bytes(head[48:52], "little")


def sealed_bytes(n_bytes: int) -> int:
    """An upper bound of a sealed file's bytes."""
    return n_bytes + HEAD_BYTES + (_NONCE_BYTES + _TAG_BYTES) * (2 + n_bytes // SEGMENT_BYTES)


def seal_of_environment() -> Seal:
    """As MLXKV_KV_KEY says: a key, or `keychain` for one that the system's keychain holds.

    Raises:
        UsageError: it is no key, or the keychain does not give one.
    """
    return _seal(os.environ.get(VARIABLE, "").strip())


@functools.lru_cache(maxsize=4)
def _seal(text: str) -> Seal:
    if not text:
        return Plain()
    return Sealed(_key(_from_keychain() if text == KEYCHAIN else text))


def _key(text: str) -> bytes:
    if re.fullmatch(r"[0-9a-fA-F]{64}", text):
        return bytes.fromhex(text)
    try:
        key = base64.b64decode(text, altchars=b"-_" if re.search("[-_]", text) else None)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _KEY_BYTES:
        raise UsageError(
            f"{VARIABLE} must be 32 random bytes as hex or base64, such as `openssl rand -hex 32` "
            f"prints, or {KEYCHAIN}"
        )
    return key


def _from_keychain() -> str:
    """The key in the system's keychain, which is made when it is first asked for."""
    try:
        import keyring  # pyright: ignore[reportMissingImports]
        import keyring.errors  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError(f"{VARIABLE}={KEYCHAIN} needs `pip install 'mlxkv[crypto]'`") from None
    try:
        known = keyring.get_password("mlxkv", "kv")
        if known is None:
            keyring.set_password("mlxkv", "kv", os.urandom(_KEY_BYTES).hex())
            known = keyring.get_password("mlxkv", "kv")
    except keyring.errors.KeyringError as error:
        raise UsageError(f"{VARIABLE}={KEYCHAIN}: the keychain gives no key ({error})") from None
    return known or ""
