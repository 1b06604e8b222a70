"""The engine's interface for front ends, without MLX.

A front end submits an `Ask` from any thread and reads an `Answer`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from mlxkv.errors import MlxkvError
from mlxkv.generation.embed_request import EmbedRequest
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.request import Request


class Busy(MlxkvError):
    """The queue is full.

    Args:
        retry_after_s: when to retry.
        is_owners: whether it is the queue of one API key: then others are served.
    """

    def __init__(self, retry_after_s: float, is_owners: bool = False):
        self.retry_after_s = retry_after_s
        self.status = 429 if is_owners else 503
        what = "requests with this API key" if is_owners else "requests"
        super().__init__(f"too many {what} are waiting: retry in {retry_after_s:.0f} s")


class PutAway(MlxkvError):
    """The engine stops, and the answer so far is kept: the same request goes on with it."""

    status = 503

    def __init__(self) -> None:
        super().__init__(
            "the server is stopping; the answer so far is kept: send the same request again"
        )


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to a model.

    Args:
        model: a name as for `mlxkv run`.
        request: the request.
        owner: hash of the API key; requests share prefix pages only within an owner.
        keep_alive_s: how long the model stays loaded; None: the server's default, negative: for
            ever, 0: unload it after the answer.
        path: the model's directory; None if the engine resolves the name.
        draft_path: the same of the model that `request.draft` names.
        client: the program that asks; empty where that is not known.
        label: letters, digits and `_`, by which `Engine.asleep` finds the answer while it sleeps;
            empty for none.
        note: makes what is kept with it then, of JSON's values.
        durable: kept from the beginning on, and for this label alone: its client does not wait.
    """

    model: str
    request: Request
    owner: str = ""
    keep_alive_s: float | None = None
    path: Path | None = None
    client: str = ""
    label: str = ""
    note: Callable[[], Mapping[str, Any]] | None = None
    durable: bool = False
    draft_path: Path | None = None


@dataclass(frozen=True, slots=True)
class EmbedAsk:
    """A request for vectors of texts; fields as those of `Ask`."""

    model: str
    request: EmbedRequest
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
    n_asleep: int = 0
    kv_type: str = "native"
    adapters: tuple[tuple[str, int], ...] = ()
    """Those of an owner's requests by their names, and the bytes that they take."""


