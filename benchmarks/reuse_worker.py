"""One engine, one process, some turns of one scenario: prints a JSON object on its last line.

Before the turns the engine answers two prompts about something else, so that kernels, compilers
and first pages are there; the seconds of that, and of loading, are told apart from the turns'.
What was said is kept in a transcript, so that another process can go on with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.reuse_engines import (
    LRU,
    MLXKV,
    PROMPT_CACHE,
    SAVED,
    SERVER,
    WARM_UP,
    Answer,
    Engine,
    Mlxkv,
)
from benchmarks.reuse_mlx_lm import Lru, PromptCache, Saved, Server
from benchmarks.reuse_scenarios import Scenario, Text, Turn, least_tokens, longest_shared

WARM_UP_TOKENS = 600

ENGINES: dict[str, type[Engine]] = {
    MLXKV: Mlxkv,
    PROMPT_CACHE: PromptCache,
    SERVER: Server,
    LRU: Lru,
    SAVED: Saved,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What one turn took.

    Args:
        turn: its number in the scenario.
        label: what was asked.
        prompt_tokens: of the prompt.
        least_tokens: those that had to be computed.
        computed_tokens: those that were.
        ssd_tokens: restored from disk.
        held_tokens: length of the sequence before that shares most with the prompt, 0 for none.
        first_token_s: from the call to the first token.
        total_s: from the call until the engine was ready again.
        answer_tokens: generated.
        prompt_sha256: of the prompt's token ids, shortened: equal ones are equal prompts.
    """

    turn: int
    label: str
    prompt_tokens: int
    least_tokens: int
    computed_tokens: int
    ssd_tokens: int
    held_tokens: int
    first_token_s: float
    total_s: float
    answer_tokens: int
    prompt_sha256: str


@dataclass(slots=True)
class Transcript:
    """What was sent and generated so far, over processes."""

    answers: list[str]
    sequences: list[list[int]]

    @classmethod
    def read(cls, path: Path) -> Transcript:
        if not path.exists():
            return cls([], [])
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def measure(self, number: int, turn: Turn, answer: Answer) -> Measured:
        """The figures of an answer, which is then known to later turns."""
        prompt = answer.sequence[: answer.prompt_tokens]
        measured = Measured(
            number,
            turn.label,
            answer.prompt_tokens,
            least_tokens(prompt, self.sequences),
            answer.computed_tokens,
            answer.ssd_tokens,
            longest_shared(prompt, self.sequences).held_tokens,
            answer.first_token_s,
            answer.total_s,
            len(answer.sequence) - answer.prompt_tokens,
            hashlib.sha256(array("i", prompt).tobytes()).hexdigest()[:16],
        )
        self.answers.append(answer.text)
        self.sequences.append(list(answer.sequence))
        return measured


def warm_up(engine: Engine, seed: int) -> float:
    """Answer a prompt past most windows, then the same with more behind it; seconds.

    Another seed for another process: what the first one kept must not be found by the second, or
    it would have nothing left to warm up with.
    """
    start = time.perf_counter()
    text = Text(lambda line: len(line) // 4, seed)
    prompt = text.lines(WARM_UP_TOKENS)
    answer = engine.answer(prompt, WARM_UP, 4)
    engine.answer(prompt + answer.text + text.lines(50), WARM_UP, 4)
    return time.perf_counter() - start


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, warm up, send the turns, close."""
    raw = json.loads(args.scenario.read_text(encoding="utf-8"))
    scenario = Scenario.from_dict(raw)
    transcript = Transcript.read(args.transcript)
    clock = time.perf_counter
    start = clock()
    engine = ENGINES[args.engine](args.model, args.state)
    timed = {"load_s": clock() - start, "warm_up_s": warm_up(engine, 100 + args.first)}
    start = clock()
    if scenario.fork is not None:
        engine.prepare(scenario.fork)
    timed["prepare_s"] = clock() - start
    turns = []
    for number in range(args.first, args.stop):
        turn = scenario.turns[number]
        prompt = turn.prompt(transcript.answers)
        answer = engine.answer(prompt, turn.conversation, args.answer_tokens)
        turns.append(transcript.measure(number, turn, answer))
        print(f"  {turns[-1]}", file=sys.stderr, flush=True)
    blas = engine.blas()
    start = clock()
    engine.close()
    timed["close_s"] = clock() - start
    transcript.write(args.transcript)
    return {"blas": blas, "window": engine.window, **timed, "turns": [asdict(t) for t in turns]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=tuple(ENGINES), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scenario", type=Path, required=True, help="a scenario as JSON")
    parser.add_argument("--first", type=int, required=True, help="turns from this number on ...")
    parser.add_argument("--stop", type=int, required=True, help="... and before this one")
    parser.add_argument("--answer-tokens", type=int, required=True)
    parser.add_argument("--transcript", type=Path, required=True, help="read and written")
    parser.add_argument("--state", type=Path, required=True, help="what outlasts the process")
    args = parser.parse_args()
    print(json.dumps(run(args)), flush=True)
    # mlx-lm leaves a step in flight, and OpenBLAS' exit handler can wait for it forever.
    os._exit(0)


if __name__ == "__main__":
    main()
