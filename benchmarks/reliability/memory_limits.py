"""Commands under hard memory limits: `python -m benchmarks.reliability.memory_limits`.

`run`, `kv save`, and `serve` with one and with four clients, at ten limits.

Each try is a process whose address space (RLIMIT_AS; `--kind data` for RLIMIT_DATA) is limited. It
must end within its time, by itself, with its exit code and one line on stderr where it fails; a
server must answer each client with text, a finish reason or an error of its API, and stop when it
is told to. Exits with 1 where one does not. The model is made here, with random weights.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.command_line import chat_model, environment

LIMITS_MIB = (150, 220, 300, 350, 400, 500, 600, 700, 850, 1200)
KINDS = {"as": "-v", "data": "-d"}
"""Kind of the limit -> ulimit's option."""
MODEL = "limited"
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
}
"""36 MiB of weights in float32 and 16 KiB of KV a token: a prompt takes as much as the weights."""
N_PROMPT = 3000
FAILURES = {1, 2, 3, 4, 5, 6, 7}
"""Exit codes of an error in one line, see `mlxkv.errors`."""


@dataclass(frozen=True, slots=True)
class Try:
    """What happened in one try.

    Args:
        name: of the command.
        mib: its limit.
        outcome: in words.
        holds: whether that is one of the right ones.
    """

    name: str
    mib: int
    outcome: str
    holds: bool


class Tries:
    """The commands that are tried, on one model.

    Args:
        home: a folder to work in.
        kind: of the limit, see `KINDS`.
        timeout_s: how long a command may take.
    """

    def __init__(self, home: Path, kind: str = "as", timeout_s: float = 240):
        chat_model(home / "models" / MODEL, **SHAPE)
        self._env = environment(home, MLXKV_KV=str(home / "kv"), MLXKV_KV_DISK="1GiB")
        self._flag, self._timeout_s = KINDS[kind], timeout_s
        self._prompt = "".join(" " if i % 7 == 6 else chr(97 + i * i % 23) for i in range(N_PROMPT))

    def run(self, mib: int) -> Try:
        """One answer."""
        return self._command("run", mib, "run", "-m", MODEL, "-n", "64", self._prompt)

    def kv_save(self, mib: int) -> Try:
        """KV under a name."""
        return self._command("kv save", mib, "kv", "save", f"n{mib}", "-m", MODEL, self._prompt)

    def serve(self, mib: int, n_clients: int) -> Try:
        """A server and clients that ask at a time."""
        name = f"serve, {n_clients} clients"
        server = self._start(mib, "serve", "--port", "0")
        assert server.stderr is not None
        lines: list[str] = []
        clock = threading.Timer(self._timeout_s, server.kill)
        clock.start()
        try:
            url = next(_listening(server.stderr, lines), None)
            if url is None:
                code = server.wait()
                return Try(name, mib, _ended(code, lines), _is_failure(code, lines))
            reader = threading.Thread(target=lines.extend, args=(server.stderr,), daemon=True)
            reader.start()
            answers, healthy = self._asked(url, n_clients)
            server.send_signal(signal.SIGINT)
            code = server.wait()
            reader.join()
        finally:
            clock.cancel()
            server.kill()
            server.wait()
        counts = {answer: answers.count(answer) for answer in sorted(set(answers))}
        said = ", ".join(f"{n} x {answer}" for answer, n in counts.items())
        good = healthy and code == 0 and not any(answer.startswith("lost") for answer in answers)
        end = "" if code == 0 else f"; {_ended(code, lines)}"
        return Try(name, mib, f"{said}{'' if healthy else '; /health fails'}{end}", good)

    def _asked(self, url: str, n_clients: int) -> tuple[list[str], bool]:
        with ThreadPoolExecutor(n_clients) as clients:
            answers = list(clients.map(lambda i: self._ask(url, i), range(n_clients)))
        try:
            return answers, httpx.get(f"{url}/health", timeout=10).status_code == 200
        except httpx.HTTPError:
            return answers, False

    def _ask(self, url: str, i: int) -> str:
        messages = [{"role": "user", "content": f"{i} {self._prompt}"}]
        body = {"model": MODEL, "messages": messages, "max_tokens": 64}
        try:
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=self._timeout_s)
            made = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            return f"lost: {type(error).__name__}"
        if answer.status_code == 200:
            return f"finish {made['choices'][0]['finish_reason']}"
        return f"{answer.status_code} {made['error']['message'][:60]}"

    def _command(self, name: str, mib: int, *args: str) -> Try:
        process = self._start(mib, *args)
        try:
            _, err = process.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            _, err = process.communicate()
            return Try(name, mib, f"hangs; {err[-100:]!r}", False)
        lines = err.splitlines()
        good = process.returncode == 0 or _is_failure(process.returncode, lines)
        return Try(name, mib, _ended(process.returncode, lines), good)

    def _start(self, mib: int, *args: str) -> subprocess.Popen[str]:
        limited = ["sh", "-c", f'ulimit {self._flag} "$0" && exec "$@"', str(mib << 10)]
        return subprocess.Popen(
            [*limited, sys.executable, "-m", "mlxkv", *args],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


def _listening(stderr: Iterator[str], lines: list[str]) -> Iterator[str]:
    """The server's address, as soon as it has said it."""
    for line in stderr:
        lines.append(line)
        if "listening on http" in line:
            yield line.split("listening on ")[1].split()[0]


def _is_failure(code: int, lines: Sequence[str]) -> bool:
    """Whether a command has failed as it should: an exit code of its own, and no trace."""
    return code in FAILURES and not any("Traceback" in line for line in lines)


def _ended(code: int, lines: Sequence[str]) -> str:
    last = lines[-1].strip()[:150] if lines else ""
    if code < 0:
        return f"{signal.Signals(-code).name}; {last}"
    return f"exit {code}; {last}" if code else "exit 0"


def tries(all_tries: Tries, limits: Sequence[int]) -> Iterator[Try]:
    """All commands at all limits."""
    commands: list[Callable[[int], Try]] = [
        all_tries.run,
        all_tries.kv_save,
        lambda mib: all_tries.serve(mib, 1),
        lambda mib: all_tries.serve(mib, 4),
    ]
    for mib in limits:
        for command in commands:
            yield command(mib)


def main() -> int:
    parser = argparse.ArgumentParser(description="Commands under hard memory limits.")
    parser.add_argument("--limits", type=int, nargs="*", default=LIMITS_MIB, help="in MiB")
    parser.add_argument("--kind", choices=KINDS, default="as")
    options = parser.parse_args()
    bad = 0
    print("| MiB | command | what happened | holds |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as home:
        for one in tries(Tries(Path(home), options.kind), options.limits):
            bad += not one.holds
            print(f"| {one.mib} | {one.name} | {one.outcome} | {'yes' if one.holds else 'NO'} |",
                  flush=True)  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
