"""`mlxkv serve` in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping


class Server:
    """A running `mlxkv serve`."""

    def __init__(self, env: Mapping[str, str], *args: str):
        self.env = dict(env)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlxkv.cli",
                "serve",
                "--port",
                "0",
                "--dtype",
                "float32",
                *args,
            ],
            env=self.env,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening on (http://\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.lines))
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def stop(self, number: int = signal.SIGINT) -> int:
        """Sends it a signal and waits for its end; the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Waits for its end; the exit code."""
        code = self.process.wait(30)
        self.reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code
