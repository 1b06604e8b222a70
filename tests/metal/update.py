"""Count everything again and rewrite goldens.json: `python -m tests.metal.update`.

Prints what got better or worse, launches a layer, and how long building the graph of a batch's
step takes. mlx-lm's counts are made again where it is installed, and kept where it is not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from tests.metal import goldens, shim
from tests.metal.goldens import OURS, THEIRS, Goldens
from tests.metal.proportions import FOREIGN, MODELS
from tests.metal.theirs import installed
from tests.support.paths import ROOT


def main() -> int:
    """Returns the exit code: 1 where this machine cannot count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-timing", action="store_true", help="do not time graph building")
    parser.add_argument("--cache", type=Path, default=ROOT / ".pytest_cache" / "d" / "metal")
    options = parser.parse_args()
    if reason := shim.why_not():
        print(reason, file=sys.stderr)
        return 1
    options.cache.mkdir(parents=True, exist_ok=True)
    before = goldens.read() if goldens.PATH.exists() else Goldens({}, {OURS: {}, THEIRS: {}})
    after = counted(before, options.cache)
    goldens.write(after)
    for side in (OURS, THEIRS):
        report(side, before, after)
    print_launches(after)
    if not options.no_timing and installed():
        command = [sys.executable, "-m", "tests.metal.timing", str(options.cache)]
        subprocess.run(command, cwd=ROOT, check=True)
    return 0


def counted(before: Goldens, cache: Path) -> Goldens:
    """The goldens of today; mlx-lm's are those of before where it is not installed."""
    versions, sides = dict(before.versions), dict(before.sides)
    versions["mlx"] = shim.version()
    sides[OURS] = goldens.measured(OURS, cache)
    if installed():
        versions[THEIRS] = importlib.metadata.version("mlx-lm")
        sides[THEIRS] = goldens.measured(THEIRS, cache)
    return Goldens(versions, sides)


def report(side: str, before: Goldens, after: Goldens) -> None:
    """Print what has changed of a side."""
    was, now = before.sides[side], after.sides[side]
    for word, changes in (("worse", goldens.worse), ("better", goldens.better)):
        for key in sorted(was.keys() | now.keys()):
            for change in changes(now.get(key), was.get(key)):
                print(f"{side}  {word}  {' | '.join(key)}  {change}")


def print_launches(counted: Goldens) -> None:
    """Print launches a layer of mlxkv / mlx-lm."""
    cases = ("decode q4", "chunk 2048 q4", "batch 4 q4", "batch 16 q4")
    print(f"{'launches a layer':16}" + "".join(f"{case:>16}" for case in cases))
    for name, config in {**MODELS, **FOREIGN}.items():
        cells = []
        for case in cases:
            counts = [counted.sides[side].get(("launches", name, case)) for side in (OURS, THEIRS)]
            layers = config["num_hidden_layers"]
            cells.append(
                " / ".join(f"{n / layers:.1f}" if isinstance(n, int) else "-" for n in counts)
            )
        print(f"{name:16}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
