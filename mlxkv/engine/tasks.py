"""A request inside the scheduler, and its state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import mlx.core as mx

from mlxkv.generation.decoder import Row
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.request import Request
from mlxkv.generation.session import Session
from mlxkv.prefix.layout import Link

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not begun."""


@dataclass(eq=False, slots=True)
class Prefilling:
    """Its prompt is computed, chunk by chunk.

    Args:
        generation: its answer.
        tokens: tokens to compute: the prompt, or the kept part of prompt and answer.
        steps: the chunks; None until prefill begins.
        needs_room: whether it waits for another request to end.
        logits: `[1, V]` after the last chunk, until decoding begins.
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
    """Its last chunk or its error was delivered."""


State = Waiting | Prefilling | Decoding | Ended


@dataclass(eq=False)
class Task:
    """A request inside the scheduler.

    Args:
        request: the request.
        tell: receives the chunks of the answer, then None or the error that ended it.
        is_cancelled: whether the request was cancelled.
        owner: owner of its pages.
        generation: its answer; None to make it when the request starts.
        keeps_session: whether the session of `generation` keeps its KV after the answer.
        client: the program that asks; empty where that is not known.
    """

    request: Request
    tell: Callable[[Chunk | BaseException | None], None]
    is_cancelled: Callable[[], bool]
    owner: str = ""
    generation: Generation | None = None
    keeps_session: bool = False
    client: str = ""
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


def keep_prefix(session: Session) -> list[Link]:
    """Keep a sequence's prefix, and return its pages; a failure does not affect its answer."""
    try:
        return session.finish()
    except Exception as error:
        _log.warning("a prefix was not kept: %s", error)
        return []
