"""A request inside the scheduler, and its state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxkv.base.faults import log_fault
from mlxkv.errors import KVCacheFull, contained
from mlxkv.generation.asleep import Asleep, Written
from mlxkv.generation.decoder import Row
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.request import Request
from mlxkv.generation.session import Session
from mlxkv.prefix.layout import Link

if TYPE_CHECKING:
    from mlxkv.sampling.grammar_compiler import Compiling

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Waiting:
    """Not begun.

    Args:
        is_long: whether its prompt is prepared on another thread; None until that is asked.
        has_grammar: whether its answer follows a grammar; the same.
    """

    is_long: bool | None = None
    has_grammar: bool | None = None


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
        label: by which its answer is found while it sleeps; empty for none.
        note: see `Ask`, and so is `durable`.
        asleep: where its answer was put away; None if it begins.
        bed: file of its answer; empty for none.
        kept: what that has of the answer; None if it does not say how the answer begins.
        has_begun: whether it has left the queue before: it may have given its place up.
        decodes_alone: whether a batch that it was in failed: it may be the cause.
        starts_again: whether the engine's loop failed while it was here: it may be the cause.
        compiling: its grammar, which is known while something holds this; None if it has none.
    """

    request: Request
    tell: Callable[[Chunk | BaseException | None], None]
    is_cancelled: Callable[[], bool]
    owner: str = ""
    generation: Generation | None = None
    keeps_session: bool = False
    client: str = ""
    label: str = ""
    note: Callable[[], Mapping[str, Any]] | None = None
    durable: bool = False
    asleep: Asleep | None = field(default=None, init=False)
    bed: str = field(default="", init=False)
    kept: Written | None = field(default=None, init=False)
    state: State = field(default_factory=Waiting, init=False)
    has_begun: bool = field(default=False, init=False)
    decodes_alone: bool = field(default=False, init=False)
    starts_again: bool = field(default=False, init=False)
    compiling: Compiling | None = field(default=None, init=False)

    @property
    def is_scored(self) -> bool:
        """Whether its prompt's tokens get log-probabilities."""
        return self.request.prompt_logprobs is not None

    @property
    def holds_kv(self) -> bool:
        """Whether prefill has begun."""
        match self.state:
            case Prefilling(steps=steps):
                return steps is not None
            case Decoding():
                return True
        return False


def prefilling(task: Task) -> Prefilling:
    """The state of a request whose prompt is computed."""
    assert isinstance(task.state, Prefilling)
    return task.state


def keep_prefix(session: Session) -> list[Link]:
    """Keep a sequence's prefix, and return its pages; a failure does not affect its answer."""
    try:
        return session.finish()
    except BaseException as error:
        _log.warning("a prefix was not kept: %s", contained(error))
        return []


def quietly(what: str, function: Callable[[], object]) -> None:
    """Run a part of a request's end; if it fails, that is logged and the answer not affected."""
    try:
        function()
    except BaseException as error:
        log_fault(what, contained(error))


def last_chunk(generation: Generation, full: KVCacheFull) -> Chunk | Exception:
    """The end of an answer that memory ended; the error where it cannot be made."""
    try:
        return generation.end("memory", full)
    except BaseException as error:
        return contained(error)
