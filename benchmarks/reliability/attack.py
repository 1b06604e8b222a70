"""Attacks on `mlxkv serve` in random order, while honest clients are answered.

    python -m benchmarks.reliability.attack --model M --minutes 30 --output NAME

Honest clients ask in chats with one key, one request after the other, first in quiet, then under
attack; an attacker with another key tries what is in `attack_kinds`. What has to hold is in
`Record.checks`; the exit code is 1 where something does not. Writes NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from benchmarks.compare import ROOT, environment
from benchmarks.load_client import ANSWERED, Answer, Ask, ask, new_client, percentile
from benchmarks.load_server import MLXKV, Server
from benchmarks.options import add_machine_options
from benchmarks.reliability.attack_kinds import KINDS, Target, shuffled, unloads
from benchmarks.report import about

HONEST, ATTACKER = "honest-key", "attacker-key"
CLIENTS = 4
WORST_RATIO, WORST_GROWTH = 2.0, 0.05
WARM_S, SETTLE_S = 20.0, 60.0
IDLE_S = 5.0
"""From the last answer until the process is looked at: next turns are computed first."""


@dataclass(frozen=True, slots=True)
class State:
    """The server's process while nothing is asked.

    Args:
        bytes: resident, less the pages of prefixes, which fill their own bound.
        files, threads: open ones.
    """

    bytes: int
    files: int
    threads: int

    @classmethod
    def of(cls, server: Server) -> State:
        import psutil

        process = psutil.Process(server.process.pid)
        pages = sum(pages_of(server, key) for key in (HONEST, ATTACKER))
        own = process.memory_info().rss - pages
        return cls(own, process.num_fds(), process.num_threads())


def pages_of(server: Server, key: str) -> int:
    """Bytes of pages that a key holds in RAM."""
    headers = {"Authorization": f"Bearer {key}"}
    stats = httpx.get(f"{server.url}/stats.json", headers=headers, timeout=60, trust_env=False)
    return stats.json()["memory"]["pages"]


@dataclass(slots=True)
class Record:
    """What was seen.

    Args:
        tried: how often each kind was.
        statuses: what the server said to each kind, and how often; 0: nothing.
        spans: when each attack began and ended, by kind, on `time.perf_counter`'s clock.
        quiet, attacked: the honest clients' answers without and with attacks.
        right: name of each honest request -> its text, answered in quiet.
        before, after: the server's process, idle.
        deaths: how often the server ended.
        exit_code: at the end.
    """

    tried: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, dict[int, int]] = field(default_factory=dict)
    spans: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    quiet: list[Answer] = field(default_factory=list)
    attacked: list[Answer] = field(default_factory=list)
    right: dict[str, str] = field(default_factory=dict)
    before: State | None = None
    after: State | None = None
    deaths: int = 0
    exit_code: int | None = None

    @property
    def lost(self) -> list[Answer]:
        """Honest answers that did not end."""
        return [answer for answer in self.attacked if answer.outcome != ANSWERED]

    @property
    def wrong(self) -> list[Answer]:
        """Honest answers with another text than in quiet."""
        ended = (answer for answer in self.attacked if answer.outcome == ANSWERED)
        return [answer for answer in ended if answer.text != self.right[answer.name]]

    def gaps_beside(self, kind: str) -> list[float]:
        """Seconds between two pieces of honest answers while an attack of a kind ran."""
        spans = self.spans.get(kind, [])
        return [
            b - a
            for answer in self.attacked
            for a, b in zip(answer.piece_s, answer.piece_s[1:], strict=False)
            if any(start < answer.start_s + b and answer.start_s + a < end for start, end in spans)
        ]

    def checks(self) -> dict[str, tuple[bool, str]]:
        """What has to hold: whether it does, and the figures."""
        assert self.before is not None and self.after is not None
        quiet, attacked = gap_p99(self.quiet), gap_p99(self.attacked)
        growth = self.after.bytes / self.before.bytes - 1
        return {
            "the server lives": (self.deaths == 0, f"{self.deaths} deaths"),
            "no honest answer is lost": (not self.lost, f"{len(self.lost)} lost"),
            "no honest answer is wrong": (not self.wrong, f"{len(self.wrong)} wrong"),
            "p99 between pieces": (
                attacked <= WORST_RATIO * quiet,
                f"{1e3 * attacked:.0f} ms, in quiet {1e3 * quiet:.0f} ms",
            ),
            "memory": (
                growth <= WORST_GROWTH,
                f"{self.before.bytes >> 20} MiB before, {self.after.bytes >> 20} after",
            ),
            "open files": (
                self.after.files <= self.before.files + 2,
                f"{self.before.files} before, {self.after.files} after",
            ),
            "threads": (
                self.after.threads <= self.before.threads + 2,
                f"{self.before.threads} before, {self.after.threads} after",
            ),
            "it ends by itself": (self.exit_code == 0, f"exit code {self.exit_code}"),
        }


def gap_p99(answers: Sequence[Answer]) -> float:
    """Seconds between two pieces of an answer: the 99th percentile over all."""
    return percentile((gap for answer in answers for gap in answer.gaps_s), 99)


def honest_asks(rng: random.Random, tokens: int) -> list[Ask]:
    """Requests of some lengths, greedy."""
    words = [
        "the",
        "sea",
        "and",
        "a",
        "boat",
        "of",
        "wood",
        "that",
        "goes",
        "over",
        "it",
        "by",
        "night",
    ]
    found = []
    for i in range(12):
        text = " ".join(rng.choice(words) for _ in range(rng.choice((8, 60, 300))))
        messages = [{"role": "user", "content": f"{i}: {text}"}]
        found.append(Ask(f"ask {i}", messages, tokens, {"temperature": 0}))
    return found


def honest_client(server: Server) -> httpx.AsyncClient:
    """A connection with the honest clients' key."""
    client = new_client(server.url)
    client.headers["Authorization"] = f"Bearer {HONEST}"
    return client


