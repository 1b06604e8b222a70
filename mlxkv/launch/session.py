"""Run a program in the foreground, or write down how it would be run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxkv.errors import OutputError, UsageError
from mlxkv.launch.programs import Call

_IGNORED = (signal.SIGINT, signal.SIGQUIT)
"""The terminal sends these to the program too, which decides what they mean."""
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP)
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def run_program(path: str, call: Call, extra: Sequence[str], host: str, folder: Path) -> int:
    """Run a program until it ends, and return its exit code: 128 + N if signal N ended it.

    Args:
        path: the program.
        call: its environment, arguments and files.
        extra: the user's arguments.
        host: the server's, which no proxy is used for.
        folder: where the call's files go.

    Raises:
        OutputError: a file cannot be written.
        UsageError: the program cannot be run.
    """
    write_files(call, folder)
    arguments = [path, *call.arguments, *extra]
    variables = environment(call, os.environ, host)
    try:
        with _signals() as children:
            children.append(subprocess.Popen(arguments, env=variables))
            code = children[0].wait()
    except OSError as error:
        raise UsageError(f"{path} cannot be run: {error.strerror}") from error
    return code if code >= 0 else 128 - code


def write_files(call: Call, folder: Path) -> None:
    """Write the files of a call.

    Raises:
        OutputError: one cannot be written.
    """
    for name, content in call.files.items():
        try:
            (folder / name).write_text(content, "utf-8")
        except OSError as error:
            raise OutputError(f"{folder / name}: {error.strerror}") from error


@contextmanager
def _signals() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Leave signals to the children of a list until the block ends.

    A handler, unlike SIG_IGN, is not inherited by the children.
    """
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: object) -> None:
        for child in children:
            with suppress(ProcessLookupError):
                child.send_signal(number)

    before = {number: signal.signal(number, lambda *_: None) for number in _IGNORED}
    before |= {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment(call: Call, around: Mapping[str, str], host: str) -> dict[str, str]:
    """The environment of a program.

    Args:
        call: sets and removes variables.
        around: the variables that are set now.
        host: the server's, which no proxy is used for.
    """
    kept = {name: value for name, value in around.items() if name not in call.removed}
    found = {**call.defaults, **kept, **call.environment}
    if any(name.lower() in _PROXIES for name in kept):
        for name in ("NO_PROXY", "no_proxy"):
            found[name] = ",".join(filter(None, [kept.get(name), host]))
    return found


def script(command: str, call: Call, extra: Sequence[str], folder: Path) -> str:
    """Lines for a shell that do what `run_program` does.

    Args:
        command: the program's name.
        call: its environment, arguments and files.
        extra: the user's arguments.
        folder: where the call's files go.
    """
    lines = []
    if call.files:
        lines.append(f"mkdir -m 700 -p {shlex.quote(str(folder))}")
    for name, content in call.files.items():
        lines.append(f"cat > {shlex.quote(str(folder / name))} <<'MLXKV_END'")
        lines += [*content.splitlines(), "MLXKV_END"]
    if call.removed:
        lines.append(f"unset {' '.join(call.removed)}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in call.environment.items()]
    lines += [f'export {name}="${{{name}-{value}}}"' for name, value in call.defaults.items()]
    lines.append(shlex.join([command, *call.arguments, *extra]))
    return "\n".join(lines)
