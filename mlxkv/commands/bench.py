"""`mlxkv bench`: its options, and what is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mlxkv.commands.options import Adapters, Memory, takes
from mlxkv.errors import INTERRUPTED, ContextExceeded, MlxkvError, UsageError
from mlxkv.kv.types import layer_types

if TYPE_CHECKING:
    from mlxkv.bench.cases import Case, Skipped
    from mlxkv.bench.drafts import Row
    from mlxkv.bench.rounds import Rounds
    from mlxkv.store.adapters import AdapterRef
    from mlxkv.store.settings import Settings
    from mlxkv.terminal.console import ProgressLine

GPU_CONTEXTS, CPU_CONTEXTS, CPU_CONTEXTS_VS = (0, 2048, 8192), (0, 512), (0, 128)
GPU_BATCHES, CPU_BATCHES, CPU_BATCHES_VS = (1, 4), (1, 4), (1,)
GPU_TOKENS, CPU_TOKENS = 128, 16
"""Defaults. On the CPU backend the default model takes two minutes on two idle cores (129 s of CPU
time; 88 s beside mlx-lm, which prefills quantized weights at 9 tokens/s there)."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Of the command line; made by `takes`."""

    model: str | None = typer.Argument(
        None, metavar="[MODEL]", help="As for run; default: the default model."
    )
    context: str | None = typer.Option(
        None, help="Tokens of the prompts, such as 0,2048,8192; 0: the shortest prompt."
    )
    batch: str | None = typer.Option(None, help="Sequences at a time, such as 1,4.")
    tokens: int | None = typer.Option(None, help="Decode steps that are timed.")
    repeat: int = typer.Option(3, help="Runs of each case; the median is shown.")
    vs: str | None = typer.Option(None, metavar="mlx-lm", help="Measure mlx-lm in turn with mlxkv.")
    kv_type: str = typer.Option("native", help="Format of mlxkv's KV: native, q8, k8v4 or q4.")
    draft: bool = typer.Option(
        False, "--draft", help="Measure drafts instead: tasks with them and without, in turn."
    )
    drafter: str = typer.Option(
        "lookup",
        metavar="auto|lookup|mtp|MODEL",
        help="With --draft: what drafts, see `mlxkv run --draft`.",
    )
    memory: Memory = None
    adapter: Adapters = None
    report: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="The report; default: mlxkv-bench-CHIP-MODEL.json in the current folder.",
    )
    as_json: bool = typer.Option(False, "--json", help="Print the report instead of the table.")
    plot: bool = typer.Option(True, "--plot/--no-plot", help="Draw bars as well.")


@takes(BenchOptions)
def bench(options: BenchOptions) -> int:
    """Measure how fast a model is on this machine, and write a report to share.

    Prefill and decode in tokens/s, time to the first token, and peak memory beside the plan's,
    for prompts of exact lengths. The report names the chip, the versions and the model's sizes; no
    paths, users, hosts or prompts.
    """
    from mlxkv.store import catalog

    o = options
    if o.draft:
        return _bench_drafts(o, o.model or catalog.DEFAULT.name)
    if o.vs is not None:
        _check_vs(o.vs)
    kv_type = str(layer_types(o.kv_type))
    if o.vs is not None and kv_type != "native":
        raise UsageError("--vs mlx-lm needs --kv-type native: mlx-lm batches no quantized KV")
    if o.vs is not None and o.adapter:
        raise UsageError("--vs mlx-lm measures models without --adapter")
    asked = Asked(
        o.model or catalog.DEFAULT.name,
        _numbers("--context", o.context, least=0),
        _numbers("--batch", o.batch, least=1),
        _at_least_one("--tokens", o.tokens),
        _at_least_one("--repeat", o.repeat) or 1,
        ("mlxkv", "mlx-lm") if o.vs else ("mlxkv",),
        kv_type,
        o.memory,
        tuple(o.adapter or ()),
    )
    return _bench(asked, o.report, as_json=o.as_json, plot=o.plot)


