"""Compare the CPU backend with llama.cpp: `python -m benchmarks.cpu --model DIR --gguf FILE ...`.

Both read the same weights: the GGUF file, and the folder that `mlxkv convert` made of it. Engines
take turns, each measurement is a process of its own, and what other processes of the machine took
meanwhile stands beside it. `mlxkv-plain` is mlxkv without its kernels. `beside` measures decode
while another process keeps one core busy, `streams` is eight clients at a server. Writes NAME.json
(every run) and NAME.md (medians).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from mlxkv.cpu.library import SWITCH

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("mlxkv", "llama.cpp", "mlxkv-plain", "mlx-lm")
WHAT = ("decode", "prefill", "beside", "streams")
BASE = "llama.cpp"
LIMIT_S = 900


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Names and options of what is asked for."""
    seconds = f"--seconds={args.seconds}"
    if "decode" in args.what:
        for n in args.contexts:
            yield "decode", [f"--contexts=[{n}]", seconds]
    if "prefill" in args.what:
        for n in args.prefills:
            yield "prefill", [f"--prefills=[{n}]"]
    if "beside" in args.what:
        yield "beside", ["--contexts=[0]", seconds]
    if "streams" in args.what:
        yield "streams", []


@dataclass(frozen=True, slots=True)
class Run:
    """What one process measured; `others` is the cores that other processes took meanwhile."""

    job: str
    engine: str
    index: int
    figures: dict[str, float]
    load: float
    others: float


def measure(args: argparse.Namespace, job: str, options: list[str], engine: str, i: int) -> Run:
    name = engine.removesuffix("-plain")
    worker = "cpu_streams" if job == "streams" else "cpu_worker"
    command = [sys.executable, "-m", f"benchmarks.{worker}", f"--engine={name}", *options]
    if job == "streams":
        command.append(f"--index={i}")
    command += [f"--model={args.model}", f"--gguf={args.gguf}", f"--threads={args.threads}"]
    environment = {**os.environ, SWITCH: "1" if engine == "mlxkv" else "0"}
    with _busy_core() if job == "beside" else contextlib.nullcontext():
        start, busy = time.perf_counter(), _busy_s()
        own = _children_s()
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S,
            check=False,
        )  # fmt: skip
        elapsed = time.perf_counter() - start
        others = (_busy_s() - busy - (_children_s() - own)) / elapsed
    if done.returncode:
        raise SystemExit(f"{engine}: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    if job == "beside":
        figures = {f"beside: {k}": v for k, v in figures.items()}
    return Run(job, engine, i, figures, os.getloadavg()[0], others)


@contextlib.contextmanager
def _busy_core() -> Iterator[None]:
    loop = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", loop])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _busy_s() -> float:
    """CPU time of all processes since the machine started: all but idle and waiting."""
    user, nice, system = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def table(written: dict[str, Any], runs: list[Run]) -> str:
    """Medians of each engine, and of the ratios to llama.cpp's run of the same turn."""
    figures: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        for name, value in run.figures.items():
            figures[name][run.engine][run.index] = value
    engines = [e for e in ENGINES if any(run.engine == e for run in runs)]
    others = [run.others for run in runs if run.job != "beside"] or [0.0]
    lines = [
        f"# {written['model']}",
        "",
        *report.machine_lines(written),
        f"- llama.cpp: {written['llama.cpp']}",
        f"- commit {written['commit']}; `{written['command']}`",
        f"- other processes took {statistics.median(others):.2f} of the cores (median of runs; "
        f"{min(others):.2f} to {max(others):.2f}), load up to {max(run.load for run in runs):.1f}",
        "",
        "| | " + " | ".join(engines) + " | mlxkv / llama.cpp |",
        "|---|" + "--:|" * (len(engines) + 1),
    ]
    for name, of in figures.items():
        ours, theirs = of.get("mlxkv", {}), of.get(BASE, {})
        ratios = [ours[i] / theirs[i] for i in sorted(ours.keys() & theirs.keys())]
        ratio = "" if not ratios else (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        )  # fmt: skip
        medians = [f"{statistics.median(of[e].values()):.4g}" if of[e] else "" for e in engines]
        lines.append(f"| {name} | {' | '.join(medians)} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder")
    parser.add_argument("--gguf", type=Path, required=True, help="the file that it was made of")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--engines", type=lambda s: s.split(","), default=list(ENGINES[:2]))
    parser.add_argument("--what", type=lambda s: s.split(","), default=list(WHAT))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--contexts", type=json.loads, default=[0, 2048])
    parser.add_argument("--prefills", type=json.loads, default=[512, 2048])
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="of mlxkv's kernels and llama.cpp; with 1, CPU time compares on a busy machine",
    )
    args = parser.parse_args()
    runs = []
    for job, options in jobs(args):
        for i in range(args.turns):
            order = args.engines if i % 2 == 0 else args.engines[::-1]
            for engine in order:
                runs.append(run := measure(args, job, options, engine, i))
                print(job, engine, i, run.figures, f"others {run.others:.2f}", file=sys.stderr)
    written = {
        "model": args.model.name,
        **report.about(ROOT, "benchmarks.cpu"),
        "llama.cpp": _wheel(),
        "runs": [asdict(run) for run in runs],
    }
    report.keep(args.output, written, table(written, runs))


def _wheel() -> str:
    from importlib.metadata import distributions

    found = {x.name: x.version for x in distributions() if x.name in ("cyllama", "xllamacpp")}
    return ", ".join(f"{name} {found[name]}" for name in sorted(found)) or "not installed"


if __name__ == "__main__":
    main()
