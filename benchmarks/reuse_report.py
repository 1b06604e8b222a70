"""From raw turns to medians, verdicts, tables and a plot of the reuse benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import machine_lines
from benchmarks.reuse_engines import LRU, MLXKV, PROMPT_CACHE, SAVED, SERVER

ANEW = "mlxkv-anew"
"""mlxkv in a new process that finds nothing: what a restart is compared with."""

RIVALS = (PROMPT_CACHE, LRU, SERVER)
"""What finds a prefix by itself; `SAVED` is told where it ends and has no target."""

SHOWN = (MLXKV, PROMPT_CACHE, LRU, SERVER, SAVED, ANEW)
MOST_OVER_LEAST = 256
LEAST_SPEEDUP = 10.0
LEAST_RESTART_SPEEDUP = 5.0
COLOURS = dict(zip(SHOWN, ("C0", "C1", "C4", "C3", "C2", "0.5"), strict=True))


@dataclass(frozen=True, slots=True)
class Run:
    """One scenario with one engine.

    Args:
        engine: which.
        scenario: which.
        index: pairs it with the other engines' runs.
        blas: what served it.
        window: length of its shortest sliding window, None for none or unknown.
        processes: seconds of loading, warming up, preparing and closing, of each process.
        turns: `Measured` of each turn, as dictionaries.
    """

    engine: str
    scenario: str
    index: int
    blas: str
    window: int | None
    processes: list[dict[str, Any]]
    turns: list[dict[str, Any]]

    @classmethod
    def of(cls, engine: str, scenario: str, index: int, printed: Sequence[dict[str, Any]]) -> Run:
        """From what its processes printed."""
        turns = [turn for process in printed for turn in process["turns"]]
        rest = [{k: v for k, v in p.items() if k not in ("turns", "blas")} for p in printed]
        blas = ", ".join(sorted({p["blas"] for p in printed}))
        return cls(engine, scenario, index, blas, printed[0]["window"], rest, turns)


@dataclass(frozen=True, slots=True)
class Row:
    """One turn of one scenario, medians over runs.

    Args:
        scenario, turn, label: which one.
        prompt_tokens: of mlxkv's prompt.
        least_tokens: those of them that had to be computed.
        most_over_least: tokens that mlxkv computed beyond that, in the run with the most.
        wrapped: the windows of what shares most with the prompt had moved on past its beginning.
        same_prompts: all engines got the same tokens in all runs.
        computed: tokens computed, by engine.
        first_token_s: by engine.
        ratios: an engine's time to first token over mlxkv's, of each pair of runs.
    """

    scenario: str
    turn: int
    label: str
    prompt_tokens: int
    least_tokens: int
    most_over_least: int
    wrapped: bool
    same_prompts: bool
    computed: dict[str, float]
    first_token_s: dict[str, float]
    ratios: dict[str, list[float]]

    def ratio(self, engine: str) -> float:
        return statistics.median(self.ratios[engine])


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, what was measured, and whether it was met; None where it does not apply."""

    target: str
    measured: str
    met: bool | None


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """One row for each turn that mlxkv was run on."""
    window = max((run.window or 0 for run in runs), default=0)
    turns: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for run in runs:
        for turn in run.turns:
            at = turns.setdefault((run.scenario, turn["turn"]), {})
            at.setdefault(run.engine, {})[run.index] = turn
    return [
        _row(scenario, by_engine, window)
        for (scenario, _), by_engine in sorted(turns.items(), key=lambda kv: kv[0][1])
        if MLXKV in by_engine
    ]


def _row(scenario: str, by_engine: dict[str, dict[int, dict[str, Any]]], window: int) -> Row:
    def median(engine: str, key: str) -> float:
        return statistics.median(turn[key] for turn in by_engine[engine].values())

    ours = by_engine[MLXKV]
    some = next(iter(ours.values()))
    engines = [engine for engine in SHOWN if engine in by_engine]
    prompts = {turn["prompt_sha256"] for of in by_engine.values() for turn in of.values()}
    return Row(
        scenario,
        some["turn"],
        some["label"],
        some["prompt_tokens"],
        some["least_tokens"],
        max(turn["computed_tokens"] - turn["least_tokens"] for turn in ours.values()),
        0 < window <= some["held_tokens"],
        len(prompts) == 1,
        {engine: median(engine, "computed_tokens") for engine in engines},
        {engine: median(engine, "first_token_s") for engine in engines},
        {
            engine: [
                by_engine[engine][i]["first_token_s"] / ours[i]["first_token_s"]
                for i in sorted(by_engine[engine].keys() & ours.keys())
            ]
            for engine in engines
            if engine != MLXKV and by_engine[engine].keys() & ours.keys()
        },
    )


