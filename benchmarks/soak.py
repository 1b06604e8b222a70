"""Some minutes of load on `mlxkv serve`: `python -m benchmarks.soak --model M --output NAME`.

Clients ask over loopback, one request after the other, from a pool of mixed lengths (see
`soak_pool`), and some hang up within the prefill or the answer. Then every request that was
answered is run alone in a fresh process without prefix pages, and the texts are compared. What has
to hold is in `soak_checks`; the exit code is 1 where something does not. Writes NAME.json, NAME.md
and NAME.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import soak_report
from benchmarks.compare import ROOT, environment
from benchmarks.load_client import ANSWERED, FAILED, Answer, Ask, ask, new_client
from benchmarks.load_server import MLXKV, Server
from benchmarks.options import add_machine_options
from benchmarks.report import about
from benchmarks.serve import has_template, prepared
from benchmarks.soak_checks import Record, Sample, checks, failed, figures
from benchmarks.soak_pool import Deck, PoolSizes, pool

SAMPLE_S, SETTLE_S, PROGRESS_S = 1.0, 15.0, 15.0
SIZES = PoolSizes()
MOST_FAILED = 20
"""Failed requests after which the soak ends: there is nothing to learn from more."""


@dataclass(slots=True)
class Load:
    """The clients and what they have seen.

    Args:
        server: that they ask.
        deck: what they ask.
        limit_s: of one request.
    """

    server: Server
    deck: Deck
    limit_s: float
    start_s: float = field(default_factory=time.perf_counter)
    answers: list[Answer] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.start_s

    async def run(self, n_clients: int, seconds: float) -> None:
        """Ask for so long, and until the last answer has ended."""
        watching = asyncio.ensure_future(self._watch())
        asking = asyncio.gather(*(self._client(seconds) for _ in range(n_clients)))
        try:
            # Watching ends before asking does only where it fails: now, and not after two hours.
            await asyncio.wait({asking, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                asking.cancel()
                await watching
            await asking
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    async def settled(self) -> tuple[Sample, dict[str, Any], int]:
        """The server when nothing is asked any more: a sample, its figures, its health."""
        async with new_client(self.server.url) as client:
            until = time.monotonic() + SETTLE_S
            while True:
                sample, stats = await self._sample(client)
                idle = not (sample.running or sample.queued or sample.kv)
                if idle or time.monotonic() > until:
                    break
                await asyncio.sleep(0.2)
            health = (await client.get("/health", timeout=SETTLE_S)).status_code
        return sample, stats, health

    async def _client(self, seconds: float) -> None:
        async with new_client(self.server.url) as client:
            while self.elapsed_s < seconds and not self._broken():
                asked, hang_up = self.deck.draw()
                answer = await ask(client, self.server.model, asked, hang_up, self.limit_s)
                self.answers.append(answer)

    def _broken(self) -> bool:
        n_failed = sum(answer.outcome == FAILED for answer in self.answers)
        return n_failed >= MOST_FAILED or self.server.process.poll() is not None

    async def _watch(self) -> None:
        import psutil

        shown = 0.0
        async with new_client(self.server.url) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError, psutil.Error):
                    self.samples.append((await self._sample(client))[0])
                if self.elapsed_s - shown >= PROGRESS_S and self.samples:
                    shown = self.elapsed_s
                    self._show(self.samples[-1])
                await asyncio.sleep(SAMPLE_S)

    async def _sample(self, client: httpx.AsyncClient) -> tuple[Sample, dict[str, Any]]:
        import psutil

        stats = (await client.get("/stats.json", timeout=SETTLE_S)).json()
        rss = psutil.Process(self.server.process.pid).memory_info().rss
        return Sample.of(self.elapsed_s, rss, stats), stats

    def _show(self, sample: Sample) -> None:
        n_answered = sum(answer.outcome == ANSWERED for answer in self.answers)
        say(
            f"{sample.t_s:5.0f} s  {len(self.answers)} asked, {n_answered} answered; "
            f"{sample.rss >> 20} MiB resident, "
            f"{sample.pages >> 20} of pages, {sample.kv >> 20} of KV"
        )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def loaded(
    args: argparse.Namespace, model: Path, asks: list[Ask], env: dict[str, str]
) -> tuple[Record, dict[str, Ask]]:
    """The server under load, until it has ended, and all that was asked, by name.

    Raises:
        SystemExit: the server ended by itself.
    """
    deck = Deck(asks, args.hang_ups, args.seed)
    options = [f"--dtype={args.dtype}", f"--memory={args.memory}", *shlex.split(args.mlxkv)]
    with (
        tempfile.TemporaryDirectory() as pages,
        Server(MLXKV, model, env | {"MLXKV_KV": pages}, options) as server,
    ):
        load = Load(server, deck, args.limit)
        asyncio.run(load.run(args.clients, 60 * args.minutes))
        duration_s = load.elapsed_s
        if (code := server.process.poll()) is not None:
            raise SystemExit(f"the server ended: {code}\n{server.log[-4000:]}")
        after, stats, health = asyncio.run(load.settled())
        exit_code = server.stop()
    entry = next(iter(stats["models"].values()))
    answered = {answer.name for answer in load.answers if answer.outcome == ANSWERED}
    n_missed = len({asked.name for asked in asks} - answered)
    record = Record(
        duration_s, n_missed, load.answers, load.samples, after, entry["counts"],
        stats["rejected"], health, exit_code, server.log.replace(str(model), model.name),
    )  # fmt: skip
    return record, deck.drawn


def alone(
    args: argparse.Namespace, model: Path, asks: list[Ask], env: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Each request by itself, in a process that keeps no prefixes, by name.

    Raises:
        SystemExit: it fails, or finds a prefix.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "asks.json")
        file.write_text(json.dumps([asdict(asked) for asked in asks]), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.soak_solo", f"--model={model}"]
        command += [f"--dtype={args.dtype}", f"--asks={file}"]
        env = env | {"MLXKV_KV": str(Path(folder, "kv")), "MLXKV_KV_DISK": "0"}
        with subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                made = json.loads(line)
                if made["restored_tokens"]:
                    process.kill()
                    raise SystemExit(f"alone, {made['name']}: restored a prefix")
                found[made["name"]] = made
                say(f"alone: {len(found)} of {len(asks)}")
        if process.returncode:
            raise SystemExit(f"alone: exit code {process.returncode}")
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--model", required=True, help="a directory or a name mlxkv knows")
    parser.add_argument("--minutes", type=float, default=4.0, help="of asking")
    parser.add_argument("--clients", type=int, default=8, help="that ask at a time")
    parser.add_argument("--pool", type=int, default=SIZES.requests, help="different requests")
    parser.add_argument("--longest", type=int, default=SIZES.longest, help="prompt, in tokens")
    parser.add_argument("--answer", type=int, default=SIZES.answer, help="longest, in tokens")
    parser.add_argument("--hang-ups", type=float, default=0.3, help="share of the requests")
    parser.add_argument("--seed", type=int, default=1, help="of what is asked, and in which order")
    parser.add_argument(
        "--weights", choices=("auto", "float32", "packed", "as-is"), default="as-is",
        help="float32: nothing packed; packed: as they are, scales in float32",
    )  # fmt: skip
    parser.add_argument(
        "--memory", default="2GiB", help="of the server: a quarter is for pages, which have to go"
    )
    parser.add_argument("--mlxkv", default="", metavar="OPTIONS", help="for `mlxkv serve`")
    parser.add_argument("--limit", type=float, default=900, help="seconds of one request")
    add_machine_options(parser, "float32", "of server and solo runs")
    return parser.parse_args(argv)


def write(args: argparse.Namespace, model: str, record: Record) -> dict[str, Any]:
    """NAME.json, NAME.md and NAME.svg."""
    output = args.output.with_suffix("")
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "output")}
    written = {
        "model": model,
        "settings": settings,
        **about(ROOT, "benchmarks.soak"),
        "blas": args.blas,
        "figures": figures(record),
        "checks": [asdict(check) for check in checks(record)],
        "record": asdict(record),
    }
    output.with_suffix(".json").write_text(json.dumps(written) + "\n", encoding="utf-8")
    table = soak_report.markdown(written)
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    soak_report.plot(f"{model}: {args.clients} clients", record, output.with_suffix(".svg"))
    print(table)
    return written


def main() -> int:
    args = parse()
    from mlxkv.store.resolve import resolve
    from mlxkv.text.tokenizer import Tokenizer

    model, env = resolve(args.model).resolve(), environment(args)
    with tempfile.TemporaryDirectory() as folder:
        used = prepared(args.weights, model, Path(folder), env)
        tokenizer = Tokenizer.from_dir(used)
        asks = pool(
            lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
            PoolSizes(args.pool, args.longest, args.answer),
            has_template(used),
            args.seed,
        )
        record, drawn = loaded(args, used, asks, env)
        write(args, model.name, record)  # what fails from here on loses nothing of the load
        answered = dict.fromkeys(answer.name for answer in record.of(ANSWERED))
        record.solo = alone(args, used, [drawn[name] for name in answered], env)
    write(args, model.name, record)
    broken = failed(checks(record))
    for check in broken:
        say(f"fails: {check.name}: {check.said}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
