"""The end of a server's process on a signal, in time whatever hangs.

Invariants:
- SIGINT, SIGTERM and SIGHUP do the same. A SIGHUP that was ignored at the start (nohup) still is.
- After the first, the process ends within `within_s`; after another one, within `HURRY_S`.
- An end that came from here, not from the program itself, has the code 128 + the signal's number:
  prefixes may not all be written.
- If no Python code runs any more, SIGALRM ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HURRY_S = 0.8
_MARGIN_S = 0.5
"""How long before the alarm the process ends with its own code."""


class Stop:
    """Waits for a signal, calls `on_stop`, and ends the process if it does not end itself.

    Attributes:
        on_stop: called once, by the signal's handler in the main thread.
        code: exit code of a process that was not done in time.
    """

    def __init__(self, within_s: float):
        self._within_s = within_s
        self._until = 0.0
        self.code = 128
        self._asked, self._hurry = threading.Event(), threading.Event()
        self.on_stop: Callable[[], object] = lambda: None

    def install(self) -> None:
        """Handle signals from here on; in the main thread."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        threading.Thread(target=self._watch, name="stop", daemon=True).start()

    @property
    def is_asked(self) -> bool:
        """Whether the process is to end."""
        return self._asked.is_set()

    @property
    def left_s(self) -> float:
        """Time until the process ends in any case."""
        return max(0.0, self._until - time.monotonic())

    def ask(self, number: int = signal.SIGTERM) -> None:
        """End the process as this signal does."""
        if self.is_asked:
            return
        self.code = 128 + number
        self._until = time.monotonic() + self._within_s - _MARGIN_S
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self._within_s)
        self._asked.set()
        self.on_stop()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            self._hurry.set()
        else:
            self.ask(number)

    def _watch(self) -> None:
        self._asked.wait()
        if self._hurry.wait(self.left_s):
            time.sleep(min(HURRY_S, self.left_s))
        os.write(2, b"mlxkv: not all has ended in time: what was not written yet is lost\n")
        os._exit(self.code)


class Later:
    """A call that waits in a thread of its own until it is wanted.

    The thread is there from the beginning: under a limit of memory none can be started at the end.
    """

    def __init__(self, call: Callable[[], object], name: str):
        self._call, self._wanted, self._ended = call, threading.Event(), threading.Event()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def start(self) -> None:
        """Have it called; once, however often this is called."""
        self._wanted.set()

    def wait(self, within_s: float | None = None) -> bool:
        """Wait for the end of the call; whether it came in time."""
        return self._ended.wait(within_s)

    def _run(self) -> None:
        self._wanted.wait()
        try:
            self._call()
        finally:
            self._ended.set()


def leave(code: int) -> NoReturn:
    """End the process now that all is written: threads of downloads, and the interpreter's own
    end, which frees models piece by piece, are not waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
