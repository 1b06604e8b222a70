"""Whether a machine runs on its battery."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlxkv.base import power
from mlxkv.base.power import Power, is_battery, is_discharging, on_battery

MAINS = {"type": "Mains", "online": "1"}
UNPLUGGED = {"type": "Mains", "online": "0"}
DISCHARGING = {"type": "Battery", "status": "Discharging"}
CHARGING = {"type": "Battery", "status": "Charging"}
MOUSE = {"type": "Battery", "scope": "Device", "status": "Discharging"}
USB = {"type": "USB", "online": "1"}


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ([], False),
        ([MAINS], False),
        ([UNPLUGGED, DISCHARGING], True),
        ([DISCHARGING], True),
        ([MAINS, DISCHARGING], False),  # a weak charger: the machine is plugged in
        ([UNPLUGGED, USB, DISCHARGING], False),
        ([MAINS, CHARGING], False),
        ([MOUSE], False),
        ([UNPLUGGED, {"type": "Battery"}], False),
    ],
)
def test_linux_names_its_supplies(tmp_path: Path, supplies, expected):
    for i, values in enumerate(supplies):
        (tmp_path / f"S{i}").mkdir()
        for name, value in values.items():
            (tmp_path / f"S{i}" / name).write_text(value + "\n")
    assert is_discharging(tmp_path) is expected


def test_without_the_folder_it_is_mains(tmp_path):
    assert not is_discharging(tmp_path / "none")


@pytest.mark.parametrize(("source", "expected"), [("Battery", True), ("AC", False)])
def test_pmset_names_the_source_first(source, expected):
    told = f"Now drawing from '{source} Power'\n -InternalBattery-0 (id=1)\t80%; 'Battery Power'\n"
    assert is_battery(told) is expected
    assert not is_battery("")


def test_macos_asks_pmset_and_counts_a_failure_as_mains(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(power, "PMSET", ("printf", "Now drawing from 'Battery Power'"))
    assert on_battery()
    monkeypatch.setattr(power, "PMSET", ("/nowhere/pmset",))
    assert not on_battery()

    def late(*args: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("pmset", 1)

    monkeypatch.setattr(subprocess, "run", late)
    assert not on_battery()


def test_it_is_asked_once_a_minute_and_not_waited_for():
    now, asked, may_answer = [0.0], [0], threading.Event()

    def ask() -> bool:
        asked[0] += 1
        may_answer.wait(10)
        return True

    found = Power(ask, lambda: now[0])
    assert not found.on_battery  # the answer is not here yet
    may_answer.set()
    found.settle()
    now[0] = power.CACHED_S - 1
    assert found.on_battery and asked == [1]
    now[0] = power.CACHED_S
    assert found.on_battery
    found.settle()
    assert asked == [2]
