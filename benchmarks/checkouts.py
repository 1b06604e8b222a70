"""Two checkouts of mlxkv side by side: what one sequence costs, in pairs of processes.

    python -m benchmarks.checkouts OLD NEW MODEL [--runs 7] [--what host,decode,first]

A run of each comes before those that count: Python keeps its byte code, as of a package that is
installed. Figures, each as new / old, the median of the pairs:
- host: the calling thread's own time a token, of a Llama of 32 layers: what building the steps and
  all that is done with their tokens takes;
- decode: time a token of MODEL;
- first: from the shell, `mlxkv run MODEL` to its only token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoints import write_tiny_llama

WORKER = Path(__file__).with_name("checkouts_worker.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("model", help="a directory or a name")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--what", type=lambda s: s.split(","), default=["host", "decode", "first"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_tiny_llama(Path(folder) / "tiny")
        run = ["-m", "mlxkv", "run", options.model, "Hi", "--max-tokens", "1"]
        cases = {
            "host": ("us a token", [str(WORKER), "host", options.model, str(tiny)]),
            "decode": ("ms a token", [str(WORKER), "decode", options.model]),
            "first": ("s to the first token", run),
        }
        both = [options.old, options.new]
        for what in options.what:
            unit, command = cases[what]
            pairs = []
            for checkout in both:
                measured(checkout, command)
            for i in range(options.runs):
                # In turns, so that neither always runs on the warmer machine.
                order = both if i % 2 == 0 else both[::-1]
                taken = {checkout: measured(checkout, command) for checkout in order}
                pairs.append((taken[options.old], taken[options.new]))
            print(line(f"{what}, {unit}", pairs), flush=True)


def measured(checkout: Path, command: list[str]) -> float:
    """What a worker prints, or the time of a whole process that prints an answer."""
    env = {name: x for name, x in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPATH"] = str(checkout)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        env=env,
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    taken = time.perf_counter() - start
    return taken if command[0] == "-m" else float(done.stdout.split()[-1])


def line(name: str, pairs: list[tuple[float, float]]) -> str:
    """A row: both medians, and the ratios' median, lowest and highest."""
    old, new = (statistics.median(each) for each in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    return (
        f"{name:28} {old:9.3f} {new:9.3f}   new / old {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