def _bench_drafts(o: BenchOptions, name: str) -> int:
    """Measure drafts on this model: what `--draft` is good for here."""
    from mlxkv.base import device
    from mlxkv.bench import drafts
    from mlxkv.llm.llm import load
    from mlxkv.terminal.console import ProgressLine

    for option, value in (("--context", o.context), ("--batch", o.batch), ("--vs", o.vs)):
        if value is not None:
            raise UsageError(f"{option} says nothing with --draft: its prompts are tasks")
    if o.drafter == drafts.OFF:
        raise UsageError("--drafter must be auto, lookup, mtp or a model's name; got 'off'")
    n_tokens = _at_least_one("--tokens", o.tokens) or (64 if device.on_cpu() else 200)
    n_runs, progress, runs = _at_least_one("--repeat", o.repeat) or 1, ProgressLine(), []
    complete = True
    progress("loading")
    try:
        with load(
            name, memory=o.memory, kv_type=o.kv_type, draft=o.drafter, adapter=o.adapter
        ) as llm:
            jobs = drafts.jobs_for(llm, 0.0, n_tokens)
            for i, (task, make) in enumerate(jobs.items()):
                progress(f"{i + 1} of {len(jobs)}  {task}")
                modes = drafts.OFF, o.drafter
                try:
                    runs += drafts.compared(task, make, modes, n_runs, temperature=0.0)
                except ContextExceeded as error:
                    progress.clear()
                    said = f"{error.n_tokens:,} tokens, and the context is {error.context:,}"
                    print(f"not measured: {task}: a prompt has {said}", file=sys.stderr)
    except KeyboardInterrupt:
        complete = False
    finally:
        progress.clear()
    if runs:
        _show_drafts(o, drafts.rows(runs))
    elif complete:
        raise UsageError(f"no task fits the context of {name}")
    return 0 if complete else INTERRUPTED


def _show_drafts(o: BenchOptions, rows: Sequence[Row]) -> None:
    from mlxkv.bench import drafts, machine
    from mlxkv.bench import report as reports

    found = {**machine.about(), "drafter": o.drafter, "rows": [asdict(row) for row in rows]}
    if o.report is not None:
        reports.write(found, o.report)
    print(json.dumps(found, indent=1) if o.as_json else drafts.text(rows), flush=True)


@dataclass(frozen=True, slots=True)
class Asked:
    """The values of the command line; None is the device's default."""

    model: str
    contexts: tuple[int, ...] | None
    batches: tuple[int, ...] | None
    n_timed: int | None
    repeat: int
    engines: tuple[str, ...]
    kv_type: str
    memory: str | None
    adapters: tuple[str, ...] = ()


def _check_vs(vs: str) -> None:
    from importlib.util import find_spec

    if vs != "mlx-lm":
        raise UsageError(f"--vs must be mlx-lm; got {vs!r}")
    if find_spec("mlx_lm") is None:
        raise UsageError("--vs mlx-lm: it is not installed; pip install mlx-lm")


def _numbers(option: str, text: str | None, *, least: int) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
        raise UsageError(
            f"{option} must be whole numbers of {least} or more, with commas between; got {text!r}"
        )
    return tuple(sorted({int(part) for part in parts}))


