"""kill -9 at random moments: `python -m benchmarks.reliability.kills --kills 300 --output NAME`.

Each command runs once undisturbed, for its time and its result. Then it is started again and again,
killed after a random part of that time, and what it left is checked: no file is damaged, nothing
half is found under a name, and greedy answers are those of a cold run. Writes NAME.json and
NAME.md; the exit code is 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.compare import ROOT
from benchmarks.reliability.kill_targets import TARGETS, Target
from benchmarks.report import about

LATEST = 1.1
"""Part of an undisturbed run's time after which a process is killed at the latest."""


@dataclass(slots=True)
class Tally:
    """What became of one command's processes.

    Args:
        whole_s: time of an undisturbed run.
        killed: ended by the kill.
        finished: had ended before it.
        wrong: what was wrong afterwards, with the number of the process.
    """

    command: str
    whole_s: float
    killed: int = 0
    finished: int = 0
    wrong: list[str] = field(default_factory=list)


def attack(name: str, target: Target, n_kills: int, rng: random.Random) -> Tally:
    """Kill a command so many times."""
    with target.ready():
        start = time.perf_counter()
        target.finish(0)
        tally = Tally(name, time.perf_counter() - start)
        target.check(0)
        i = 0
        while tally.killed < n_kills:
            i += 1
            process = target.start(i)
            time.sleep(rng.uniform(0, LATEST) * tally.whole_s)
            if process.poll() is None:
                process.kill()
                tally.killed += 1
            else:
                tally.finished += 1
            process.wait()
            try:
                target.check(i)
            except Exception as error:
                tally.wrong.append(f"{i}: {type(error).__name__}: {error}")
            if i > 4 * n_kills:
                break
    return tally


def markdown(written: dict[str, Any]) -> str:
    """A table with the machine above it."""
    lines = [
        f"kill -9 at a random moment of each command, {written['about']['commit'][:12]}, "
        f"seed {written['seed']}",
        "",
        "| command | undisturbed, s | killed | had ended before | wrong afterwards |",
        "|---|---|---|---|---|",
    ]
    for row in written["tallies"]:
        lines.append(
            f"| {row['command']} | {row['whole_s']:.2f} | {row['killed']} | {row['finished']} | "
            f"{len(row['wrong'])} |"
        )
    total = sum(row["killed"] for row in written["tallies"])
    wrong = sum(len(row["wrong"]) for row in written["tallies"])
    return "\n".join([*lines, f"| all | | {total} | | {wrong} |", ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="in all, divided by the commands")
    parser.add_argument("--only", choices=TARGETS, action="append", help="this command alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="NAME or NAME.json")
    args = parser.parse_args(argv)
    names = args.only or list(TARGETS)
    rng, tallies, written = random.Random(args.seed), list[Tally](), dict[str, Any]()
    for name in names:
        with tempfile.TemporaryDirectory() as home:
            target = TARGETS[name](Path(home))
            tallies.append(attack(name, target, args.kills // len(names), rng))
        written = {
            "about": about(ROOT, "benchmarks.reliability.kills"),
            "seed": args.seed,
            "tallies": [asdict(tally) for tally in tallies],
        }
        args.output.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(markdown(written))
        print(f"{name}: {asdict(tallies[-1])}", file=sys.stderr, flush=True)
    print(markdown(written))
    return int(any(tally.wrong for tally in tallies))


if __name__ == "__main__":
    raise SystemExit(main())