def by_scenario(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.scenario, []).append(row)
    return found


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The targets, one after the other."""
    found = []
    if rows:
        worst = max(rows, key=lambda row: row.most_over_least)
        found.append(
            Verdict(
                f"at most {MOST_OVER_LEAST} tokens computed over the least possible, any turn",
                f"{worst.most_over_least} ({worst.scenario}, {worst.label}); {len(rows)} turns",
                worst.most_over_least <= MOST_OVER_LEAST,
            )
        )
    for rival in RIVALS:
        wrapped = [row for row in rows if row.wrapped and rival in row.ratios]
        wanted = f"first token >= {LEAST_SPEEDUP:g}x sooner than {rival}, windows wrapped"
        # The target is about all of them; where the rival could not go on is said beside it.
        lost = [r for r in wrapped if r.computed[rival] - r.least_tokens > MOST_OVER_LEAST]
        groups = {"all": wrapped, "where it lost its KV": lost, **by_scenario(wrapped)}
        for name, members in groups.items():
            if members:
                found.append(_speedup(f"{wanted}: {name}", members, rival))
        if not wrapped and any(rival in row.ratios for row in rows):
            found.append(Verdict(wanted, "no turn behind a wrapped window", None))
    return found + _restart_verdicts(rows)


def _speedup(target: str, rows: Sequence[Row], rival: str) -> Verdict:
    ratios = [row.ratio(rival) for row in rows]
    enough = sum(ratio >= LEAST_SPEEDUP for ratio in ratios)
    return Verdict(
        target,
        f"{enough} of {len(ratios)} turns; median {statistics.median(ratios):.1f}x, "
        f"{min(ratios):.1f} to {max(ratios):.1f}",
        enough == len(ratios),
    )


def _restart_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for row in rows:
        if ANEW not in row.ratios:
            continue
        own = row.ratio(ANEW)
        target = f"restart to first token >= {LEAST_RESTART_SPEEDUP:g}x faster than prefill"
        s = {engine: f"{seconds:.3f} s" for engine, seconds in row.first_token_s.items()}
        found.append(
            Verdict(
                f"{target}, {row.prompt_tokens} tokens",
                f"{own:.1f}x ({s[MLXKV]}, anew {s[ANEW]})",
                own >= LEAST_RESTART_SPEEDUP,
            )
        )
        others = [engine for engine in (*RIVALS, SAVED) if engine in row.ratios]
        for engine in others:
            measured = f"{row.ratio(engine):.1f}x ({s[MLXKV]}, {engine} {s[engine]})"
            found.append(Verdict(f"the same against {engine}", measured, None))
    return found


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """What is written beside the raw runs."""
    rows = rows_of(runs)
    return {
        "blas": sorted({run.blas for run in runs}),
        "window": max((run.window or 0 for run in runs), default=0) or None,
        "rows": [asdict(row) for row in rows],
        "verdicts": [asdict(verdict) for verdict in verdicts(rows)],
    }


def markdown(written: dict[str, Any]) -> str:
    """What it was measured on, verdicts, one line a scenario, and one line a turn."""
    rows = by_scenario(Row(**row) for row in written["rows"])
    lines = [*_header(written), "| target | measured | |", "|---|---|---|"]
    for verdict in written["verdicts"]:
        state = {None: "", True: "met", False: "**missed**"}[verdict["met"]]
        lines.append(f"| {verdict['target']} | {verdict['measured']} | {state} |")
    lines += ["", "## Scenarios", "", *_scenario_table(rows, written["runs"])]
    for name, members in rows.items():
        lines += ["", f"## {name}", "", *_turn_table(members)]
    return "\n".join(lines) + "\n"


def _header(written: dict[str, Any]) -> list[str]:
    settings, rows = written["settings"], written["rows"]
    sizes = " ".join(f"{name}={n}" for name, n in settings["sizes"].items())
    return [
        f"# Prefix reuse: {written['model']}",
        "",
        *machine_lines(written),
        f"- BLAS: {'; '.join(written['blas'])}, {settings['threads']} threads; "
        f"weights {settings['weights']} for all; window {written['window'] or 'none'}",
        f"- {settings['runs']} runs; sizes {sizes}",
        f"- the same prompt tokens for all engines in {sum(r['same_prompts'] for r in rows)} "
        f"of {len(rows)} turns",
        f"- commit {written['commit']}",
        f"- `{written['command']}`",
        "",
        "Medians over runs; a ratio is an engine's time to first token over mlxkv's, the median "
        "over pairs of runs.",
        "",
    ]


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return lines + ["| " + " | ".join(cells) + " |" for cells in body]


def _scenario_table(rows: dict[str, list[Row]], runs: Sequence[dict[str, Any]]) -> list[str]:
    """Sums over all turns but the first, which nothing can be reused for."""
    head = ["", "engine", "computed", "least", "first token s", "to mlxkv", "all turns s"]
    body = []
    for name, members in rows.items():
        later = [row for row in members if row.turn > 0]
        for engine in SHOWN:
            of = [row for row in later if engine in row.computed]
            if not of:
                continue
            ratios = [row.ratio(engine) for row in of if engine in row.ratios]
            sums = [
                sum(turn["total_s"] for turn in run["turns"])
                for run in runs
                if (run["engine"], run["scenario"]) == (engine, name)
            ]
            body.append(
                [
                    name,
                    engine,
                    f"{sum(row.computed[engine] for row in of):.0f}",
                    f"{sum(row.least_tokens for row in of)}",
                    f"{statistics.median(row.first_token_s[engine] for row in of):.3f}",
                    f"{statistics.median(ratios):.2f}" if ratios else "",
                    f"{statistics.median(sums):.1f}",
                ]
            )
    note = "Without each scenario's first turn; first token and ratio are medians over turns."
    return [note, "", *_table(head, body)]


def _turn_table(rows: Sequence[Row]) -> list[str]:
    engines = [e for e in SHOWN if any(e in row.computed for row in rows)]
    rivals = [e for e in engines if e != MLXKV]

    head = ["turn", "prompt", "least"]
    head += [f"{e} tokens" for e in engines] + [f"{e} s" for e in engines]
    head += [f"{e} ratio" for e in rivals]
    body = []
    for row in rows:
        cells = [row.label + " (wrapped)" * row.wrapped]
        cells += [str(row.prompt_tokens), str(row.least_tokens)]
        cells += [f"{row.computed[e]:.0f}" if e in row.computed else "" for e in engines]
        cells += [f"{row.first_token_s[e]:.3f}" if e in row.computed else "" for e in engines]
        cells += [f"{row.ratio(e):.1f}" if e in row.ratios else "" for e in rivals]
        body.append(cells)
    return _table(head, body)


def plot(written: dict[str, Any], path: Path) -> None:
    """Time to first token and tokens computed, turn by turn, a line of plots a scenario."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mlxkv"
    import matplotlib.pyplot as plt

    rows = by_scenario(Row(**row) for row in written["rows"])
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(10, 2.4 * len(rows) + 1.2), squeeze=False, layout="constrained"
    )
    for (name, members), (seconds, tokens) in zip(rows.items(), axes, strict=True):
        _lines(seconds, members, "first_token_s")
        _lines(tokens, members, "computed")
        turns = [row.turn + 1 for row in members]
        tokens.plot(turns, [row.least_tokens for row in members], "k_", label="least possible")
        seconds.set_title(f"{name}: seconds to first token", fontsize=9, loc="left")
        tokens.set_title(f"{name}: tokens computed", fontsize=9, loc="left")
        tokens.set_xlabel("turn", fontsize=8)
    handles = {
        label: line
        for axis in axes[:, 1]
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    report.save(figure, written, path)


def _lines(axis: Any, rows: Sequence[Row], what: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for engine in reversed(SHOWN):  # mlxkv above the others, where they meet
        points = [(r.turn + 1, getattr(r, what)[engine]) for r in rows if engine in r.computed]
        if points:
            style = "x" if engine == ANEW else "o-"
            axis.plot(*zip(*points, strict=True), style, color=COLOURS[engine], ms=4, label=engine)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    axis.set_xticks([row.turn + 1 for row in rows])
