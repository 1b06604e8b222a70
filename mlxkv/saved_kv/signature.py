"""Signatures of exported files: FILE.sig, Ed25519 over a hash of the whole file.

Keys are PEM files, as `openssl genpkey -algorithm ed25519` makes them as well.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxkv.base import durable, regular
from mlxkv.errors import CheckpointError, OutputError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_CONTEXT = b"mlxkv export, signature 1\n"
_MAX_BYTES = 10_000


def make_keys(file: Path) -> Path:
    """Write a new private key to a file, and its public key beside it; the public key's file.

    Raises:
        UsageError: one of them is there already, or `cryptography` is not installed.
        OutputError: they cannot be written.
    """
    _check_library()
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    public = file.with_name(f"{file.name}.pub")
    private_data = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    public_data = key.public_key().public_bytes(
        pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo
    )
    for path, data, mode in ((file, private_data, 0o600), (public, public_data, 0o644)):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except FileExistsError:
            raise UsageError(f"{path} is already there; choose another file") from None
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
        with os.fdopen(handle, "wb") as opened:
            opened.write(data)
    return public


def private_key(file: Path) -> Ed25519PrivateKey:
    """The private key in a file.

    Raises:
        UsageError: there is none.
    """
    _check_library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_small(file), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{file}: not a private key of `mlxkv kv keygen`")
    return key


def sign(file: Path, key: Ed25519PrivateKey) -> Path:
    """Write the signature of an exported file beside it, and return where.

    Raises:
        OutputError: it cannot be written.
    """
    signature = base64.b64encode(key.sign(_CONTEXT + _digest(file)))
    path = signature_file(file)
    try:
        durable.write_whole(path, signature + b"\n")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def check_signature(file: Path, trusted: Sequence[Path]) -> None:
    """Raise unless one of some keys has signed an exported file.

    Args:
        file: with its signature beside it.
        trusted: files of public keys.

    Raises:
        UsageError: no such file or key.
        CheckpointError: none of the keys has signed it.
    """
    _check_library()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    path = signature_file(file)
    try:
        signature = base64.b64decode(_small(path).strip(), validate=True)
    except (UsageError, binascii.Error):
        raise CheckpointError(
            f"{path}: no signature; import {file} without a trusted key"
        ) from None
    signed = _CONTEXT + _digest(file)
    for key_file in trusted:
        try:
            key = load_pem_public_key(_small(key_file))
        except ValueError:
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise UsageError(f"{key_file}: not a public key of `mlxkv kv keygen`")
        try:
            key.verify(signature, signed)
        except InvalidSignature:
            continue
        return
    keys = ", ".join(map(str, trusted))
    raise CheckpointError(f"{file}: not signed by {keys}, or changed since; nothing was imported")


def signature_file(file: Path) -> Path:
    """Where the signature of an exported file lies."""
    return file.with_name(f"{file.name}.sig")


def _digest(file: Path) -> bytes:
    try:
        with regular.open_file(file) as opened:
            return hashlib.file_digest(opened, "sha512").digest()
    except regular.NotAFile as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None


def _small(file: Path) -> bytes:
    """The content of a file of a key or signature; UsageError where there is none."""
    try:
        if not file.is_file():
            raise UsageError(f"{file}: no such file")
        with regular.open_file(file) as opened:
            return opened.read(_MAX_BYTES)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error


def _check_library() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise UsageError("signing needs `pip install 'mlxkv[crypto]'`") from None
