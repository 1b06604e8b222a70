"""An engine without a model: it answers from a script, and remembers what it was asked.

It has the surface that front ends use, and no more. A script is a function of the request; its
items are chunks, exceptions to raise, and numbers of seconds to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxkv.engine.messages import Ask, Counts, EmbedAsk, Embeddings, EngineStats, Loaded, Sleeping
from mlxkv.errors import MlxkvError, ModelNotFound, UsageError
from mlxkv.generation.outputs import Chunk, Stats, TokenLogprobs
from mlxkv.generation.request import Request
from mlxkv.server.app import create_app
from mlxkv.server.config import ServerConfig
from mlxkv.server.edge.serving import Server

MODEL = "fake"
N_PROMPT = 10
"""Tokens of every prompt."""

Step = Chunk | Exception | float
Script = Callable[[Ask], Sequence[Step]]


def stats(**changes: Any) -> Stats:
    """Figures of an answer: of the prompt's tokens 6 were restored."""
    figures = {
        "prompt_tokens": N_PROMPT,
        "restored_tokens": 6,
        "restored_ram_tokens": 4,
        "restored_ssd_tokens": 2,
        "computed_tokens": 4,
        "generated_tokens": 3,
        "prefill_s": 0.25,
        "decode_s": 0.5,
        "first_token_s": 0.25,
        "peak_bytes": 1000,
        "kv_bytes": 500,
    }
    return Stats(**{**figures, **changes})


def logprobs(text: str, n: int) -> TokenLogprobs:
    """Of a token, with as many likeliest ones."""
    top = tuple(TokenLogprobs(i, f"t{i}", b"t%d" % i, -0.5 - i) for i in range(n))
    return TokenLogprobs(7, text, text.encode(), -0.5, top)


def options_of(ask: Ask) -> dict[str, Any]:
    """What a request sets, besides its prompt, format and log-probabilities."""
    request, plain = ask.request, Request(ask.request.prompt)
    apart = {"prompt", "sampling", "recommended", "best_effort", "format", "logprobs", "go_on"}
    names = [field.name for field in dataclasses.fields(Request) if field.name not in apart]
    values = {name: getattr(request, name) for name in names}
    found = {name: x for name, x in values.items() if x != getattr(plain, name)}
    if "stop" in found:
        found["stop"] = list(found["stop"])
    return found | request.sampling.chosen()


def says(*texts: str, reason: str = "stop", **last: Any) -> Script:
    """An answer of these texts, one a token."""

    def script(ask: Ask) -> list[Step]:
        n = ask.request.logprobs
        steps: list[Step] = [
            Chunk(text, token, logprobs=None if n is None else logprobs(text, n))
            for token, text in enumerate(texts)
        ]
        made = {"stats": stats(generated_tokens=len(texts)), **last}
        return [*steps, Chunk("", None, reason, **made)]

    return script


class FakeAnswer:
    """See `mlxkv.engine.messages.Answer`."""

    def __init__(self, steps: Sequence[Step]):
        self._steps = iter(steps)
        self.n_read = 0
        self.cancelled = threading.Event()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._read()

    async def _read(self) -> AsyncIterator[Chunk]:
        try:
            for step in self._steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float | int):
                    await asyncio.sleep(step)
                    continue
                first = {} if self.n_read else {"prompt_tokens": N_PROMPT}
                self.n_read += 1
                yield dataclasses.replace(step, **first)
                await asyncio.sleep(0)
        finally:
            self.cancel()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """See `mlxkv.engine.messages.Engine`.

    Attributes:
        script: how it answers.
        asks: what it was asked.
        answers: what it gave.
    """

    def __init__(self, script: Script | None = None):
        self.script = script or says("Hello", " world")
        self.asks: list[Ask] = []
        self.embedded: list[EmbedAsk] = []
        self.expected: list[tuple[str, str]] = []
        self.answers: list[FakeAnswer] = []
        self.alive, self.restarts = True, 0
        self.busy: MlxkvError | None = None

    def start(self) -> None:
        self.alive = True

    def close(self) -> None:
        self.alive = False

    def expect(self, owner: str, client: str) -> None:
        self.expected.append((owner, client))

    def submit(self, ask: Ask) -> FakeAnswer:
        if self.busy is not None:
            raise self.busy
        if ask.model != MODEL:
            raise ModelNotFound(f"no model named {ask.model!r}")
        self.asks.append(ask)
        self.answers.append(FakeAnswer(self.script(ask)))
        return self.answers[-1]

    async def load(
        self, model: str, keep_alive_s: float | None = None, path: Path | None = None
    ) -> Path:
        if model != MODEL:
            raise ModelNotFound(f"no model named {model!r}")
        return path or Path("models", model)

    async def unload(self, model: str, path: Path | None = None) -> bool:
        return model == MODEL

    @contextlib.asynccontextmanager
    async def without(self, model: str, path: Path | None = None) -> AsyncIterator[None]:
        await self.unload(model, path)
        yield

    async def tokenize(self, ask: Ask) -> list[int]:
        return list(range(N_PROMPT))

    async def embed(self, ask: EmbedAsk) -> Embeddings:
        texts = ask.request.texts
        if texts[0] == "refuse":
            raise UsageError("this model gives no meaningful embeddings")
        self.embedded.append(ask)
        n = ask.request.dimensions
        return Embeddings([[float(len(text)), 0.5][:n] for text in texts], 3)

    def put_to_sleep(self) -> int:
        return 0

    def asleep(self, label: str = "") -> list[Sleeping]:
        return []

    def names(self) -> set[str]:
        return {model.name for model in self.loaded()}

    def loaded(self, owner: str | None = None) -> list[Loaded]:
        sizes = {field.name: 1 for field in dataclasses.fields(Loaded) if field.type == "int"}
        words = {"device": "cpu", "family": "llama", "quantization": "float32", "digest": "0"}
        return [Loaded(MODEL, "models/fake", until=None, **sizes, **words)]

    def stats(self, owner: str | None = None) -> EngineStats:
        counts = Counts(9, 5, 2, 1, 1000, 500, 200, 300, 80, {"diverged": 3, "dropped": 1}, 40)
        counts.draft_passes, counts.drafted_tokens = 4, {"lookup": 12}
        counts.accepted_tokens = {"lookup": 7}
        memory = {"weights": 4000, "kv_used": 300, "kv_allocated": 512, "pages": 256}
        memory |= {"active": 5000, "cached": 100, "peak": 6000, "limit": 10_000}
        return EngineStats(1, 2, 4, {MODEL: counts}, memory)

    @property
    def last(self) -> Ask:
        return self.asks[-1]


@contextlib.contextmanager
def serving(engine: Any, **settings: Any) -> Iterator[str]:
    """A server on loopback in a thread: its address."""
    with serving_as(engine, ServerConfig(**settings)) as (url, _):
        yield url


@contextlib.contextmanager
def serving_as(engine: Any, config: ServerConfig, **more: Any) -> Iterator[tuple[str, Server]]:
    """A server on loopback in a thread: its address, and itself."""
    server = Server(create_app(engine, config), config, **more)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not server.started and time.monotonic() < until:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
