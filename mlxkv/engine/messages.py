"""What front ends send to the engine and get from it.

A front end submits an `Ask` from any thread and reads an `Answer`; everything that touches MLX is
behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from mlxkv.errors import MlxkvError
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.request import Request


class Busy(MlxkvError):
    """More requests wait than the queue takes.

    Args:
        retry_after_s: when to try again.
    """

    status = 503

    def __init__(self, retry_after_s: float):
        self.retry_after_s = retry_after_s
        super().__init__(f"too many requests are waiting: try again in {retry_after_s:.0f} s")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to a model.

    Args:
        model: a name as `mlxkv run` takes it.
        request: what is asked for.
        owner: hash of the API key: pages never cross owners.
        keep_alive_s: how long the model stays; None: the server's default, negative: for ever, 0:
            it goes with the answer.
        path: the model's directory, where the name is resolved already; else the engine does it.
    """

    model: str
    request: Request
    owner: str = ""
    keep_alive_s: float | None = None
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory."""

    name: str
    path: str
    size_bytes: int
    weights_bytes: int
    kv_used_bytes: int
    kv_allocated_bytes: int
    kv_max_bytes: int
    n_sequences: int
    pages_ram_bytes: int
    pages_ssd_bytes: int
    device: str
    until: datetime | None
    context: int
    family: str
    parameters: int
    quantization: str
    digest: str


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of texts, and the tokens that all of them had."""

    vectors: Sequence[Sequence[float]]
    n_tokens: int


@dataclass
class Counts:
    """What a model has done since it was loaded.

    Tokens of prompts count when the answer has ended, generated ones as they come.

    Args:
        requests: that were begun.
        answered: that ended with an answer.
        failed: that ended with an error.
        cancelled: whose client cancelled them or went away.
        misses: prompts that reused less KV than a cached sequence offered, by `Miss.reason`.
    """

    requests: int = 0
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    restored_ram_tokens: int = 0
    restored_ssd_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    misses: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Counts:
        """As it is now."""
        return dataclasses.replace(self, misses=dict(self.misses))


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine does and has done.

    Args:
        running: requests that are being computed.
        queued: requests that wait.
        rejected: requests that the queue had no room for.
        models: counts of each loaded model, by name.
        memory: bytes by kind: weights, kv_used, kv_allocated, pages, active, cached, peak, limit.
    """

    running: int
    queued: int
    rejected: int
    models: dict[str, Counts]
    memory: dict[str, int]


class Answer(Protocol):
    """The chunks of one answer; to be read once."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    def cancel(self) -> None:
        """End it within one step; also of an answer that has ended."""
        ...


class Engine(Protocol):
    """See the module."""

    @property
    def alive(self) -> bool: ...

    def submit(self, ask: Ask) -> Answer: ...

    async def load(
        self, model: str, keep_alive_s: float | None = None, path: Path | None = None
    ) -> Path: ...

    async def unload(self, model: str, path: Path | None = None) -> bool: ...

    async def tokenize(self, ask: Ask) -> list[int]: ...

    async def embed(self, model: str, texts: Sequence[str]) -> Embeddings: ...

    def names(self) -> set[str]: ...

    def loaded(self) -> list[Loaded]: ...

    def stats(self) -> EngineStats: ...
