"""Exports that are signed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from mlxkv.errors import CheckpointError, UsageError
from mlxkv.saved_kv.signature import check_signature, make_keys, private_key, sign, signature_file


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    make_keys(tmp_path / "key")
    make_keys(tmp_path / "other")
    file = tmp_path / "x.kv"
    file.write_bytes(b"content")
    assert sign(file, private_key(tmp_path / "key")) == tmp_path / "x.kv.sig"
    return file


def test_a_file_that_a_trusted_key_has_signed_is_accepted(signed, tmp_path):
    check_signature(signed, [tmp_path / "key.pub"])
    check_signature(signed, [tmp_path / "other.pub", tmp_path / "key.pub"])


def test_another_key_a_changed_file_and_a_changed_signature_are_refused(signed, tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.kv: not signed by .*other\.pub, or changed"):
        check_signature(signed, [tmp_path / "other.pub"])
    made = signature_file(signed).read_bytes()
    for data in (made[:10] + b"AAAA" + made[14:], b"", b"!!", made[:-5]):
        signature_file(signed).write_bytes(data)
        with pytest.raises(CheckpointError):
            check_signature(signed, [tmp_path / "key.pub"])
    signature_file(signed).write_bytes(made)
    signed.write_bytes(b"Content")
    with pytest.raises(CheckpointError, match="or changed since"):
        check_signature(signed, [tmp_path / "key.pub"])


def test_a_file_without_signature_and_keys_that_are_none_are_one_line(signed, tmp_path):
    for key in (signed, tmp_path / "key", tmp_path / "none"):
        with pytest.raises(UsageError, match=f"{key.name}: (not a public key|no such file)"):
            check_signature(signed, [key])
    for key in (signed, tmp_path / "key.pub", tmp_path / "none"):
        with pytest.raises(UsageError, match=f"{key.name}: (not a private key|no such file)"):
            private_key(key)
    signature_file(signed).unlink()
    with pytest.raises(CheckpointError, match=r"x\.kv\.sig: no signature; import .* without"):
        check_signature(signed, [tmp_path / "key.pub"])


def test_a_private_key_is_its_owners_alone_and_never_replaced(signed, tmp_path):
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="key is already there"):
        make_keys(tmp_path / "key")
