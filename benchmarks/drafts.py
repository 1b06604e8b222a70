"""Decoding with and without drafts: `python -m benchmarks.drafts --models A B --output NAME`.

One process; for each model, task and temperature the two take turns, and a ratio is the median over
pairs of runs (`mlxkv.bench.drafts`). A pair of each comes before a second one of any, so that a run
which ends early, or at `--minutes`, has measured all alike. CPU time of all threads is a second
opinion where the machine is busy. OUTPUT.json, .md and .svg are written after each round;
`--from NAME.json` makes the table and the plot of what was measured before.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlxkv
from benchmarks.report import about, keep, machine_lines
from mlxkv.bench.drafts import OFF, STREAMS, TASKS, Row, Run, jobs_for, pair, rows

TEMPERATURES = (0.0, 0.8)
WANTED = dict(zip((task.name for task in TASKS), (3.0, 2.5, 2.0, 1.8, 0.98), strict=True))
WANTED[STREAMS] = 1.3
"""Task -> the ratio wanted of lookups, at least."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured again and again."""

    model: str
    task: str
    temperature: float


def rounds(jobs: Sequence[Job], n_rounds: int, until: float) -> Iterator[tuple[int, Job, float]]:
    """Rounds of all jobs, the first of which, -1, is for warming up.

    Yields the round, the job and when it began. Ends where the next pair would not be done in time,
    to judge by the job's last.
    """
    took: dict[Job, float] = {}
    for index in range(-1, n_rounds):
        for job in jobs:
            started = time.monotonic()
            if started + took.get(job, 0.0) > until:
                return
            yield index, job, started
            took[job] = time.monotonic() - started


def table(written: Mapping[str, Any]) -> str:
    """Medians and ratios of each model, task and temperature, as Markdown."""
    lines = [
        "| model | task | temperature | off tok/s | drafted tok/s | ratio | wanted | "
        "CPU time a token | first token | tokens a pass | same tokens |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {model} | {row.task} | {row.temperature} | {row.off_tps:.1f} | {row.tps:.1f} | "
        f"{row.ratio:.2f} | {WANTED[row.task]:.2f} | {row.cpu:.2f} | {row.first:.2f} | "
        f"{row.tokens_a_pass:.2f} | {row.n_same} of {row.n_runs} |"
        for model, found in tables(written).items()
        for row in found
    ]
    return "\n".join(lines) + "\n"


def tables(written: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows of each model, of those tasks that have a pair of runs."""
    return {
        model: rows([Run(**run) for run in runs])
        for model, runs in written["models"].items()
        if runs
    }


def plot(written: Mapping[str, Any], path: Path) -> None:
    """A bar for each ratio, beside what is wanted; a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mlxkv"
    import matplotlib.pyplot as plt

    found = tables(written)
    height = 1 + sum(0.28 * len(of) + 0.8 for of in found.values())
    figure, axes = plt.subplots(
        len(found), 1, figsize=(8, height), squeeze=False, layout="constrained"
    )
    for axis, (model, of) in zip(axes[:, 0], found.items(), strict=True):
        wanted = [WANTED[row.task] for row in of]
        met = [row.ratio >= least for row, least in zip(of, wanted, strict=True)]
        colours = ["tab:green" if each else "tab:orange" for each in met]
        axis.barh(range(len(of)), [row.ratio for row in of], color=colours, height=0.7)
        axis.plot(wanted, range(len(of)), "kx", ms=6)
        for y, row in enumerate(of):
            axis.annotate(f" {row.ratio:.2f}", (row.ratio, y), va="center", fontsize=8)
        names = [
            f"{row.task}, {'greedy' if not row.temperature else row.temperature}" for row in of
        ]
        axis.set_yticks(range(len(of)), names, fontsize=8)
        axis.set_ylim(len(of) - 0.5, -0.5)
        axis.axvline(1.0, color="black", lw=0.8)
        axis.set_title(
            f"{model}: tokens/s with drafts / without; x: wanted", fontsize=9, loc="left"
        )
    machine = written["machine"]
    figure.suptitle(f"Drafts: {machine['cpu']}, {machine['cores']} cores", fontsize=11)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def report(output: Path, written: Mapping[str, Any]) -> None:
    """Write the table and the plot of all runs, if there are any."""
    if not tables(written):
        return
    head = ["# Drafts", "", *machine_lines(dict(written)), "", table(written)]
    keep(output, written, "\n".join(head))
    if find_spec("matplotlib") is None:  # what was measured is kept all the same
        print("no plot: matplotlib is not installed; --from the .json draws it later")
        return
    plot(written, output.with_suffix("").with_suffix(".svg"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2:135m"])
    parser.add_argument("--draft", default="lookup", help="lookup, or a smaller model")
    parser.add_argument("--tasks", nargs="+", default=list(WANTED), help="some of them")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--stream-tokens", type=int, default=60, help="of each of 4 streams")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=15.0, help="no pair begins past them")
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    args, began = _options(), time.monotonic()
    if args.source is not None:
        report(args.output, json.loads(args.source.read_text(encoding="utf-8")))
        return 0
    loaded = {Path(name).name: mlxkv.load(name) for name in args.models}
    tasks = [name for name in WANTED if name in args.tasks]
    jobs = [Job(m, task, t) for t in args.temperatures for m in loaded for task in tasks]
    written: dict[str, Any] = about(Path(__file__).parent.parent, "benchmarks.drafts")
    written["models"] = {name: [] for name in loaded}
    last = -1
    for index, job, started in rounds(jobs, args.runs, began + 60 * args.minutes):
        if index > last:
            report(args.output, written)
            last = index
        n_tokens = args.stream_tokens if job.task == STREAMS else args.tokens
        make = jobs_for(loaded[job.model], job.temperature, n_tokens)[job.task]
        kind = {"task": job.task, "temperature": job.temperature}
        found = pair(make, (OFF, args.draft), index, **kind)
        if index >= 0:
            written["models"][job.model] += [asdict(run) for run in found]
        took = time.monotonic() - started
        print(f"{index} {job.model}, {job.task}, {job.temperature}: {took:.1f} s", flush=True)
    report(args.output, written)
    if not tables(written):
        print(f"no pair of runs was done within {args.minutes:g} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
