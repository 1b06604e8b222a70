"""From raw runs to ratios, a table and a plot."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlxkv.bench.machine import chip

ENGINES = ("mlxkv", "mlx-lm")

TARGETS = {
    "decode": 1.0,
    "batch": 1.0,
    "serve": 1.2,
    "prefill": 1.0,
    "graph": 0.7,
    "shell to token 1 ": 0.4,
    "MLX peak": 1.0,
    "process peak": 1.0,
}
"""First words of a measure -> the ratio wanted: at least that for tokens/s, at most for others."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one process of one engine measured; `index` pairs it with the other engine's.

    `note` is what a reader has to know beside the figures.
    """

    job: str
    engine: str
    index: int
    blas: str
    figures: dict[str, float]
    note: str = ""

    def describe(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self.figures.items())


@dataclass(frozen=True, slots=True)
class Row:
    """One measure: medians of both engines, and the pair-wise ratios mlxkv / mlx-lm."""

    measure: str
    mlxkv: float
    mlx_lm: float
    ratio: float
    ratios: list[float]
    target: float | None

    @property
    def higher_is_better(self) -> bool:
        return self.measure.endswith("tok/s")

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.ratio >= self.target if self.higher_is_better else self.ratio <= self.target


def summary(runs: Sequence[Run]) -> list[Row]:
    """One row per measure, in the order in which they were taken."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        for measure, value in run.figures.items():
            of = values.setdefault(measure, {engine: {} for engine in ENGINES})
            of[run.engine][run.index] = value
    rows = []
    for measure, of in values.items():
        ours, theirs = (of[engine] for engine in ENGINES)
        ratios = [ours[i] / theirs[i] for i in sorted(ours.keys() & theirs.keys())]
        starts = measure.endswith(("tok/s", "graph ms", " s", "peak MiB"))
        target = next((t for k, t in TARGETS.items() if measure.startswith(k)), None)
        rows.append(
            Row(
                measure,
                statistics.median(ours.values()),
                statistics.median(theirs.values()),
                statistics.median(ratios),
                ratios,
                target if starts else None,
            )
        )
    return rows


def write(
    program: str, root: Path, model: str, args: argparse.Namespace, runs: Sequence[Run]
) -> None:
    """Write what `args.output` names as .json, .md and .svg, and print the table.

    Args:
        program: the module that ran.
        root: of the repository.
        model: its name.
        args: `output` and `blas`; all others are kept as settings.
        runs: every one.
    """
    written = {
        "model": model,
        "settings": {k: v for k, v in vars(args).items() if k not in ("model", "output")},
        **about(root, program),
        "blas": sorted({run.blas for run in runs if run.blas}) or [args.blas],
        "runs": [asdict(run) for run in runs],
        "summary": [asdict(row) for row in summary(runs)],
    }
    keep(args.output, written, markdown(written))
    plot(written, args.output.with_suffix(".svg"))


def keep(output: Path, written: Mapping[str, Any], table: str) -> None:
    """Write OUTPUT.json and OUTPUT.md, and print the table."""
    output = output.with_suffix("")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


def about(root: Path, program: str) -> dict[str, Any]:
    """The machine, the versions, the commit and the command; no names of hosts or folders."""
    versions = {"python": platform.python_version()}
    for package in ("mlxkv", "mlx", "mlx-lm", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    argv = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return {
        "machine": {
            "cpu": chip(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "system": f"{platform.system()} {platform.release().split('-')[0]}",
        },
        "versions": versions,
        "commit": _git(root, "rev-parse", "HEAD")
        + (" and uncommitted changes" if _git(root, "status", "--porcelain") else ""),
        "command": f"python -m {program} {shlex.join(argv)}",
    }


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _rows(written: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in written["summary"]]


def machine_lines(written: dict[str, Any]) -> list[str]:
    """The machine and the versions, as items of a list."""
    machine = written["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in written["versions"].items())
    return [
        f"- machine: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}",
        f"- {versions}",
    ]


def markdown(written: dict[str, Any]) -> str:
    """A table, with what it was measured on above it."""
    settings = written["settings"]
    notes = sorted({f"- {run['engine']}, {run['note']}" for run in written["runs"] if run["note"]})
    lines = [
        f"# {written['model']}",
        "",
        *machine_lines(written),
        f"- BLAS: {', '.join(written['blas'])}, {settings['threads']} threads; "
        f"dtype {settings['dtype']} (float32 on the CPU, scales included)",
        f"- commit {written['commit']}",
        f"- `{written['command']}`",
        *notes,
        "",
        "Medians; the ratio mlxkv / mlx-lm is the median over pairs of runs (smallest to largest).",
        "",
        "| | mlxkv | mlx-lm | ratio | | target |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in _rows(written):
        sign = ">=" if row.higher_is_better else "<="
        state = {None: "", True: "met", False: "**missed**"}[row.met]
        target = "" if row.target is None else f"{sign} {row.target:g} {state}"
        lines.append(
            f"| {row.measure} | {row.mlxkv:.4g} | {row.mlx_lm:.4g} | {row.ratio:.2f} "
            f"| {min(row.ratios):.2f}-{max(row.ratios):.2f} | {target} |"
        )
    return "\n".join(lines) + "\n"


def plot(written: dict[str, Any], path: Path) -> None:
    """Every pair's ratio as a dot: speeds above, times and memory below."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mlxkv"
    import matplotlib.pyplot as plt

    rows = [row for row in _rows(written) if "cpu ms" not in row.measure]
    groups = [
        ("tokens/s, mlxkv / mlx-lm (right is better)", [r for r in rows if r.higher_is_better]),
        (
            "time and memory, mlxkv / mlx-lm (left is better)",
            [r for r in rows if not r.higher_is_better],
        ),
    ]
    groups = [(title, members) for title, members in groups if members]
    heights = [len(members) + 1 for _, members in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, 0.42 * sum(heights) + 1.2), height_ratios=heights,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (title, members) in zip(axes[:, 0], groups, strict=True):
        _dots(axis, title, members)
    save(figure, written, path)


def save(figure: Any, written: Mapping[str, Any], path: Path) -> None:
    """Write a figure with the model and the machine on top; the same one gives the same file."""
    import matplotlib.pyplot as plt

    machine = written["machine"]
    figure.suptitle(
        f"{written['model']}: {machine['cpu']}, {machine['cores']} cores, "
        f"BLAS {', '.join(written['blas'])}",
        fontsize=11,
    )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _dots(axis: Any, title: str, rows: Sequence[Row]) -> None:
    for y, row in enumerate(rows):
        colour = {None: "tab:gray", True: "tab:green", False: "tab:red"}[row.met]
        axis.plot(row.ratios, [y] * len(row.ratios), "o", color=colour, alpha=0.35, ms=5)
        axis.plot([row.ratio], [y], "|", color=colour, ms=16, mew=3)
        if row.target is not None:
            axis.plot([row.target], [y], "x", color="black", ms=6)
        axis.annotate(
            f"{row.ratio:.2f}   ({row.mlxkv:.3g} : {row.mlx_lm:.3g})",
            (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8,
        )  # fmt: skip
    axis.axvline(1.0, color="black", lw=0.8)
    axis.set_yticks(range(len(rows)), [row.measure for row in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(f"{title}; x: target, |: median", fontsize=9, loc="left")
