"""Pictures beside mlx-vlm: `python -m benchmarks.media --peer-python PYTHON --output NAME`.

Both engines read the same checkpoint of random weights in the proportions of a released model (see
`media_checkpoints`), in float32 on the CPU with the same BLAS and threads. A round is a process of
each (`media_worker`), which take turns; a ratio is the median over rounds. mlx-vlm is installed in
an environment of its own, whose interpreter is PYTHON. NAME.json and NAME.md are written after each
round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.compare import environment
from benchmarks.options import add_machine_options

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("mlxkv", "mlx-vlm")
FAMILIES = ("gemma3", "gemma4")
PEER_PACKAGES = ("mlx-vlm", "mlx", "transformers", "torch")

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Measure:
    """A row of the table.

    Args:
        name: what is measured.
        over: the figure of mlxkv that is divided.
        under: the engine and the figure that it is divided by.
        target: the ratio wanted, at most; None for none.
    """

    name: str
    over: str
    under: tuple[str, str]
    target: float | None = None


def measures(kept: Sequence[str]) -> list[Measure]:
    """All rows; `kept` is what mlx-vlm can keep of a picture."""
    theirs = ENGINES[1]
    rows = [
        Measure("tower", "tower", (theirs, "tower"), 1.0),
        Measure("one picture: to the first token", "one picture", (theirs, "one picture"), 1.0),
    ]
    asked = "another question"
    for mode in kept:
        name = f"another question; mlx-vlm keeps {mode}"
        rows.append(Measure(name, f"{asked}, chat", (theirs, f"{asked}, {mode}"), 0.1))
    second, again = "a second picture", "the first again"
    return [
        *rows,
        Measure("a second picture", second, (theirs, second)),
        Measure(f"{second} over one alone, mlxkv", second, (ENGINES[0], "a picture alone"), 1.1),
        Measure("the first picture again, behind another", again, (theirs, again)),
        Measure("read and resize a picture", "read a picture", (theirs, "read a picture")),
    ]


PEAKS = ("MLX peak MiB", "process peak beside imports MiB", "process peak MiB")


def run(args: argparse.Namespace, engine: str, model: Path, pictures: Path) -> dict[str, Any]:
    """One round of one engine, with the load of the machine before it."""
    load = os.getloadavg()[0]
    python = sys.executable if engine == ENGINES[0] else str(args.peer_python)
    with tempfile.TemporaryDirectory() as home:  # nothing is kept from one round to the next
        env = environment(args) | {"HOME": home, "PYTHONPATH": str(ROOT)}
        command = [python, "-m", "benchmarks.media_worker", f"--engine={engine}"]
        command += [f"--model={model}", f"--pictures={pictures}"]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(f"{engine}: exit code {done.returncode}\n{done.stderr}")
    return {"engine": engine, "load": load, **json.loads(done.stdout.splitlines()[-1])}


def make(family: str, folder: Path, pictures: Path, n: int) -> None:
    """Write checkpoint and pictures in a process of its own: a child's peak begins at ours."""
    code = (
        "import sys; from pathlib import Path; from benchmarks import media_checkpoints as c; "
        "c.WRITERS[sys.argv[1]](Path(sys.argv[2])); "
        "c.write_pictures(Path(sys.argv[3]), int(sys.argv[4]))"
    )
    words = [family, str(folder), str(pictures), str(n)]
    subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=True)


def rounds(args: argparse.Namespace, family: str) -> Iterator[list[dict[str, Any]]]:
    """The runs of a family so far, two of each round, after each round."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model, pictures = Path(scratch) / family, Path(scratch) / "pictures"
        make(family, model, pictures, 7)
        for index in range(args.runs):
            # The second of a pair may find warmer files: take turns in who comes first.
            for engine in ENGINES if index % 2 == 0 else reversed(ENGINES):
                runs.append({"round": index, **run(args, engine, model, pictures)})
                figures = runs[-1]["figures"]
                said = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
                print(f"{family} {engine:7} {said}", file=sys.stderr, flush=True)
            yield runs


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of both and of the rounds' ratios, in wall and in CPU time, and of peaks."""
    by_round: dict[int, dict[str, Figures]] = {}
    for one in runs:
        by_round.setdefault(one["round"], {})[one["engine"]] = one["figures"]
    pairs = [by_round[index] for index in sorted(by_round)]
    prefix = "another question, "
    names = [name.removesuffix(" s").removeprefix(prefix) for name in pairs[0][ENGINES[1]]
             if name.startswith(prefix) and "cpu" not in name]  # fmt: skip
    rows = []
    for measure in measures(names):
        row: dict[str, Any] = {"name": measure.name, "target": measure.target}
        for unit in ("s", "cpu s"):
            over = [pair[ENGINES[0]][f"{measure.over} {unit}"] for pair in pairs]
            engine, figure = measure.under
            under = [pair[engine][f"{figure} {unit}"] for pair in pairs]
            row |= {f"{key} {unit}": value for key, value in _ratios(over, under).items()}
        rows.append(row)
    for peak in PEAKS:
        both = [[pair[engine][peak] for pair in pairs] for engine in ENGINES]
        row = {"name": peak, "target": None if peak == PEAKS[2] else 1.0}
        rows.append(row | {f"{k} s": value for k, value in _ratios(*both).items()})
    return rows


