from __future__ import annotations

import os
import plistlib
import sys

import pytest

from mlxkv.base import time_machine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that can have attributes, on what passes for a Mac."""
    if sys.platform != "darwin":
        # Linux' own setxattr takes the same arguments but for the position, and other names.
        monkeypatch.setattr(time_machine, "ATTRIBUTE", b"user.backup_excludeItem")
        try:
            os.setxattr(tmp_path, b"user.probe", b"x")
        except OSError:
            pytest.skip("the file system of temporary files has no attributes")
    monkeypatch.setattr(time_machine.sys, "platform", "darwin")
    return tmp_path


def test_an_excluded_folder_has_the_attribute_that_time_machine_reads(folder):
    assert not time_machine.is_excluded(folder)
    assert time_machine.exclude(folder) and time_machine.exclude(folder)
    assert time_machine.is_excluded(folder)
    if hasattr(os, "getxattr"):
        value = os.getxattr(folder, time_machine.ATTRIBUTE)
        assert plistlib.loads(value) == "com.apple.backupd" and value.startswith(b"bplist00")


def test_the_attribute_goes_with_a_folder_that_is_moved(folder):
    (folder / "pages").mkdir()
    time_machine.exclude(folder / "pages")
    (folder / "pages").rename(folder / "elsewhere")
    assert time_machine.is_excluded(folder / "elsewhere")


def test_a_folder_that_cannot_have_it_is_no_error(folder):
    assert not time_machine.exclude(folder / "none")
    assert not time_machine.is_excluded(folder / "none")


def test_other_systems_are_left_alone(folder, monkeypatch):
    monkeypatch.setattr(time_machine.sys, "platform", "linux")
    assert not time_machine.exclude(folder)
    monkeypatch.setattr(time_machine.sys, "platform", "darwin")
    assert not time_machine.is_excluded(folder)
