"""Compare batches with mlx-lm's: `python -m benchmarks.batch --model smollm2:135m --output NAME`.

Tokens/s of all sequences together, of equal length and with a long one among them. As in
`benchmarks.compare`, each measurement is a process of its own, the engines take turns, and a ratio
is the median over pairs of runs. Writes NAME.json, NAME.md and NAME.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.compare import ROOT, Job, environment, run_once
from benchmarks.options import add_machine_options
from benchmarks.report import ENGINES, Run


def batches(sizes: Sequence[int], context: int, long: int) -> list[list[int]]:
    """The lengths of each batch: equal ones, then those with a long one among them."""
    equal = [[context] * n for n in sizes]
    return equal + [[context] * (n - 1) + [long] for n in sizes if n > 1 and long]


def jobs(args: argparse.Namespace, model: Path) -> list[Job]:
    """A process of each engine for each batch: the pairs are to be close in time."""
    found = []
    for lengths in batches(args.sizes, args.context, args.long):
        command = [sys.executable, "-m", "benchmarks.batch_worker", f"--model={model}"]
        command += [f"--dtype={args.dtype}", f"--seconds={args.seconds}"]
        command += [f"--lengths={json.dumps(lengths)}"]
        found.append(Job("batch", {engine: [*command, f"--engine={engine}"] for engine in ENGINES}))
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__)
    parser.add_argument("--model", required=True, help="a directory or a name mlxkv knows")
    parser.add_argument("--sizes", type=numbers, default=[1, 2, 4, 8, 16], metavar="N,N")
    parser.add_argument("--context", type=int, default=64, help="tokens of each sequence")
    parser.add_argument("--long", type=int, default=2048, help="of one of them in mixed; 0: none")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each batch")
    add_machine_options(parser)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    from mlxkv.store.resolve import resolve

    model = resolve(args.model).resolve()
    runs: list[Run] = []
    for job in jobs(args, model):
        for index in range(args.runs):
            for engine in ENGINES if index % 2 == 0 else reversed(ENGINES):
                runs.append(run_once(job, engine, index, environment(args)))
                print(f"{engine:7} {runs[-1].describe()}", file=sys.stderr, flush=True)
    report.write("benchmarks.batch", ROOT, model.name, args, runs)


if __name__ == "__main__":
    main()