@dataclass(frozen=True, slots=True)
class Sleeping:
    """An answer that was put away.

    Args:
        owner: whose it is.
        model: its model's directory.
        label: see `Ask`.
        n_tokens: tokens of the answer so far.
        note: what `Ask.note` made.
        ask: the request; None where only the same request wakes it.
    """

    owner: str
    model: str
    label: str
    n_tokens: int
    note: Mapping[str, Any]
    ask: Ask | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of texts, and the number of tokens in all of them."""

    vectors: Sequence[Sequence[float]]
    n_tokens: int


@dataclass
class Counts:
    """Counters of a model since it was loaded.

    Prompt tokens are counted when the answer ends, generated ones as they come.

    Args:
        requests: requests that have started.
        answered: requests that ended with an answer.
        failed: requests that ended with an error.
        cancelled: requests that the client cancelled, or left by disconnecting.
        misses: prompts that reused less KV than a cached sequence offered, by `Miss.reason`.
        next_turn_tokens: tokens of next turns that were computed before they were asked for.
        next_turn_used_tokens: those of them that prompts were restored from.
        next_turn_saved_s: seconds that took those prompts less, estimated from the speed at which
            the tokens were computed.
        fetched_bytes: of pages that had been read from disk when a prompt needed them.
        fetch_saved_s: seconds that reading those took.
        draft_passes: steps that computed drafted tokens, summed over answers.
        drafted_tokens: drafter -> drafted tokens that were computed.
        accepted_tokens: drafter -> those of them that were right.
        upper_tokens: as for `Stats`.
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
    next_turn_tokens: int = 0
    next_turn_used_tokens: int = 0
    next_turn_saved_s: float = 0.0
    fetched_bytes: int = 0
    fetch_saved_s: float = 0.0
    draft_passes: int = 0
    drafted_tokens: dict[str, int] = field(default_factory=dict)
    accepted_tokens: dict[str, int] = field(default_factory=dict)
    upper_tokens: int = 0

    def copy(self) -> Counts:
        """A snapshot."""
        names = ("misses", "drafted_tokens", "accepted_tokens")
        return dataclasses.replace(self, **{name: dict(getattr(self, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Lost:
    """Where prompts of a client reused less KV than a cached sequence offered.

    Args:
        reason: of the last time, as for `Miss`, and so the next three.
        token: position.
        held: text in the cached sequence.
        prompt: text in the prompt.
        n_tokens: tokens that were computed and would have been restored otherwise, in all.
        times: how many times.
    """

    reason: str
    token: int
    held: str
    prompt: str
    n_tokens: int
    times: int


@dataclass
class ClientCounts:
    """What the answers to one client took, since its model was loaded.

    Args:
        owner: hash of the API key; empty without keys.
        client: the program's name.
        shared_tokens: length of the prefix that its sessions share, which is evicted last.
        lost: the texts at which most was lost.
        next_turn_tokens: as for `Counts`, and so the two behind it.
    """

    owner: str
    client: str
    answered: int = 0
    prompt_tokens: int = 0
    restored_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    shared_tokens: int = 0
    lost: Sequence[Lost] = ()
    next_turn_tokens: int = 0
    next_turn_used_tokens: int = 0
    next_turn_saved_s: float = 0.0

    def copy(self, lost: Sequence[Lost]) -> ClientCounts:
        """A snapshot with these texts."""
        return dataclasses.replace(self, lost=tuple(lost))

    def __add__(self, other: ClientCounts) -> ClientCounts:
        """The figures of the same client with two models."""
        most = max(len(self.lost), len(other.lost))
        return ClientCounts(
            self.owner,
            self.client,
            self.answered + other.answered,
            self.prompt_tokens + other.prompt_tokens,
            self.restored_tokens + other.restored_tokens,
            self.computed_tokens + other.computed_tokens,
            self.generated_tokens + other.generated_tokens,
            max(self.shared_tokens, other.shared_tokens),
            sorted([*self.lost, *other.lost], key=lambda x: -x.n_tokens)[:most],
            self.next_turn_tokens + other.next_turn_tokens,
            self.next_turn_used_tokens + other.next_turn_used_tokens,
            self.next_turn_saved_s + other.next_turn_saved_s,
        )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's metrics.

    Args:
        running: requests that are running.
        queued: requests that wait.
        rejected: requests that a full queue refused.
        models: counters of each loaded model, by name.
        memory: bytes by kind: weights, kv_used, kv_allocated, pages, limit; of all owners also
            active, cached, peak.
        clients: counters of each client.
        asleep: answers that sleep, by the name of their model's directory.
    """

    running: int
    queued: int
    rejected: int
    models: dict[str, Counts]
    memory: dict[str, int]
    clients: Sequence[ClientCounts] = ()
    asleep: Mapping[str, int] = field(default_factory=dict)


class Answer(Protocol):
    """The chunks of one answer; readable once."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    def cancel(self) -> None:
        """End the answer within one step; does nothing once it has ended."""
        ...


class Engine(Protocol):
    """Loads models and answers requests."""

    @property
    def alive(self) -> bool: ...

    @property
    def restarts(self) -> int: ...

    def submit(self, ask: Ask) -> Answer: ...

    def expect(self, owner: str, client: str) -> None: ...

    async def load(
        self, model: str, keep_alive_s: float | None = None, path: Path | None = None
    ) -> Path: ...

    async def unload(self, model: str, path: Path | None = None) -> bool: ...

    def without(
        self, model: str, path: Path | None = None
    ) -> AbstractAsyncContextManager[None]: ...

    async def tokenize(self, ask: Ask) -> list[int]: ...

    async def embed(self, ask: EmbedAsk) -> Embeddings: ...

    def asleep(self, label: str = "") -> list[Sleeping]: ...

    def names(self) -> set[str]: ...

    def loaded(self, owner: str | None = None) -> list[Loaded]: ...

    def stats(self, owner: str | None = None) -> EngineStats: ...
