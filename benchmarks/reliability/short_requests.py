"""Many short requests against one server: `python -m benchmarks.reliability.short_requests`.

Clients ask all three APIs, with streams and without; some hang up, some send what is refused. After
each part the server is left alone until it is idle, and its memory, descriptors and threads are
read. Prints them, and what a request adds in the second half by a straight line through the
samples. Prefix pages are a cache with a bound: it is set so low that it is full in the first half,
and there is none on disk. Exits with 1 if descriptors or threads grow, or memory by more than
`--most` bytes a request. The model is made here, with random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil

from tests.support.command_line import chat_model, environment
from tests.support.server_process import Server

N_CLIENTS, N_PARTS = 8, 20
MEMORY = "64MiB"
"""A quarter of it is for prefix pages."""
IDLE_S = 1.0
"""After the last answer: then the engine has given memory back."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The server after so many requests."""

    n_requests: int
    pages_bytes: int
    rss_bytes: int
    descriptors: int
    threads: int


def request_of(i: int, draw: random.Random) -> tuple[str, dict[str, object]]:
    """The path and body of the i-th request; one in 16 is refused."""
    text = "".join(draw.choices("abcdefgh ", k=draw.randint(1, 60)))
    messages = [{"role": "user", "content": text}]
    streams, n = bool(i % 2), draw.randint(1, 6)
    if i % 16 == 5:
        return "/v1/chat/completions", {"model": "m", "messages": messages, "temperature": -1}
    match i % 3:
        case 0:
            path = "/v1/chat/completions"
            body = {"messages": messages, "max_tokens": n}
        case 1:
            path, body = "/v1/messages", {"messages": messages, "max_tokens": n}
        case _:
            path, body = "/api/chat", {"messages": messages, "options": {"num_predict": n}}
    return path, {"model": "m", "stream": streams, **body}


async def ask(client: httpx.AsyncClient, i: int, draw: random.Random) -> None:
    """Send a request, and read its answer; one in 10 hangs up after the first bytes."""
    path, body = request_of(i, draw)
    async with client.stream("POST", path, json=body) as answer:
        assert answer.status_code == (400 if i % 16 == 5 else 200), await answer.aread()
        async for _ in answer.aiter_bytes():
            if i % 10 == 3:
                return


async def part(url: str, first: int, n: int) -> None:
    """Send n requests with several clients at a time, each with connections of its own."""
    numbers, draw = iter(range(first, first + n)), random.Random(first)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for i in numbers:
                await ask(client, i, draw)

    await asyncio.gather(*(run() for _ in range(N_CLIENTS)))


def sampled(process: psutil.Process, url: str, n: int) -> Sample:
    pages = httpx.get(f"{url}/stats.json").json()["memory"]["pages"]
    with process.oneshot():
        rss = process.memory_info().rss
        return Sample(n, pages, rss, process.num_fds(), process.num_threads())


def growth(samples: list[Sample], name: str) -> float:
    """What a request adds, by a straight line through the second half of the samples."""
    half = samples[len(samples) // 2 :]
    x = [sample.n_requests for sample in half]
    return float(np.polyfit(x, [getattr(sample, name) for sample in half], 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--most", type=float, default=200.0, help="bytes of memory a request")
    options = parser.parse_args()
    n = options.requests // N_PARTS
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        chat_model(Path(folder) / "models" / "m")
        server = Server(environment(Path(folder), MLXKV_KV_DISK="0"), "--memory", MEMORY)
        stack.callback(server.stop)
        process, samples = psutil.Process(server.process.pid), []
        head = f"{'requests':>9} {'pages, MiB':>11} {'RSS, MiB':>10} {'descriptors':>12}"
        print(f"{head} {'threads':>8} {'a second':>9}")
        for i in range(N_PARTS):
            started = time.perf_counter()
            asyncio.run(part(server.url, i * n, n))
            rate = n / (time.perf_counter() - started)
            time.sleep(IDLE_S)
            samples.append(sampled(process, server.url, (i + 1) * n))
            done, pages, rss, descriptors, threads = astuple(samples[-1])
            sizes = f"{pages / 2**20:11.1f} {rss / 2**20:10.1f}"
            print(f"{done:9,} {sizes} {descriptors:12} {threads:8} {rate:9.1f}", flush=True)
    per_request = growth(samples, "rss_bytes")
    print(f"a request adds {per_request:.0f} bytes in the second half")
    flat = all(
        max(getattr(sample, name) for sample in samples[N_PARTS // 2 :])
        <= max(getattr(sample, name) for sample in samples[: N_PARTS // 2])
        for name in ("descriptors", "threads")
    )
    return 0 if flat and per_request <= options.most else 1


if __name__ == "__main__":
    sys.exit(main())