def _ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    each = sorted(a / b for a, b in zip(over, under, strict=True))
    return {
        "over": statistics.median(over),
        "under": statistics.median(under),
        "ratio": statistics.median(each),
        "least": each[0],
        "most": each[-1],
    }


def markdown(written: dict[str, Any]) -> str:
    """The tables, with what they were measured on above."""
    settings, peer = written["settings"], written["peer"]
    loads = [run["load"] for runs in written["runs"].values() for run in runs]
    lines = [
        "# Pictures beside mlx-vlm",
        "",
        *report.machine_lines(written),
        f"- mlx-vlm's environment: {', '.join(f'{k} {v}' for k, v in peer.items())}",
        f"- BLAS {settings['blas']}, {settings['threads']} threads, float32; {_said(written)} "
        f"rounds; load of the machine {min(loads):.1f} to {max(loads):.1f}",
        f"- commit {written['commit']}",
        f"- `{written['command']}`",
        "",
        "Medians; a ratio is the median over rounds (smallest to largest).",
    ]
    for family, rows in written["summary"].items():
        lines += ["", f"## {family}", "", "| | mlxkv | mlx-vlm | ratio | | of CPU time | target |"]
        lines += ["|---|--:|--:|--:|--:|--:|---|", *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _said(written: dict[str, Any]) -> str:
    """How many rounds each family had."""
    counts = {len(runs) // 2 for runs in written["runs"].values()}
    return " and ".join(map(str, sorted(counts)))


def _line(row: dict[str, Any]) -> str:
    unit = "" if row["name"] in PEAKS else " s"
    cpu = f"{row['ratio cpu s']:.3g}" if "ratio cpu s" in row else ""
    target = ""
    if row["target"] is not None:
        met = row["ratio s"] <= row["target"]
        target = f"<= {row['target']:g} {'met' if met else '**missed**'}"
    return (
        f"| {row['name']} | {row['over s']:.4g}{unit} | {row['under s']:.4g}{unit} "
        f"| {row['ratio s']:.3g} | {row['least s']:.3g}-{row['most s']:.3g} | {cpu} | {target} |"
    )


def peer_versions(python: Path) -> dict[str, str]:
    """Versions in mlx-vlm's environment."""
    code = (
        "import json, sys; from importlib import metadata as m\n"
        "known = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({n: known.get(n, 'not installed') for n in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *PEER_PACKAGES], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.media", description=__doc__)
    parser.add_argument(
        "--peer-python", type=Path, required=True, help="interpreter that has mlx-vlm"
    )
    parser.add_argument("--families", default=",".join(FAMILIES), metavar="A,B")
    parser.add_argument("--runs", type=int, default=5, help="rounds")
    add_machine_options(parser, dtype="float32", of="float32")
    args = parser.parse_args()
    args.families = args.families.split(",")
    if unknown := set(args.families) - set(FAMILIES):
        parser.error(f"--families must be some of {', '.join(FAMILIES)}; got {unknown.pop()!r}")
    return args


def main() -> None:
    args = parse()
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "peer_python")}
    about = {
        "settings": settings,
        **report.about(ROOT, "benchmarks.media"),
        "peer": peer_versions(args.peer_python),
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for family in args.families:
        for done in rounds(args, family):  # written after each, which takes minutes
            runs[family] = done
            tables = {name: summary(each) for name, each in runs.items()}
            written = {**about, "runs": runs, "summary": tables}
            report.keep(args.output, written, markdown(written))


if __name__ == "__main__":
    main()
