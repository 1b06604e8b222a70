"""A soak as a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import machine_lines
from benchmarks.soak_checks import MiB, Record, baseline_s


def markdown(written: dict[str, Any]) -> str:
    """What was measured, and what had to hold."""
    settings = written["settings"]
    lines = [
        f"# {written['model']}: {settings['clients']} clients for {settings['minutes']:g} minutes",
        "",
        *machine_lines(written),
        f"- BLAS: {written['blas']}, {settings['threads']} threads; dtype {settings['dtype']}, "
        f"weights {settings['weights']}",
        f"- commit {written['commit']}",
        f"- `{written['command']}`",
        "",
        "| | |",
        "|---|--:|",
    ]
    lines += [f"| {name} | {_number(value)} |" for name, value in written["figures"].items()]
    lines += [
        "",
        "First tokens from the request on, of all answers that began; between pieces of text as "
        "they arrive. Alone: in a process of its own that keeps no prefixes.",
        "",
        "| has to hold | | seen |",
        "|---|---|---|",
    ]
    for check in written["checks"]:
        state = "holds" if check["ok"] else "**fails**"
        said = check["said"].replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {check['name']} | {state} | {said} |")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def plot(title: str, record: Record, path: Path) -> None:
    """Memory over time, and how first tokens and the gaps behind them are distributed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mlxkv"
    import matplotlib.pyplot as plt

    figure, (memory, first, gaps) = plt.subplots(
        3, 1, figsize=(9, 9), height_ratios=(2, 1, 1), layout="constrained"
    )
    _memory(memory, record)
    began = [answer for answer in record.answers if answer.piece_s]
    _distribution(first, "first token", "s", [answer.piece_s[0] for answer in began])
    _distribution(gaps, "between pieces", "ms", [1e3 * g for a in began for g in a.gaps_s])
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _memory(axis: Any, record: Record) -> None:
    times = [sample.t_s for sample in record.samples]
    names = {"rss": "the process, resident", "active": "MLX, active", "pages": "pages", "kv": "KV"}
    names["unbooked"] = "MLX, in no book"
    for kind, name in names.items():
        values = [getattr(sample, kind) / MiB for sample in record.samples]
        axis.plot(times, values, label=name, lw=1.4)
    for start, stop in (baseline_s(record), (record.duration_s * 5 / 6, record.duration_s)):
        axis.axvspan(start, stop, color="gray", alpha=0.15, lw=0)
    axis.set_xlabel("seconds; gray: what is compared")
    axis.set_ylabel("MiB")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", ncols=4)


def _distribution(axis: Any, name: str, unit: str, values: Sequence[float]) -> None:
    """The share of values up to each, on a scale of logarithms."""
    if not values:
        return
    ordered = sorted(max(value, 1e-3) for value in values)
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axis.step(ordered, shares, where="post", lw=1.4)
    for percent in (0.5, 0.99):
        axis.axhline(percent, color="black", lw=0.6, ls=":")
    axis.set_xscale("log")
    axis.set_xlabel(f"{name}, {unit} (dotted: p50, p99)")
    axis.set_ylabel("share")
    axis.grid(alpha=0.3)