async def honest(server: Server, asks: Sequence[Ask], until: float, into: list[Answer]) -> None:
    """One honest client: its requests one after the other, until a time."""
    async with honest_client(server) as client:
        turn = 0
        while time.monotonic() < until:
            into.append(await ask(client, server.model, asks[turn % len(asks)], limit_s=300))
            turn += 1


async def clients(server: Server, asks: list[Ask], seconds: float, into: list[Answer]) -> None:
    until = time.monotonic() + seconds
    share = len(asks) // CLIENTS
    each = [asks[i * share : (i + 1) * share] for i in range(CLIENTS)]
    await asyncio.gather(*(honest(server, some, until, into) for some in each))


Tried = dict[str, int]
Statuses = dict[str, dict[int, int]]
Spans = dict[str, list[tuple[float, float]]]


async def attack(server: Server, seed: int, seconds: float, record: Record) -> None:
    """Attack from another process: what an attacker computes holds up no honest client's clock."""
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        record.tried, record.statuses, record.spans = await loop.run_in_executor(
            pool, attack_alone, server.url, server.model, seed, seconds
        )


def attack_alone(url: str, model: str, seed: int, seconds: float) -> tuple[Tried, Statuses, Spans]:
    """Two attackers at a time, each with one kind after the other."""
    rng, tried, statuses, spans = random.Random(seed), Tried(), Statuses(), Spans()
    until, order = time.monotonic() + seconds, shuffled(rng)

    async def attacker() -> None:
        while time.monotonic() < until:
            kind = next(order)
            target, started = Target(url, model, ATTACKER, rng), time.perf_counter()
            try:
                await kind(target)
            except (OSError, httpx.HTTPError):
                await asyncio.sleep(0.1)  # if the server has ended, this ends at its time
            name = kind.__name__
            tried[name] = tried.get(name, 0) + 1
            spans.setdefault(name, []).append((started, time.perf_counter()))
            seen = statuses.setdefault(name, {})
            for status, n in target.seen.items():
                seen[status] = seen.get(status, 0) + n

    async def attackers() -> None:
        await asyncio.gather(attacker(), attacker())

    asyncio.run(attackers())
    return tried, statuses, spans


async def session(server: Server, args: argparse.Namespace, record: Record) -> None:
    """Quiet, each attack once, then all in random order, then quiet again."""
    rng = random.Random(args.seed)
    asks = honest_asks(rng, args.answer)
    warm: list[Answer] = []
    for asked in asks:  # alone, so that these texts are the right ones
        await honest_once(server, asked, warm)
    record.right = {answer.name: answer.text for answer in warm}
    await clients(server, asks, args.quiet, record.quiet)
    # What the first of each kind loads (a grammar's vocabulary, modules) is no leak; what a model
    # has loaded goes when it is unloaded.
    for kind in sorted(KINDS, key=lambda kind: kind is not unloads):
        await kind(Target(server.url, server.model, ATTACKER, rng))
    await settle(server, asks)
    record.before = State.of(server)
    seconds = 60 * args.minutes
    await asyncio.gather(
        clients(server, asks, seconds, record.attacked),
        attack(server, args.seed, seconds, record),
    )
    record.deaths = int(server.process.poll() is not None)
    if not record.deaths:
        await settle(server, asks)
        record.after = State.of(server)


