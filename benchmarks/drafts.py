"""Decoding with and without drafts: `python -m benchmarks.drafts --model NAME --output NAME`.

One process; for each task and temperature the two take turns, and a ratio is the median over pairs
of runs. Earlier answers are forgotten before each run, but for the task that asks a second time.
Answers are compared token by token. CPU time of all threads is a second opinion where the machine
is busy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlxkv
from benchmarks.report import about, keep, machine_lines
from mlxkv.generation.outputs import Result
from mlxkv.llm.llm import LLM

MODES = ("off", "lookup")
TEMPERATURES = (0.0, 0.8)
FUNCTIONS = "\n\n".join(
    f"def area_{i}(width_{i}, height):\n"
    f"    total = width_{i} * {i + 2} + height\n"
    f"    if total > {i * 7 + 3}:\n"
    f"        return total - {i}\n"
    f"    return height"
    for i in range(17)
)
TEXT = (
    "The lighthouse at Cape Norwin was built in 1847 by the engineer Ada Fenwick. Its tower is 41 "
    "metres high, and its lamp can be seen 22 miles away. In 1903 a storm broke the lens, and for "
    "eleven months a lamp on a raft took its place. The last keeper, Tomas Greel, left in 1986. "
    "Since then a museum in the keeper's house shows the broken lens, the log books and the raft."
)
SCHEMA = {
    "type": "object",
    "properties": {
        name: {"type": "string", "maxLength": 12}
        for name in (
            "full_name_of_the_lighthouse_keeper",
            "year_in_which_the_tower_was_built",
            "height_of_the_tower_in_metres",
            "name_of_the_engineer_of_the_tower",
            "distance_at_which_the_lamp_can_be_seen",
        )
    },
    "additionalProperties": False,
}
SCHEMA["required"] = list(SCHEMA["properties"])  # pyright: ignore[reportArgumentType]
TOOL_RESULT = json.dumps(
    {"files": [{"path": f"src/module_{i}/handlers.py", "lines": 40 + i} for i in range(12)]}
)


def said(text: str) -> list[dict[str, Any]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked.

    Args:
        name: of the row.
        prompt: measured.
        before: asked and answered first.
        options: of the answer.
        target: the ratio wanted, at least.
    """

    name: str
    prompt: str | list[dict[str, Any]]
    target: float
    before: list[dict[str, Any]] | None = None
    options: tuple[tuple[str, Any], ...] = ()


