"""Embedding models in the engine: what each kind of model is told that it cannot do, and the way of
a request for vectors."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx

from mlxkv.engine.messages import EmbedAsk, Embeddings
from mlxkv.engine.runtime import Runtime, TextSide
from mlxkv.errors import UsageError
from mlxkv.generation.embed import EmbedJob, EmbedQueue, Vectors, check_dimensions, encode_texts
from mlxkv.generation.embed_request import EmbedRequest
from mlxkv.nn.embedder import Embedder

if TYPE_CHECKING:
    from mlxkv.engine.tally import Tally

T = TypeVar("T")


def queue_of(runtime: Runtime, tally: Tally | None = None) -> EmbedQueue:
    """The requests of an embedding model; one that writes never has any.

    Args:
        runtime: the model.
        tally: counts the requests; None for none.
    """

    def count(job: EmbedJob, what: str) -> None:
        if tally is not None:
            n = job.n_tokens if what == "answered" else 0
            tally.count(job.owner, prompt_tokens=n, computed_tokens=n, **{what: 1})

    model = runtime.model if isinstance(runtime.model, Embedder) else None
    longest = 1 if runtime.vectors is None else runtime.vectors.longest
    return EmbedQueue(model, runtime.budget, longest, count)


def vectors_of(side: TextSide) -> Vectors:
    """What an embedding model makes.

    Raises:
        UsageError: the model writes.
    """
    if side.vectors is None:
        raise UsageError(
            "this model generates text and has no meaningful embeddings: choose an embedding "
            "model, such as google/embeddinggemma-300m"
        )
    return side.vectors


def encoded(side: TextSide, request: EmbedRequest) -> list[list[int]]:
    """Token ids of a request's texts; on any thread.

    Raises:
        UsageError: a model that writes, no such prompt, no such size, or a text without tokens.
        ContextExceeded: a text of more tokens than the model takes.
    """
    vectors = vectors_of(side)
    check_dimensions(vectors.n_dimensions, request.dimensions)
    return encode_texts(side.tokenizer, vectors.sentence, request, vectors.longest)


def embedded(runtime: Runtime, request: EmbedRequest) -> mx.array:
    """Vectors float32 `[N, D]` of a request's texts, computed on this thread.

    Raises:
        UsageError, ContextExceeded: as `encoded`.
        OutOfMemory: a text takes more memory than there is.
    """
    ids, queue = encoded(runtime, request), queue_of(runtime)
    future: Future[mx.array] = Future()
    queue.add(EmbedJob(ids, request.dimensions, lambda found: complete(future, found)))
    while not future.done():
        queue.step()
    return future.result()


def complete(future: Future[T], found: T | Exception) -> None:
    """Complete a future with a job's vectors or its error, unless nobody waits for it."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(found, Exception):
            future.set_exception(found)
        else:
            future.set_result(found)


def rows_of(vectors: mx.array) -> list[array[float]]:
    """Vectors `[N, D]` as arrays that need no MLX."""
    data, n_bytes = bytes(memoryview(vectors)), vectors.shape[1] * 4  # pyright: ignore
    return [array("f", data[at : at + n_bytes]) for at in range(0, len(data), n_bytes)]


class EngineJob(EmbedJob):
    """A request on its way from an event loop to the engine's thread.

    Args:
        ask: the request.
        ids: of its texts.

    Attributes:
        future: completed with the vectors, as `Embeddings`, or an error.
    """

    def __init__(self, ask: EmbedAsk, ids: Sequence[Sequence[int]]):
        self.future: Future[Embeddings] = Future()
        super().__init__(ids, ask.request.dimensions, self._told, self.future.cancelled, ask.owner)

    def _told(self, found: mx.array | Exception) -> None:
        if isinstance(found, mx.array):
            complete(self.future, Embeddings(rows_of(found), self.n_tokens))
        else:
            complete(self.future, found)
