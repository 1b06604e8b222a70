"""A report in a terminal: a table, and decode speeds as bars."""

from __future__ import annotations

import os
import sys
from typing import Any

from mlxkv.base.units import human_bytes, human_count

WIDTH = 80
"""Columns where stdout is no terminal."""
COLUMNS = (
    "CONTEXT", "BATCH", "ENGINE", "PREFILL\ntok/s", "DECODE\ntok/s", "FIRST\ntoken s", "PEAK",
    "PLAN",
)  # fmt: skip
BAR = 44
"""Columns of the longest bar."""


def head(report: dict[str, Any]) -> str:
    """The machine, the model and the versions."""
    machine, model, settings = report["machine"], report["model"], report["settings"]
    blas = f", {machine['blas']}" if "blas" in machine else ""
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items() if v)
    dtypes = ", ".join(dict.fromkeys(settings["dtypes"].values()))
    name = model["name"] or model["model_type"]
    return "\n".join(
        [
            f"{machine['chip']}, {human_bytes(machine['memory_bytes'])}, {machine['system']}, "
            f"{machine['backend']}{blas}",
            f"{name}, {human_count(model['parameters'])} parameters",
            f"weights {model['quantization']}, computed in {dtypes}, KV {settings['kv_type']}",
            versions,
        ]
    )


def table(report: dict[str, Any]) -> str:
    """Medians, and below each the smallest and the largest of the runs, styled for stdout."""
    from rich.console import Console
    from rich.table import Table

    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in COLUMNS:
        side = "left" if title == "ENGINE" else "right"
        rows.add_column(title, justify=side, no_wrap=True)
    several = max(_n_runs(report)) > 1
    for result in report["results"]:
        rows.add_row(*_cells(result))
        if several:
            rows.add_row(*_ranges(result), style="dim")
    # rich would keep bold and dim with NO_COLOR.
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    console = Console(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else WIDTH,
        color_system=None if plain else "auto",
        highlight=False,
    )
    with console.capture() as capture:
        console.print(rows)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _n_runs(report: dict[str, Any]) -> set[int]:
    """How many runs the cases have."""
    return {len(result["decode_tps"]["runs"]) for result in report["results"]}


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    ours = result["engine"] == "mlxkv"
    return (
        f"{result['context']:,}",
        str(result["batch"]),
        result["engine"],
        _number(result["prefill_tps"]["median"]),
        _number(result["decode_tps"]["median"]),
        _number(result["first_token_s"]["median"]),
        human_bytes(round(result["peak_bytes"]["median"])),
        human_bytes(result["plan_bytes"]) if ours else "",
    )


def _ranges(result: dict[str, Any]) -> tuple[str, ...]:
    # The first token's range is the inverse of prefill's.
    of = (result["prefill_tps"], result["decode_tps"])
    return ("", "", "", *(f"{_short(x['min'])}..{_short(x['max'])}" for x in of), "", "", "")


def _number(value: float) -> str:
    """Three significant digits of a large number, two of one below 1."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else _number(value)


def legend(report: dict[str, Any]) -> str:
    """What the columns mean."""
    lengths = dict.fromkeys(
        (r["context"], r["prompt_tokens"], r["used_tokens"]) for r in report["results"]
    )
    runs = _n_runs(report)
    lines = [
        "Prefill: until each sequence has its first token. Decode: after that, all",
        "sequences together. Peak: MLX's memory, weights included. Plan: the peak by",
        "`mlxkv plan`.",
        *(
            f"Context {context:,}: prompts of {prompt:,} tokens, {used:,} with the answer."
            for context, prompt, used in lengths
        ),
    ]
    if max(runs) > 1:
        # After Ctrl-C some cases have a run more than others.
        n = f"{min(runs)} to {max(runs)}" if len(runs) > 1 else f"{max(runs)}"
        lines.insert(0, f"Medians of {n} runs; below them the smallest and the largest.")
    return "\n".join(lines)


def plot(report: dict[str, Any]) -> str:
    """Decode tokens/s as bars; "" where there is one at most."""
    results = report["results"]
    if len(results) < 2:
        return ""
    top = max(result["decode_tps"]["median"] for result in results)
    label = [f"{r['context']:>7,} x {r['batch']:<2} {r['engine']:<6}" for r in results]
    lines = ["decode, tokens/s (context x batch)", ""]
    for name, result in zip(label, results, strict=True):
        speed = result["decode_tps"]["median"]
        lines.append(f"{name}  {'#' * max(1, round(BAR * speed / top))} {_number(speed)}")
    return "\n".join(lines)