def _at_least_one(option: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise UsageError(f"{option} must be 1 or more; got {value}")
    return value


def _bench(asked: Asked, file: Path | None, *, as_json: bool, plot: bool) -> int:
    from mlxkv.bench import report as reports
    from mlxkv.bench.rounds import Rounds
    from mlxkv.terminal.console import ProgressLine

    progress, rounds = ProgressLine(plain=True), Rounds()
    try:
        setup = _prepare(asked, progress)
        file = file or reports.default_path(setup.machine["machine"], setup.model)
        reports.check_writable(file)
        progress.clear()
        for entry in setup.skipped:
            print(entry, file=sys.stderr)
        _warn_if_busy(setup.machine["machine"])
        complete = _measure(asked, setup, rounds, progress)
    finally:
        progress.clear()
    if not rounds.timings:
        return _nothing(rounds, complete)
    report = reports.build(
        machine=setup.machine,
        model=setup.model,
        settings=setup.settings,
        cases=setup.cases,
        engines=asked.engines,
        rounds=rounds,
        skipped=setup.skipped,
        complete=complete,
    )
    try:
        _show(report, as_json=as_json, plot=plot)
    finally:  # also if the reader of a pipe has gone
        code = _end(report, rounds, file, complete)
    return code


def _warn_if_busy(machine: dict[str, Any]) -> None:
    if machine["load"] > machine["cores"] / 2:
        load = f"load {machine['load']} on {machine['cores']} cores"
        print(f"this machine is busy ({load}), which lowers the figures", file=sys.stderr)


def _nothing(rounds: Rounds, complete: bool) -> int:
    """The exit code where nothing was measured; raises what went wrong."""
    failure = next(iter(rounds.failed.values()), None)
    if complete and failure is not None:
        raise MlxkvError(f"nothing could be measured: {failure.text}")
    return INTERRUPTED


def _show(report: dict[str, Any], *, as_json: bool, plot: bool) -> None:
    from mlxkv.bench import display

    if as_json:
        print(json.dumps(report, indent=1))
        return
    parts = [display.head(report), display.table(report), display.legend(report)]
    if plot and (drawn := display.plot(report)):
        parts.append(drawn)
    print("\n\n".join(parts), flush=True)


def _end(report: dict[str, Any], rounds: Rounds, file: Path, complete: bool) -> int:
    """Write the file and say on stderr what went wrong; the exit code."""
    from mlxkv.bench import report as reports

    for (case, engine), failure in rounds.failed.items():
        where = f"context {case.context:,}, batch {case.batch}"
        print(f"{engine} failed: {where}: {failure.text}", file=sys.stderr)
    for engine, failure in rounds.unusable.items():
        print(f"{engine} cannot load the model: {failure.text}", file=sys.stderr)
    reports.write(report, file)
    print(f"report: {file}; please attach it to an issue", file=sys.stderr)
    if not complete:
        return INTERRUPTED
    return int(any(engine == "mlxkv" for _, engine in rounds.failed))


@dataclass(frozen=True, slots=True)
class Setup:
    """What is known before the first measurement; `machine` to `settings` are the report's."""

    path: Path
    effective: Settings
    cases: Sequence[Case]
    skipped: Sequence[Skipped]
    machine: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    adapters: Sequence[AdapterRef] = ()


def _prepare(asked: Asked, progress: ProgressLine) -> Setup:
    """Find the model and choose the cases; nothing is loaded.

    Raises:
        UsageError: nothing of what is asked for can be measured.
    """
    from mlxkv.bench import machine
    from mlxkv.bench import report as reports
    from mlxkv.bench.cases import Planner
    from mlxkv.store import resolve
    from mlxkv.store.adapters import adapter_refs
    from mlxkv.store.info import describe
    from mlxkv.store.settings import COMMAND_LINE, Given, effective

    given = Given(kv_type=asked.kv_type, memory=asked.memory, origin=COMMAND_LINE)
    path = resolve.resolve(asked.model, report=progress)
    adapters = adapter_refs(asked.adapters)
    progress("planning")
    settings = effective(path, given)
    contexts, batches, n_timed = _with_defaults(asked)
    cases, skipped = Planner(path, settings, adapters).choose(contexts, batches, n_timed)
    if not cases:
        raise UsageError(f"nothing can be measured: {skipped[0].reason}")
    return Setup(
        path=path,
        effective=settings,
        cases=cases,
        skipped=skipped,
        machine=machine.about(),
        model=reports.model_facts(asked.model, describe(asked.model, path)),
        settings={
            "contexts": contexts,
            "batches": batches,
            "timed_steps": n_timed,
            "repeat": asked.repeat,
            "engines": asked.engines,
            "kv_type": asked.kv_type,
            "memory_limit_bytes": settings.memory.value,
            "context_limit": settings.context.value,
            **({"adapters": len(adapters)} if adapters else {}),
        },
        adapters=adapters,
    )


def _with_defaults(asked: Asked) -> tuple[Sequence[int], Sequence[int], int]:
    """Contexts, batches and timed steps."""
    from mlxkv.base import device

    contexts, batches, n_timed = GPU_CONTEXTS, GPU_BATCHES, GPU_TOKENS
    if device.on_cpu():
        contexts, batches, n_timed = CPU_CONTEXTS, CPU_BATCHES, CPU_TOKENS
        if len(asked.engines) > 1:
            contexts, batches = CPU_CONTEXTS_VS, CPU_BATCHES_VS
    return asked.contexts or contexts, asked.batches or batches, asked.n_timed or n_timed


def _measure(asked: Asked, setup: Setup, rounds: Rounds, progress: ProgressLine) -> bool:
    """Fill `rounds`; whether all was measured, False after Ctrl-C."""
    from mlxkv.bench.cases import prompts
    from mlxkv.bench.rounds import Task, run
    from mlxkv.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(setup.path)
    task = Task(
        str(setup.path),
        asked.kv_type,
        setup.effective.memory.value,
        {case: prompts(tokenizer, case.n_prompt, case.batch) for case in setup.cases},
        [(str(ref.path), ref.weight) for ref in setup.adapters],
    )
    n_all = len(setup.cases) * len(asked.engines) * asked.repeat

    def note(what: str) -> None:
        n_done = sum(map(len, rounds.timings.values()))
        progress(f"{n_done + 1} of {n_all}  {what}")

    try:
        run(task, asked.engines, asked.repeat, rounds, note)
    except KeyboardInterrupt:
        return False
    return True