TASKS = (
    Task(
        "rewrite a file with one change",
        # A text that has begun: asked for it, a small model talks about the file.
        f"{FUNCTIONS}\n\n\n# The same again, with area_3 renamed to area_three:\n"
        + "\n\n".join(FUNCTIONS.split("\n\n")[:4]).replace("area_3", "area_three")
        + "\n\n",
        3.0,
    ),
    Task(
        "second answer about a text",
        said(f"Say once more, in your own words, what this text tells.\n\n{TEXT}"),
        2.5,
        said(f"Say in your own words what this text tells.\n\n{TEXT}"),
    ),
    Task(
        "JSON by schema, long keys",
        said(f"Fill in the fields.\n\n{TEXT}"),
        2.0,
        options=(("format", SCHEMA),),
    ),
    Task(
        "tool results quoted back",
        [
            *said("Which files are there? List each path with its number of lines."),
            {"role": "assistant", "content": "I call list_files."},
            {"role": "user", "content": f"Result of list_files:\n{TOOL_RESULT}"},
            {"role": "assistant", "content": "- src/module_0/handlers.py: 40 lines\n"},
        ],
        1.8,
    ),
    Task("free text", said("Tell a story about a lighthouse keeper and a storm."), 0.98),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One answer, or four together.

    Args:
        tps: tokens a second, of decoding alone for one answer.
        cpu_ms: CPU time a token, of all threads, prefill included.
        tokens_a_pass: of all answers.
    """

    task: str
    temperature: float
    mode: str
    index: int
    tps: float
    first_token_s: float
    cpu_ms: float
    tokens_a_pass: float
    same: bool = True


def answers(llm: LLM, task: Task, mode: str, temperature: float, n_tokens: int) -> list[Result]:
    """The answer to a task, nothing of earlier ones known but what it asks for first."""
    options = {"max_tokens": n_tokens, "temperature": temperature, "seed": 7, "draft": mode}
    llm.drafting.forget()
    if task.before is not None:
        llm.generate(task.before, **options)
    return [llm.generate(task.prompt, **options, **dict(task.options))]


def streams(llm: LLM, mode: str, temperature: float, n_tokens: int) -> list[Result]:
    """Four tasks at a time."""
    llm.drafting.forget()
    prompts = [task.prompt for task in TASKS if not task.options]
    return llm.generate(prompts, max_tokens=n_tokens, temperature=temperature, seed=7, draft=mode)


def measured(make: Callable[[], list[Result]], **about: Any) -> tuple[Run, list[list[int]]]:
    """Times of answers, and their tokens."""
    started, cpu = time.perf_counter(), time.process_time()
    found = make()
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    stats = [each.stats for each in found]
    n = sum(each.generated_tokens for each in stats)
    tps = stats[0].decode_tps if len(stats) == 1 else n / wall
    n_passes = sum(each.generated_tokens / each.tokens_a_pass for each in stats)
    first = max(each.first_token_s for each in stats)
    run = Run(
        **about, tps=tps, first_token_s=first, cpu_ms=1e3 * cpu / n, tokens_a_pass=n / n_passes
    )
    return run, [each.tokens for each in found]


def compared(llm: LLM, name: str, make: Callable[[str], list[Result]], n_runs: int, **about: Any):
    """Runs of both modes in turns, the first of each thrown away."""
    runs = []
    for index in range(-1, n_runs):
        tokens = {}
        for mode in MODES if index % 2 else MODES[::-1]:
            run, tokens[mode] = measured(
                lambda mode=mode: make(mode), task=name, mode=mode, index=index, **about
            )
            runs.append(run)
        same = tokens["off"] == tokens["lookup"]
        runs[-2:] = [Run(**{**asdict(run), "same": same}) for run in runs[-2:]]
    return [run for run in runs if run.index >= 0]


def table(runs: Sequence[Run]) -> str:
    """Medians and ratios of each task, as Markdown."""
    wanted = {task.name: task.target for task in TASKS} | {"4 streams": 1.3}
    lines = [
        "| task | temperature | off tok/s | lookup tok/s | ratio | wanted | CPU time a token | "
        "tokens a pass | same tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, temperature in dict.fromkeys((run.task, run.temperature) for run in runs):
        own = [run for run in runs if (run.task, run.temperature) == (task, temperature)]
        by = {mode: [run for run in own if run.mode == mode] for mode in MODES}
        ratio, cpu = (
            statistics.median(
                getattr(b, name) / getattr(a, name)
                for a, b in zip(by["off"], by["lookup"], strict=True)
            )
            for name in ("tps", "cpu_ms")
        )
        off, lookup = (statistics.median(run.tps for run in by[mode]) for mode in MODES)
        passes = statistics.median(run.tokens_a_pass for run in by["lookup"])
        same = f"{sum(run.same for run in by['lookup'])} of {len(by['lookup'])}"
        lines.append(
            f"| {task} | {temperature} | {off:.1f} | {lookup:.1f} | {ratio:.2f} | "
            f"{wanted[task]:.2f} | {cpu:.2f} | {passes:.2f} | {same} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    llm, runs = mlxkv.load(args.model), []
    for temperature in args.temperatures:
        common = {"temperature": temperature, "n_runs": args.runs}
        for task in TASKS:
            runs += compared(
                llm,
                task.name,
                lambda mode, task=task, t=temperature: answers(llm, task, mode, t, args.tokens),
                **common,
            )
            print(table(runs).splitlines()[-1], flush=True)
        runs += compared(
            llm,
            "4 streams",
            lambda mode, t=temperature: streams(llm, mode, t, args.tokens),
            **common,
        )
        print(table(runs).splitlines()[-1], flush=True)
    written = about(Path(__file__).parent.parent, "benchmarks.drafts")
    written |= {"model": args.model, "runs": [asdict(run) for run in runs]}
    head = [f"# Drafts, {args.model}", "", *machine_lines(written), "", table(runs)]
    keep(args.output, written, "\n".join(head))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
