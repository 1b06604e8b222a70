"""Time to the first token of the turn behind a tool's result, with and without idle compute.

    python -m benchmarks.tool_loop TEMPLATES TOKENIZERS --output benchmarks/results/tool-loop

TEMPLATES and TOKENIZERS as for `benchmarks.turns`. A random model with a family's real template
and tokenizer writes one call, known beforehand: reasoning, and a text of some 1,000 tokens as an
argument. The client sends it back without reasoning, with the tool's result, and asks for one
token: its time is the whole request's, over OpenAI's API in this process. The tool takes as long as
idle compute does, and that time is shown. Off and on take turns (off on, on off ...), each run in a
conversation of its own; all are medians, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.scripted import scripted
from benchmarks.turns import LISTING, SYSTEM, THOUGHT, Client, write_model
from benchmarks.turns_families import FAMILIES, Family, Said

LINE = "    if config.get('limit', {0}) > {0}: return refuse(config, 'more than {0}')  # line {0}\n"


@dataclass(frozen=True, slots=True)
class Case:
    """What is called and answered.

    Args:
        name: of the row.
        n_lines: lines of the call's longest argument, of 30 to 40 tokens each.
        n_result: listings of 20 tokens or so in the result.
    """

    name: str
    n_lines: int
    n_result: int


CASES = (Case("long call, short result", 26, 1), Case("short call, long result", 1, 45))


@dataclass(frozen=True, slots=True)
class Run:
    """One conversation.

    Args:
        is_on: whether idle compute is full.
        first_s: time to the first token of turn 2.
        computed: tokens of its prompt that were computed then.
        prompt: all of them.
        ahead: those that were computed before.
        idle_s: how long the engine computed while the tool ran.
    """

    is_on: bool
    first_s: float
    computed: int
    prompt: int
    ahead: int
    idle_s: float


class Loop(Client):
    """A client that calls a tool once."""

    def turn(self, case: Case, number: int, is_on: bool) -> Run:
        """One conversation; `number` sets its prompt apart from all others."""
        arguments = {
            "path": "src/limits.py",
            "old": "100",
            "new": "".join(LINE.format(i) for i in range(case.n_lines)),
        }
        said = Said(THOUGHT * 3, "", ("replace", arguments))
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": f"Session {number}. {SYSTEM}"},
            {"role": "user", "content": "Refuse what is over the limit, please."},
        ]
        scripts = deque([self._encode(self._family.write(said)), self._encode("Done.")])
        with scripted(scripts):
            reply = self._ask(messages)["choices"][0]["message"]
            call_id = self._checked(reply, said)
            started = time.perf_counter()
            self._rest()
            idle_s = time.perf_counter() - started
            reply = {k: v for k, v in reply.items() if not k.startswith("reasoning")}
            result = {"role": "tool", "tool_call_id": call_id, "content": LISTING * case.n_result}
            started = time.perf_counter()
            usage = self._ask([*messages, reply, result], max_tokens=1)["usage"]
            first_s = time.perf_counter() - started
        told = usage["prompt_tokens_details"]
        computed, ahead = told["computed_tokens"], told.get("ahead_tokens", 0)
        return Run(is_on, first_s, computed, usage["prompt_tokens"], ahead, idle_s)


def measure(path: Path, family: Family, case: Case, n_pairs: int) -> list[tuple[Run, Run]]:
    """Pairs of a run without and one with idle compute; one before them is not counted."""
    clients = {is_on: Loop(path, family, is_on, False) for is_on in (False, True)}
    pairs: list[tuple[Run, Run]] = []
    try:
        for i in range(n_pairs + 1):
            order = (False, True) if i % 2 else (True, False)
            runs = {on: clients[on].turn(case, 2 * i + on, on) for on in order}
            if i:
                pairs.append((runs[False], runs[True]))
    finally:
        for client in clients.values():
            client.close()
    return pairs


def row(name: str, pairs: Sequence[tuple[Run, Run]]) -> str:
    """A row of the table."""
    off, on = zip(*pairs, strict=True)
    ratios = [after.first_s / before.first_s for before, after in pairs]

    def middle(runs: Sequence[Run], what: str) -> float:
        return statistics.median(getattr(run, what) for run in runs)

    return (
        f"| {name} | {middle(on, 'prompt'):,.0f} | {middle(off, 'computed'):,.0f} "
        f"| {middle(on, 'computed'):,.0f} | {middle(on, 'ahead'):,.0f} "
        f"| {1000 * middle(off, 'first_s'):,.0f} | {1000 * middle(on, 'first_s'):,.0f} "
        f"| {statistics.median(ratios):.2f} | {min(ratios):.2f}-{max(ratios):.2f} "
        f"| {1000 * middle(on, 'idle_s'):,.0f} |"
    )


HEADER = (
    "| | prompt 2 | computed, off | on | computed before | first token, off, ms | on, ms | ratio "
    "| range | idle, ms |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def write(output: Path, rows: Sequence[str], raw: dict[str, Any]) -> None:
    """The table and all runs so far."""
    output.with_suffix(".md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    output.with_suffix(".json").write_text(json.dumps(raw) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("templates", type=Path)
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("--families", nargs="*", default=["Qwen3", "GPT-OSS"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--output", type=Path, help="where to write NAME.json and NAME.md")
    args = parser.parse_args()
    print(HEADER, flush=True)
    rows, raw = [HEADER], {}
    for family in (x for x in FAMILIES if x.name in args.families):
        with tempfile.TemporaryDirectory() as folder:
            path = write_model(
                family, args.templates, args.tokenizers, Path(folder, "m"), args.layers, args.hidden
            )
            for case in CASES:
                name = f"{family.name}: {case.name}"
                pairs = measure(path, family, case, args.pairs)
                rows.append(row(name, pairs))
                raw[name] = [[asdict(run) for run in pair] for pair in pairs]
                print(rows[-1], flush=True)
                if args.output is not None:
                    write(args.output, rows, raw)


if __name__ == "__main__":
    main()
