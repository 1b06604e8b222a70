"""Decoding with drafts and without, in turns, on tasks in which drafts help much, and one in which
they do not.

Earlier answers are forgotten before each run, but for the task that asks a second time. Answers are
compared token by token: drafts change none.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Result
from mlxkv.kv.types import take_drafts
from mlxkv.llm.llm import LLM

OFF = "off"
STREAMS = "4 streams"
"""The name of all tasks that have no format, answered together."""
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


Prompt = str | list[dict[str, Any]]
Job = Callable[[str], list[Result]]
"""(what drafts) -> answers."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked.

    Args:
        name: of the row.
        prompt: measured.
        before: asked and answered first.
        options: of the answer.
    """

    name: str
    prompt: Prompt
    before: list[dict[str, Any]] | None = None
    options: tuple[tuple[str, Any], ...] = ()


TASKS = (
    Task(
        "rewrite a file with one change",
        # A text that has begun: asked for it, a small model talks about the file.
        f"{FUNCTIONS}\n\n\n# The same again, with area_3 renamed to area_three:\n"
        + "\n\n".join(FUNCTIONS.split("\n\n")[:4]).replace("area_3", "area_three")
        + "\n\n",
    ),
    Task(
        "second answer about a text",
        said(f"Say once more, in your own words, what this text tells.\n\n{TEXT}"),
        said(f"Say in your own words what this text tells.\n\n{TEXT}"),
    ),
    Task(
        "JSON by schema, long keys",
        said(f"Fill in the fields.\n\n{TEXT}"),
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
    ),
    Task("free text", said("Tell a story about a lighthouse keeper and a storm.")),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One answer, or four together.

    Args:
        tps: tokens a second of decoding, those of several answers together summed up: one that
            is done early makes room for another, and is not to wait for the slowest.
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


def jobs_for(llm: LLM, temperature: float, n_tokens: int) -> dict[str, Job]:
    """What makes the answers of each task, and of some together; UsageError for a model that takes
    no drafts."""
    if not take_drafts(llm.model.cache_specs()):
        raise UsageError(f"{llm.path} takes no drafts: its states cannot be taken back")
    found: dict[str, Job] = {
        task.name: lambda mode, task=task: answers(llm, task, mode, temperature, n_tokens)
        for task in TASKS
    }
    return found | {STREAMS: lambda mode: streams(llm, mode, temperature, n_tokens)}


def answers(llm: LLM, task: Task, mode: str, temperature: float, n_tokens: int) -> list[Result]:
    """The answer to a task, nothing of earlier ones known but what it asks for first."""
    options = {"max_tokens": n_tokens, "temperature": temperature, "seed": 7, "draft": mode}
    llm.drafting.forget()
    if task.before is not None:
        llm.generate(_prompt(llm, task.before), **options)
    return [llm.generate(_prompt(llm, task.prompt), **options, **dict(task.options))]


def streams(llm: LLM, mode: str, temperature: float, n_tokens: int) -> list[Result]:
    """The tasks that have no format, all at a time."""
    llm.drafting.forget()
    prompts = [_prompt(llm, task.prompt) for task in TASKS if not task.options]
    return llm.generate(prompts, max_tokens=n_tokens, temperature=temperature, seed=7, draft=mode)


def _prompt(llm: LLM, prompt: Prompt) -> Prompt:
    """A conversation as text, for a model that has no chat template."""
    if isinstance(prompt, str) or llm.tokenizer.chat_template is not None:
        return prompt
    return "\n\n".join(str(message["content"]) for message in prompt) + "\n\n"


def measured(make: Callable[[], list[Result]], **about: Any) -> tuple[Run, list[list[int]]]:
    """Times of answers, and their tokens."""
    cpu = time.process_time()
    found = make()
    cpu = time.process_time() - cpu
    stats = [each.stats for each in found]
    n = sum(each.generated_tokens for each in stats)
    tps = sum(each.decode_tps for each in stats)
    n_passes = sum(each.generated_tokens / each.tokens_a_pass for each in stats)
    first = max(each.first_token_s for each in stats)
    run = Run(
        **about, tps=tps, first_token_s=first, cpu_ms=1e3 * cpu / n, tokens_a_pass=n / n_passes
    )
    return run, [each.tokens for each in found]


def compared(
    name: str,
    make: Job,
    modes: tuple[str, str],
    n_runs: int,
    **about: Any,
) -> list[Run]:
    """Runs in turns, the first of each thrown away.

    Args:
        name: of the task.
        make: makes the answers.
        modes: `off`, and another.
        n_runs: of each.
        about: fields of each run.
    """
    found = [pair(make, modes, index, task=name, **about) for index in range(-1, n_runs)]
    return [run for runs in found[1:] for run in runs]


def pair(make: Job, modes: tuple[str, str], index: int, **about: Any) -> list[Run]:
    """A run of each mode, which of them is first alternating with the index; for others `compared`.

    Args:
        make: makes the answers.
        modes: `off`, and another.
        index: of the runs.
        about: their other fields.
    """
    runs, tokens = [], {}
    for mode in modes if index % 2 else modes[::-1]:
        run, tokens[mode] = measured(lambda mode=mode: make(mode), mode=mode, index=index, **about)
        runs.append(run)
    same = tokens[modes[0]] == tokens[modes[1]]
    return [Run(**{**asdict(run), "same": same}) for run in runs]


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of a task at a temperature.

    Args:
        off_tps: tokens a second without drafts.
        tps: with.
        ratio: of both, the median over pairs of runs.
        cpu: the same of CPU time a token.
        first: the same of the time to the first token.
        tokens_a_pass: with drafts.
        n_same: pairs of equal answers.
        n_runs: pairs.
    """

    task: str
    temperature: float
    off_tps: float
    tps: float
    ratio: float
    cpu: float
    first: float
    tokens_a_pass: float
    n_same: int
    n_runs: int


def rows(runs: Sequence[Run]) -> list[Row]:
    """A row for each task and temperature, in the order of the runs."""
    found = []
    for task, temperature in dict.fromkeys((run.task, run.temperature) for run in runs):
        own = [run for run in runs if (run.task, run.temperature) == (task, temperature)]
        off = [run for run in own if run.mode == OFF]
        drafted = [run for run in own if run.mode != OFF]
        pairs = list(zip(off, drafted, strict=True))
        found.append(
            Row(
                task,
                temperature,
                statistics.median(run.tps for run in off),
                statistics.median(run.tps for run in drafted),
                statistics.median(b.tps / a.tps for a, b in pairs),
                statistics.median(b.cpu_ms / a.cpu_ms for a, b in pairs),
                statistics.median(b.first_token_s / a.first_token_s for a, b in pairs),
                statistics.median(run.tokens_a_pass for run in drafted),
                sum(run.same for run in drafted),
                len(pairs),
            )
        )
    return found


def text(found: Sequence[Row]) -> str:
    """The rows as a table for a terminal."""
    width = max(len(row.task) for row in found)
    lines = [f"{'TASK':{width}}  TEMP  OFF tok/s  DRAFTED tok/s  RATIO  TOKENS A PASS  SAME TOKENS"]
    lines += [
        f"{row.task:{width}}  {row.temperature:>4}  {row.off_tps:>9.1f}  {row.tps:>13.1f}  "
        f"{row.ratio:>5.2f}  {row.tokens_a_pass:>13.2f}  {f'{row.n_same} of {row.n_runs}':>11}"
        for row in found
    ]
    return "\n".join(lines)
