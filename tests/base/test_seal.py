"""Files that are encrypted at rest."""

from __future__ import annotations

import base64
import os
import random
import sys
from types import ModuleType

import pytest

from mlxkv.base import seal
from mlxkv.base.seal import Plain, Sealed, UnsealError, seal_of_environment
from mlxkv.errors import UsageError

KEY = bytes(range(32))
DATA = random.Random(0).randbytes(1000)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(seal, "SEGMENT_BYTES", 300)


@pytest.mark.parametrize("n", [0, 1, 299, 300, 301, 1000])
@pytest.mark.parametrize("n_first", [0, 1, 128])
def test_what_was_sealed_comes_back_and_is_not_larger_than_was_said(n, n_first):
    ours = Sealed(KEY)
    n_first = min(n_first, n)
    sealed = ours.seal(DATA[:n], "here", n_first)
    assert len(sealed) <= seal.sealed_bytes(n)
    assert ours.unseal(sealed, "here") == DATA[:n]
    first = ours.unseal(sealed, "here", first_only=True)
    assert first == DATA[: n_first or min(n, 300)]
    assert (
        ours.unseal(sealed[: seal.HEAD_BYTES + len(first) + 28], "here", first_only=True) == first
    )


def test_the_same_content_is_never_sealed_the_same_way_twice():
    sealed = [Sealed(KEY).seal(b"\0" * 64, "here") for _ in range(20)]
    assert len({x[16:48] for x in sealed}) == len({x[60:72] for x in sealed}) == 20
    assert len({x[72:] for x in sealed}) == 20


def test_any_changed_byte_another_place_and_a_cut_are_refused():
    ours = Sealed(KEY)
    whole = ours.seal(DATA, "here", 100)
    rng = random.Random(1)
    places = {*range(60), *(rng.randrange(len(whole)) for _ in range(100))}
    for at in places:
        damaged = bytearray(whole)
        damaged[at] ^= rng.randrange(1, 256)
        with pytest.raises(UnsealError):
            ours.unseal(bytes(damaged), "here")
    second, third = 60 + 128, 60 + 128 + 328
    swapped = (
        whole[:second] + whole[third : third + 328] + whole[second:third] + whole[third + 328 :]
    )
    assert len(swapped) == len(whole)
    for data, place in ((whole, "there"), (swapped, "here"), (whole[:-1], "here"),
                        (whole + b"\0", "here"), (b"", "here"), (DATA, "here")):  # fmt: skip
        with pytest.raises(UnsealError):
            ours.unseal(data, place)


def test_another_key_is_told_from_damage():
    sealed = Sealed(KEY).seal(DATA, "here")
    other = Sealed(os.urandom(32))
    assert other.is_foreign(sealed) and not Sealed(KEY).is_foreign(sealed)
    assert Plain().is_foreign(sealed) and not Plain().is_foreign(DATA)
    with pytest.raises(UnsealError, match="not encrypted with this key"):
        other.unseal(sealed, "here")


def test_names_are_masked_one_to_one_and_differ_by_key():
    names = [random.Random(i).randbytes(16).hex() for i in range(50)] + ["0" * 32]
    ours, other = Sealed(KEY), Sealed(os.urandom(32))
    masked = [ours.masked(name) for name in names]
    assert [ours.unmasked(name) for name in masked] == names
    assert len({*masked}) == len(names) and not {*masked} & {*names}
    assert other.masked(names[0]) != masked[0]
    assert ours.fingerprint("a") != other.fingerprint("a") != "a"


@pytest.mark.parametrize(
    "text",
    [KEY.hex(), KEY.hex().upper(), base64.b64encode(KEY).decode(),
     base64.urlsafe_b64encode(KEY).decode(), f" {KEY.hex()}\n"],
)  # fmt: skip
def test_a_key_is_hex_or_base64(monkeypatch, text):
    monkeypatch.setenv("MLXKV_KV_KEY", text)
    assert seal_of_environment().unseal(Sealed(KEY).seal(DATA, "here"), "here") == DATA


@pytest.mark.parametrize(
    "text", ["secret", KEY.hex()[:-2], "*" * 44, base64.b64encode(KEY * 2).decode()]
)
def test_anything_else_is_refused_and_not_repeated(monkeypatch, text):
    monkeypatch.setenv("MLXKV_KV_KEY", text)
    with pytest.raises(UsageError, match="MLXKV_KV_KEY must be 32 random bytes") as error:
        seal_of_environment()
    assert text not in str(error.value)


def test_without_a_key_nothing_is_changed(monkeypatch):
    monkeypatch.delenv("MLXKV_KV_KEY", raising=False)
    plain = seal_of_environment()
    assert not plain.is_on and plain.seal(DATA, "here") == DATA == plain.unseal(DATA, "there")


class Keychain(ModuleType):
    """A stand-in for `keyring`."""

    def __init__(self, broken: bool = False):
        super().__init__("keyring")
        self.errors = ModuleType("keyring.errors")
        self.errors.KeyringError = type("KeyringError", (Exception,), {})  # pyright: ignore[reportAttributeAccessIssue]
        self.kept: dict[tuple[str, str], str] = {}
        self.broken = broken

    def get_password(self, service: str, user: str) -> str | None:
        if self.broken:
            raise self.errors.KeyringError("locked")  # pyright: ignore[reportAttributeAccessIssue]
        return self.kept.get((service, user))

    def set_password(self, service: str, user: str, password: str) -> None:
        self.kept[service, user] = password


@pytest.fixture
def keychain(monkeypatch):
    def install(**kwargs: bool) -> Keychain:
        made = Keychain(**kwargs)
        monkeypatch.setitem(sys.modules, "keyring", made)
        monkeypatch.setitem(sys.modules, "keyring.errors", made.errors)
        monkeypatch.setenv("MLXKV_KV_KEY", "keychain")
        seal._seal.cache_clear()
        return made

    yield install
    seal._seal.cache_clear()


def test_the_keychain_makes_a_key_once_and_keeps_it(keychain):
    made = keychain()
    sealed = seal_of_environment().seal(DATA, "here")
    (key,) = made.kept.values()
    seal._seal.cache_clear()
    assert seal_of_environment().unseal(sealed, "here") == DATA
    assert Sealed(bytes.fromhex(key)).unseal(sealed, "here") == DATA


def test_a_keychain_that_is_locked_is_one_line(keychain):
    keychain(broken=True)
    with pytest.raises(UsageError, match="MLXKV_KV_KEY=keychain: the keychain gives no key"):
        seal_of_environment()
