"""Decoding with and without drafts: `python -m benchmarks.drafts --model NAME --output NAME`.

One process; for each task and temperature the two take turns, and a ratio is the median over pairs
of runs (`mlxkv.bench.drafts`). CPU time of all threads is a second opinion where the machine is
busy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import mlxkv
from benchmarks.report import about, keep, machine_lines
from mlxkv.bench.drafts import OFF, TASKS, Run, answers, compared, rows, streams

TEMPERATURES = (0.0, 0.8)
WANTED = dict(zip((task.name for task in TASKS), (3.0, 2.5, 2.0, 1.8, 0.98), strict=True))
STREAMS = "4 streams"
WANTED[STREAMS] = 1.3
"""Task -> the ratio wanted of lookups, at least."""


def table(runs: Sequence[Run]) -> str:
    """Medians and ratios of each task, as Markdown."""
    lines = [
        "| task | temperature | off tok/s | drafted tok/s | ratio | wanted | CPU time a token | "
        "first token | tokens a pass | same tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.task} | {row.temperature} | {row.off_tps:.1f} | {row.tps:.1f} | {row.ratio:.2f} | "
        f"{WANTED[row.task]:.2f} | {row.cpu:.2f} | {row.first:.2f} | {row.tokens_a_pass:.2f} | "
        f"{row.n_same} of {row.n_runs} |"
        for row in rows(runs)
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--draft", default="lookup", help="lookup, or a smaller model")
    parser.add_argument("--tasks", nargs="+", default=list(WANTED), help="some of them")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    llm, runs, modes = mlxkv.load(args.model), [], (OFF, args.draft)
    for temperature in args.temperatures:
        common = {"modes": modes, "temperature": temperature, "n_runs": args.runs}
        for task in TASKS:
            if task.name not in args.tasks:
                continue
            runs += compared(
                task.name,
                lambda mode, task=task, t=temperature: answers(llm, task, mode, t, args.tokens),
                **common,
            )
            report(args, runs)
        if STREAMS in args.tasks:
            runs += compared(
                STREAMS,
                lambda mode, t=temperature: streams(llm, mode, t, args.tokens),
                **common,
            )
            report(args, runs)
    return 0


def report(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Keep all runs so far, and print their table."""
    written = about(Path(__file__).parent.parent, "benchmarks.drafts")
    written |= {"model": args.model, "runs": [asdict(run) for run in runs]}
    head = [f"# Drafts, {args.model}", "", *machine_lines(written), "", table(runs)]
    keep(args.output, written, "\n".join(head))


if __name__ == "__main__":
    raise SystemExit(main())
