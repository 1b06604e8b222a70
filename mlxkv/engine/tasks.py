"""What is known of a request while it is answered."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import mlx.core as mx

from mlxkv.generation.decoder import Row
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.request import Request


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not begun."""


@dataclass(eq=False, slots=True)
class Prefilling:
    """Its prompt is computed, chunk by chunk.

    Args:
        generation: its answer.
        tokens: what is computed: the prompt, or what is kept of it and of the answer so far.
        steps: the chunks, once KV is held.
        needs_room: whether it goes on only when another request has ended.
        logits: `[1, V]` after the last chunk, until the answer joins the others.
    """

    generation: Generation
    tokens: list[int]
    steps: Generator[tuple[int, int], None, mx.array] | None = None
    needs_room: bool = False
    logits: mx.array | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Decoding:
    """Its answer is written, as a row of the decoder."""

    generation: Generation
    row: Row


@dataclass(frozen=True, slots=True)
class Ended:
    """Its last chunk or its error was told."""


State = Waiting | Prefilling | Decoding | Ended


@dataclass(eq=False)
class Task:
    """A request inside the scheduler.

    Args:
        request: what is asked for.
        tell: takes the chunks of the answer, and at last None or the error that ended it.
        is_cancelled: whether the rest is not wanted any more.
        owner: whose pages it shares.
        generation: its answer, prepared already; None to have it prepared when its turn comes.
        keeps_session: whether the session of `generation` keeps its KV when the answer has ended.
    """

    request: Request
    tell: Callable[[Chunk | BaseException | None], None]
    is_cancelled: Callable[[], bool]
    owner: str = ""
    generation: Generation | None = None
    keeps_session: bool = False
    state: State = field(default_factory=Waiting, init=False)

    @property
    def holds_kv(self) -> bool:
        """Whether prefill has begun."""
        match self.state:
            case Prefilling(steps=steps):
                return steps is not None
            case Decoding():
                return True
        return False
