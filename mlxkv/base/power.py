"""Whether this machine runs on its battery: `pmset` on macOS, /sys/class/power_supply on Linux.

What cannot be found out counts as mains.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

SUPPLIES = Path("/sys/class/power_supply")
CACHED_S = 60.0
PMSET = ("/usr/bin/pmset", "-g", "batt")
PMSET_S = 2.0
"""How long `pmset` may take; it takes some 10 ms."""


class Power:
    """Whether the battery is in use, asked once a minute on a thread of its own.

    Args:
        ask: whether it is; None for this system's way.
        clock: in seconds.
    """

    def __init__(
        self, ask: Callable[[], bool] | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._ask, self._clock = ask or on_battery, clock
        self._asked_at: float | None = None
        self._on_battery = False
        self._thread: threading.Thread | None = None

    @property
    def on_battery(self) -> bool:
        """What was found last, without waiting for an answer that is due; at first False."""
        self.refresh()
        return self._on_battery

    def refresh(self) -> None:
        """Ask if an answer is due."""
        now = self._clock()
        is_due = self._asked_at is None or now - self._asked_at >= CACHED_S
        if is_due and not (self._thread is not None and self._thread.is_alive()):
            self._asked_at = now
            self._thread = threading.Thread(target=self._find, name="power", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Wait for the answer that is due."""
        if self._thread is not None:
            self._thread.join()

    def _find(self) -> None:
        self._on_battery = self._ask()


def on_battery() -> bool:
    """Whether this machine runs on its battery."""
    try:
        if sys.platform == "darwin":
            return is_battery(_pmset())
        return is_discharging(SUPPLIES)
    except (OSError, subprocess.SubprocessError):
        return False


def is_battery(told: str) -> bool:
    """Whether `pmset -g batt` names the battery as the source, in its first line."""
    return "'Battery Power'" in told.partition("\n")[0]


def is_discharging(supplies: Path) -> bool:
    """Whether a battery of the machine is discharged while no other supply is online.

    Batteries of devices (mice, headsets) have the scope `Device`. See the kernel's
    Documentation/ABI/testing/sysfs-class-power.
    """
    batteries, is_online = [], False
    for supply in sorted(supplies.iterdir()) if supplies.is_dir() else []:
        if _value(supply / "scope") == "Device":
            continue
        if _value(supply / "type") == "Battery":
            batteries.append(_value(supply / "status"))
        else:
            is_online |= _value(supply / "online") == "1"
    return "Discharging" in batteries and not is_online


def _value(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _pmset() -> str:
    done = subprocess.run(
        PMSET, capture_output=True, text=True, errors="replace", timeout=PMSET_S, check=False
    )
    return done.stdout
