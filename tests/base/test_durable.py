from __future__ import annotations

import errno
import fcntl
import os

import pytest

from mlxkv.base import durable

FULL = 51  # as macOS numbers it


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the system, in order, on a machine that has F_FULLFSYNC."""
    noted: list[str] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda handle, command: noted.append(f"fcntl {command}"))
    monkeypatch.setattr(os, "fsync", lambda handle: noted.append("fsync"))
    return noted


def test_a_sync_on_macos_empties_the_drives_cache(calls, tmp_path):
    durable.sync(0)
    assert calls == [f"fcntl {FULL}"]
    durable.sync_path(tmp_path)
    assert calls == [f"fcntl {FULL}"] * 2


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_a_file_system_that_refuses_it_gets_an_fsync(calls, monkeypatch, code):
    def refuse(handle: int, command: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    durable.sync(0)
    assert calls == ["fsync"]


def test_other_systems_have_only_fsync(calls, monkeypatch):
    monkeypatch.delattr(fcntl, "F_FULLFSYNC")
    durable.sync(0)
    assert calls == ["fsync"]


def test_a_sync_that_fails_for_good_is_an_error(calls, monkeypatch):
    def broken(*_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "fcntl", broken)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        durable.sync(0)


def test_what_another_sync_follows_does_not_empty_the_cache_itself(calls, tmp_path):
    durable.sync_path(tmp_path, through=False)
    assert calls == ["fsync"]
