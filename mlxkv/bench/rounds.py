"""Engines in turns: start worker processes and collect their measurements.

Invariant: each measurement is in `Rounds` at once, so that an interrupt loses none of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from mlxkv.base import device
from mlxkv.bench.cases import Case, Skipped
from mlxkv.bench.engines import MLX_LM, MLXKV, Timing
from mlxkv.bench.worker import Job
from mlxkv.errors import MlxkvError

Note = Callable[[str], None]
"""Called with what is being done."""
Key = tuple[Case, str]
"""A case and an engine."""

WORKER = (sys.executable, "-m", "mlxkv.bench.worker")
GRACE_S = 5
"""Seconds that a worker has to end after an interrupt."""


@dataclass(frozen=True, slots=True)
class Task:
    """What all workers of a command have in common: the model, KV format and limit in bytes of
    mlxkv, the prompts of each case, and paths and weights of adapters.
    """

    path: str
    kv_type: str
    memory: int
    prompts: Mapping[Case, list[list[int]]]
    adapters: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why something could not be measured.

    Args:
        kind: the error's class, or the signal that ended the process.
        text: may name a path.
        exit_code: of the command, if nothing could be measured.
    """

    kind: str
    text: str
    exit_code: int = 1


@dataclass
class Rounds:
    """What was measured so far.

    Attributes:
        timings: of each case and engine, one a round.
        dtypes: what each engine computed in.
        failed: cases that an engine could not run.
        unusable: engines that could not load the model.
    """

    timings: dict[Key, list[Timing]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    failed: dict[Key, Failure] = field(default_factory=dict)
    unusable: dict[str, Failure] = field(default_factory=dict)

    def n_of(self, case: Case, engine: str) -> int:
        """Rounds that were measured."""
        return len(self.timings.get((case, engine), ()))

    @property
    def skipped(self) -> list[Skipped]:
        """The failed cases without an error's own text, which may name a path."""
        return [
            Skipped(case.context, case.batch, failure.kind, engine)
            for (case, engine), failure in self.failed.items()
        ]


def turns(engines: Sequence[str], repeat: int) -> Iterator[tuple[str, int]]:
    """Which engine is next, and how many rounds it has after that.

    Two take turns, A B B A A B, so that heat and other programs affect both alike. One alone stays
    loaded.
    """
    if len(engines) == 1:
        yield engines[0], repeat
        return
    for i in range(repeat):
        for engine in engines if i % 2 == 0 else reversed(engines):
            yield engine, i + 1


def run(task: Task, engines: Sequence[str], repeat: int, rounds: Rounds, note: Note) -> None:
    """Measure every case of every engine, into `rounds`.

    Raises:
        MlxkvError: mlxkv itself cannot load the model.
    """
    for engine, n_rounds in turns(engines, repeat):
        _catch_up(task, engine, n_rounds, rounds, note)
        if (failure := rounds.unusable.get(MLXKV)) is not None:
            error = MlxkvError(failure.text)
            error.exit_code = failure.exit_code
            raise error


def _catch_up(task: Task, engine: str, n_rounds: int, rounds: Rounds, note: Note) -> None:
    """Bring an engine's cases to `n_rounds`; restart a process that a case has ended."""
    while engine not in rounds.unusable:
        left = [
            case
            for case in task.prompts
            if (case, engine) not in rounds.failed and rounds.n_of(case, engine) < n_rounds
        ]
        if not left:
            return
        missing = n_rounds - max(rounds.n_of(case, engine) for case in left)
        _Attempt(task, engine, left, missing, rounds, note).run()


class _Attempt:
    """One worker process, which measures some cases `n_rounds` times."""

    def __init__(
        self,
        task: Task,
        engine: str,
        cases: Sequence[Case],
        n_rounds: int,
        rounds: Rounds,
        note: Note,
    ):
        self._engine, self._cases, self._rounds, self._note = engine, cases, rounds, note
        numbered = [(i, task.prompts[case], case.n_timed) for i, case in enumerate(cases)]
        self._job = Job(
            engine, task.path, task.kv_type, task.memory, n_rounds, numbered, task.adapters
        )
        self._at: Case | None = None  # the case that is being measured

    def run(self) -> None:
        """Start the process and collect what it measures until it ends."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
            process = subprocess.Popen(
                WORKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(self._engine),
                encoding="utf-8",
            )
            try:
                self._talk(process)
                code = process.wait()
            finally:
                _end(process)
            if code and self._engine not in self._rounds.unusable:
                self._crashed(code, _last_line(stderr))

    def _talk(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, process.stdout:
            try:
                json.dump(asdict(self._job), process.stdin)
                process.stdin.close()
            except BrokenPipeError:
                return  # the worker has ended: its exit code and stderr say why
            for line in process.stdout:
                self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        """Enter a worker's event."""
        case = self._cases[event["case"]] if "case" in event else None
        if "failed" in event:
            failure = Failure(event["kind"], event["failed"], event["exit_code"])
            self._rounds.unusable[self._engine] = failure
        elif "dtype" in event:
            self._rounds.dtypes[self._engine] = event["dtype"]
        elif "doing" in event:
            self._at = case
            self._note(self._describe(event["doing"]))
        elif case is not None and "error" in event:
            self._rounds.failed[case, self._engine] = Failure(event["kind"], event["error"])
        elif case is not None:
            timing = Timing(**event["timing"])
            self._rounds.timings.setdefault((case, self._engine), []).append(timing)

    def _describe(self, doing: str) -> str:
        if self._at is None:
            return f"{self._engine}: {doing}"
        n = self._rounds.n_of(self._at, self._engine) + 1
        which = "" if doing == "warming up" else f", run {n}"
        case = f"context {self._at.context:,}, batch {self._at.batch}"
        return f"{self._engine}: {doing}, {case}{which}"

    def _crashed(self, code: int, said: str) -> None:
        kind = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        failure = Failure(kind, f"its process ended with {kind}{f': {said}' if said else ''}")
        if self._at is None:
            self._rounds.unusable[self._engine] = failure
        else:
            self._rounds.failed[self._at, self._engine] = failure


def _environment(engine: str) -> dict[str, str]:
    """No network and no KV on disk; on Linux, mlx-lm has OpenBLAS' threads on every core.

    mlxkv divides products over the cores itself.
    """
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "MLXKV_KV_DISK": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if engine == MLX_LM:
        # `device.load_blas` has set it to 1 for this process and its children.
        env["OPENBLAS_NUM_THREADS"] = str(device.n_cores())
    return env


def _end(process: subprocess.Popen[str]) -> None:
    """End a process that is still running after an interrupt."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(stderr: IO[str]) -> str:
    stderr.seek(0)
    lines = [line.strip() for line in stderr if line.strip()]
    return lines[-1] if lines else ""
