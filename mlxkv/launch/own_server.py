"""A server of our own, as a child process for as long as it is needed.

Invariants:
- It listens on a free port of this machine, and ends when this process does, however that ends: it
  reads its input, which only this process holds open.
- It is in a session of its own, so that Ctrl-C reaches the program and not the server.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from mlxkv.base.paths import logs_dir
from mlxkv.errors import MlxkvError, OutputError
from mlxkv.server.client import Server

KEPT_LOGS = 20
STOP_S = 30.0
"""How long a server may take to end; it writes KV to disk first."""
_LOOK_S = 0.05
_LISTENING = re.compile(r"^mlxkv: listening on (http://\S+)$", re.MULTILINE)
_KEY = "MLXKV_API_KEY"


def new_log(program: str) -> Path:
    """A path for a log; the oldest logs are removed.

    Raises:
        OutputError: the folder cannot be made.
    """
    folder = logs_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}") from error
    for old in sorted(folder.glob("launch-*.log"))[: -(KEPT_LOGS - 1)]:
        with suppress(OSError):
            old.unlink()
    at = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return folder / f"launch-{at}-{program}-{os.getpid()}.log"


@contextmanager
def serving(model: str, key: str, log: Path) -> Iterator[Server]:
    """A server with a model in memory, until the block ends.

    Args:
        model: as for `mlxkv serve --model`.
        key: API key that it asks for; "" for none.
        log: its output goes there.

    Raises:
        MlxkvError: it cannot start.
        OutputError: the log cannot be written.
    """
    try:
        output = log.open("wb")
    except OSError as error:
        raise OutputError(f"{log}: {error.strerror}") from error
    # -P: the current folder, a project of the user's, holds no modules of ours.
    command = [sys.executable, "-P", "-m", "mlxkv", "serve", "--port", "0"]
    command += ["--model", model, "--agent-prompts", "--until-input-ends"]
    environment = {name: value for name, value in os.environ.items() if name != _KEY}
    with output:
        process = subprocess.Popen(
            command,
            env=environment | ({_KEY: key} if key else {}),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield Server.at(_address(process, log), key)
    finally:
        _stop(process)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address of a server, as soon as it listens."""
    while True:
        code = process.poll()
        text = log.read_text("utf-8", "replace")
        if found := _LISTENING.search(text):
            return found[1]
        if code is not None:
            raise _failed(code, text, log)
        time.sleep(_LOOK_S)


def _failed(code: int, text: str, log: Path) -> MlxkvError:
    """The error of a server that ended before it listened, with its exit code."""
    lines = text.strip().splitlines() or [f"exit code {code}"]
    error = MlxkvError(
        f"the server did not start: {lines[-1].removeprefix('mlxkv: ')} (log: {log})"
    )
    error.exit_code = code if code > 0 else MlxkvError.exit_code
    return error


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server; kill it if it takes too long, or at Ctrl-C."""
    assert process.stdin is not None
    try:
        with suppress(OSError):
            process.stdin.close()
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