async def settle(server: Server, asks: list[Ask]) -> None:
    """Until time limits have ended what attacks left; then the honest alone."""
    await asyncio.sleep(SETTLE_S)
    await clients(server, asks, WARM_S, [])
    await asyncio.sleep(IDLE_S)


async def honest_once(server: Server, asked: Ask, into: list[Answer]) -> None:
    async with honest_client(server) as client:
        into.append(await ask(client, server.model, asked, limit_s=300))
        if into[-1].outcome != ANSWERED:
            raise SystemExit(f"in quiet: {into[-1].error}\n{server.log[-2000:]}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability.attack", description=__doc__
    )
    parser.add_argument("--model", required=True, help="a directory or a name mlxkv knows")
    parser.add_argument("--minutes", type=float, default=30.0, help="of attacks")
    parser.add_argument("--quiet", type=float, default=60.0, help="seconds without, before them")
    parser.add_argument("--answer", type=int, default=48, help="tokens of an honest answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", default="2GiB", help="of the server")
    add_machine_options(parser, "float32", "of the server")
    return parser.parse_args(argv)


def markdown(model: str, args: argparse.Namespace, record: Record) -> str:
    """The record as tables."""
    lines = [
        f"# {args.minutes:g} minutes of attacks on `mlxkv serve`, {model}, {CLIENTS} clients",
        "",
        f"{len(record.quiet)} honest answers in quiet, {len(record.attacked)} under attack.",
        "",
        "| what has to hold | | seen |",
        "| --- | --- | --- |",
        *(
            f"| {name} | {'yes' if holds else '**no**'} | {said} |"
            for name, (holds, said) in record.checks().items()
        ),
        "",
        "| attack | tried | p99 between pieces meanwhile, ms | statuses (0: closed without one) |",
        "| --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        name = kind.__name__
        seen = sorted(record.statuses.get(name, {}).items())
        said = ", ".join(f"{status} x {n}" for status, n in seen)
        p99 = 1e3 * percentile(record.gaps_beside(name), 99)
        tried = record.tried.get(name, 0)
        lines.append(f"| {name.replace('_', ' ')} | {tried} | {p99:.0f} | {said} |")
    return "\n".join(lines) + "\n"


def rounded(record: Record) -> dict[str, Any]:
    """The record as JSON, with the times of pieces to a tenth of a millisecond."""
    found = asdict(record)
    for answer in [*found["quiet"], *found["attacked"]]:
        answer["piece_s"] = [round(seconds, 4) for seconds in answer["piece_s"]]
    return found


def main() -> int:
    args = parse()
    from mlxkv.store.resolve import resolve

    model, record = resolve(args.model).resolve(), Record()
    with tempfile.TemporaryDirectory() as pages:
        env = environment(args) | {"MLXKV_KV": pages}
        options = [f"--dtype={args.dtype}", f"--memory={args.memory}"]
        options += [f"--api-key={HONEST}", f"--api-key={ATTACKER}"]
        with Server(MLXKV, model, env, options) as server:
            asyncio.run(session(server, args, record))
            if record.deaths:
                print(server.log[-4000:], file=sys.stderr)
                return 1
            record.exit_code = server.stop()
            log = server.log
    output = args.output.with_suffix("")
    output.parent.mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {**about(ROOT, "benchmarks.reliability.attack")}
    written |= {"log_bytes": len(log), "record": rounded(record), "checks": record.checks()}
    output.with_suffix(".json").write_text(json.dumps(written) + "\n", encoding="utf-8")
    table = markdown(model.name, args, record)
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    for answer in [*record.lost, *record.wrong][:5]:
        print(f"{answer.name}: {answer.outcome} {answer.error}", file=sys.stderr)
    return int(not all(holds for holds, _ in record.checks().values()))


if __name__ == "__main__":
    sys.exit(main())
