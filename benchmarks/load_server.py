"""The servers under load, each a process of its own: `mlxkv serve` and mlx-lm's."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from benchmarks.report import ENGINES
from benchmarks.reuse_engines import blas_of

START_LIMIT_S, STOP_LIMIT_S = 300.0, 60.0
HOST = "127.0.0.1"
MLXKV, MLX_LM = ENGINES
LLAMA_CPP = "llama.cpp"


class Server:
    """A running server; a context manager.

    Args:
        engine: `mlxkv`, `mlx-lm` or `llama.cpp`.
        model: directory of the model, or GGUF file, which is also what requests name.
        env: of the process.
        options: further words of its command line.
        checkout: where it is started; None for here.

    Attributes:
        url: where it listens.
    """

    def __init__(
        self,
        engine: str,
        model: Path,
        env: Mapping[str, str],
        options: Sequence[str] = (),
        checkout: Path | None = None,
    ):
        self.engine, self.model = engine, str(model)
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115
        port = 0 if engine == MLXKV else free_port()
        self.process = subprocess.Popen(
            [*command_of(engine, self.model, port), *options],
            env=dict(env),
            cwd=checkout,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        try:
            self.url = self._wait(port)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def blas(self) -> str:
        return blas_of(self.process.pid)

    @property
    def cpu_s(self) -> float:
        """Seconds that all its threads have computed."""
        import psutil

        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    @property
    def log(self) -> str:
        """What it has written so far."""
        # Opened anew: the process writes at the place where its own file stands.
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    def stop(self) -> int:
        """End it as its user would, by Ctrl-C; the exit code, negative where it had to be killed.

        OpenBLAS' exit handler can wait for a step of mlx-lm's for ever.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_LIMIT_S if self.engine == MLXKV else 5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _wait(self, port: int) -> str:
        """Until it listens; mlx-lm's does not tell, and may still be loading the model then."""
        until = time.monotonic() + START_LIMIT_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise SystemExit(
                    f"{self.engine}'s server ended: {self.process.returncode}\n{self.log[-2000:]}"
                )
            if self.engine != MLX_LM:
                if found := re.search(r"listening on (http://\S+)", self.log):
                    return found[1]
            else:
                with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
                    return f"http://{HOST}:{port}"
            time.sleep(0.05)
        raise SystemExit(f"{self.engine}'s server does not listen after {START_LIMIT_S:.0f} s")


def command_of(engine: str, model: str, port: int) -> list[str]:
    """The command line that serves one model."""
    if engine == MLXKV:
        return [sys.executable, "-m", "mlxkv", "serve", f"--port={port}", f"--model={model}"]
    if engine == LLAMA_CPP:
        command = [sys.executable, "-m", "benchmarks.llama_server"]
        return [*command, f"--port={port}", f"--model={model}"]
    command = [sys.executable, "-m", "mlx_lm", "server", f"--port={port}", f"--model={model}"]
    return [*command, "--log-level=WARNING"]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return free.getsockname()[1]
