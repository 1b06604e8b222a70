"""Texts to vectors: what is asked, and how the texts of several requests share batches.

Invariants:
- A batch has texts of any lengths and of any requests, at most `default_chunk()` tokens of them, or
  one text: there is no padding (`nn.embedder`), and a long request does not hold up a short one.
- Texts of a request go longest first, so that those of one length are computed together.
- Vectors wait for the last of their request: those that are there count as memory in use, and a
  request whose vectors, twice while they are joined, fit in no memory is refused before any.
- No KV is kept: attention goes both ways, so no text's beginning is worth anything to another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

import mlx.core as mx

from mlxkv.base.device import default_chunk
from mlxkv.base.units import human_bytes
from mlxkv.errors import (
    CheckpointError,
    ContextExceeded,
    Hint,
    MlxkvError,
    OutOfMemory,
    UsageError,
    contained,
)
from mlxkv.generation.embed_request import EmbedRequest
from mlxkv.memory.budget import Budget
from mlxkv.memory.embedding import BatchNeeds
from mlxkv.memory.types import is_allocation_failure, without_trace
from mlxkv.nn.embedder import Embedder, Texts
from mlxkv.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxkv.checkpoint.sentence import Sentence


@dataclass(frozen=True, slots=True)
class Vectors:
    """What an embedding model makes of a text.

    Args:
        sentence: prompts, and what follows the hidden states.
        n_dimensions: values of a vector.
        longest: tokens of a text at most.
    """

    sentence: Sentence
    n_dimensions: int
    longest: int

    @classmethod
    def of(cls, model: Embedder, context: int) -> Self:
        """Those of a model that has so much context."""
        sentence = model.config.sentence
        return cls(sentence, model.n_dimensions, min(sentence.max_tokens or context, context))


class TextTooLong(ContextExceeded):
    """A text of more tokens than an embedding model takes."""

    def __init__(self, i: int, n_tokens: int, most: int):
        super().__init__(n_tokens, most)
        self.text = (
            f"text {i + 1} has {n_tokens:,} tokens and the model takes {most:,}: shorten it, or "
            "have it cut"
        )
        self.hints = (Hint("truncate", True),)


def encode_texts(
    tokenizer: Tokenizer, sentence: Sentence, request: EmbedRequest, most: int
) -> list[list[int]]:
    """Token ids of each text behind its prompt, with the tokens that the model expects around it.

    Args:
        tokenizer: the model's.
        sentence: has the prompts.
        request: what is asked.
        most: tokens that a text may have.

    Raises:
        UsageError: no such prompt, or a text without tokens.
        TextTooLong: a text of more than `most`.
    """
    prompt, found = sentence.prompt(request.prompt), []
    for i, text in enumerate(request.texts):
        ids = tokenizer.encode(prompt + text)
        if not ids:
            raise UsageError(f"text {i + 1} is empty")
        if len(ids) > most:
            if not request.truncate:
                raise TextTooLong(i, len(ids), most)
            ids = tokenizer.cut(ids, most)
        found.append(ids)
    return found


def check_dimensions(size: int, dimensions: int | None) -> None:
    """Raise UsageError unless vectors of `size` values have that many."""
    if dimensions is not None and not (type(dimensions) is int and 1 <= dimensions <= size):
        raise UsageError(f"must be 1 to {size:,}; got {dimensions}", field="dimensions")


class EmbedJob:
    """One request's texts on their way to vectors.

    Args:
        ids: of each text.
        dimensions: see `EmbedRequest`.
        tell: called once, with the vectors `[N, D]` or an error.
        is_cancelled: whether nobody waits any more.
        owner: hash of the API key.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        dimensions: int | None,
        tell: Callable[[mx.array | Exception], None],
        is_cancelled: Callable[[], bool] = lambda: False,
        owner: str = "",
    ):
        self.ids, self.dimensions, self.owner = ids, dimensions, owner
        self.tell, self.is_cancelled = tell, is_cancelled
        self.pending = deque(sorted(range(len(ids)), key=lambda i: -len(ids[i])))
        self._rows: list[mx.array | None] = [None] * len(ids)
        self._n_missing = len(ids)

    @property
    def n_tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, self.ids))

    @property
    def n_done(self) -> int:
        """Texts whose vectors are there."""
        return len(self.ids) - self._n_missing

    def put(self, i: int, row: mx.array) -> bool:
        """Take the vector of one text; whether it was the last one missing."""
        self._rows[i] = row
        self._n_missing -= 1
        return not self._n_missing

    def vectors(self) -> mx.array:
        """All vectors, `[N, D]`."""
        return mx.stack([row for row in self._rows if row is not None])


class EmbedQueue:
    """The requests of one embedding model, computed batch by batch on the calling thread.

    Args:
        model: loaded; None for one that writes, which gets no requests.
        budget: its memory.
        longest: tokens of a text at most.
        tell: called with each request that comes or ends, and the counter that this adds to, as
            `Counts` has it: `requests`, `answered`, `failed` or `cancelled`.
    """

    def __init__(
        self,
        model: Embedder | None,
        budget: Budget,
        longest: int,
        tell: Callable[[EmbedJob, str], None] = lambda job, how: None,
    ):
        self._embedder, self._budget, self._tell = model, budget, tell
        self._longest = longest
        self._jobs: deque[EmbedJob] = deque()
        self._most = default_chunk()

    @cached_property
    def _model(self) -> Embedder:
        assert self._embedder is not None, "a model that writes has no vectors"
        return self._embedder

    @cached_property
    def _row_bytes(self) -> int:
        return 4 * self._model.n_dimensions

    @cached_property
    def _needs(self) -> BatchNeeds:
        return BatchNeeds(self._model, self._longest)

    def __len__(self) -> int:
        return len(self._jobs)

    def n_of(self, owner: str | None) -> int:
        """Requests of an owner, or of all for None."""
        return sum(owner in (None, job.owner) for job in list(self._jobs))

    def add(self, job: EmbedJob) -> None:
        """Queue a request, whose dimensions are checked."""
        self._tell(job, "requests")
        self._jobs.append(job)

    def step(self) -> None:
        """Compute one batch, and tell the requests that it completes."""
        for job in [job for job in self._jobs if job.is_cancelled()]:
            self._end(job, MlxkvError("the request was cancelled"), "cancelled")
        if not self._jobs or not (batch := self._next()):
            return
        try:
            self._compute(batch)
        except BaseException as error:
            if is_allocation_failure(error) and len(batch) > 1:
                self._put_back(batch)
                return
            for job in dict.fromkeys(job for job, _ in batch):
                self._end(job, without_trace(contained(error)))

    def stop(self, error: Exception) -> None:
        """End all requests with an error."""
        for job in list(self._jobs):
            self._end(job, error)

    def _next(self) -> list[tuple[EmbedJob, int]]:
        """The texts of the next batch, one of each request in turn.

        Empty where there is no room for the first of them, whose request has ended then.
        """
        waiting_bytes = self._row_bytes * sum(job.n_done for job in self._jobs)
        room = self._budget.limit_bytes - self._budget.used_bytes - waiting_bytes
        first = self._jobs[0]
        if not first.n_done and (n_bytes := 2 * self._row_bytes * len(first.ids)) > room:
            self._end(first, _no_room_for_all(len(first.ids), n_bytes, room))
            return []
        n_tokens = len(first.ids[first.pending[0]])
        most = max(self._needs.largest(room, self._most), n_tokens)
        if most == n_tokens and (n_bytes := self._needs.of(n_tokens)) > room:
            self._end(first, _no_room(n_tokens, n_bytes, room))
            return []
        chosen: list[tuple[EmbedJob, int]] = []
        waiting = deque(self._jobs)
        while waiting:
            job = waiting.popleft()
            if chosen and len(job.ids[job.pending[0]]) > most:
                continue
            i = job.pending.popleft()
            chosen.append((job, i))
            most -= len(job.ids[i])
            if job.pending:
                waiting.append(job)
        self._jobs.rotate(-1)
        return chosen

    def _compute(self, batch: list[tuple[EmbedJob, int]]) -> None:
        order = sorted(batch, key=lambda text: len(text[0].ids[text[1]]))
        ids = [job.ids[i] for job, i in order]
        tokens = mx.array([[token for text in ids for token in text]], mx.int32)
        rows = self._model.vectors(tokens, Texts.of([len(text) for text in ids]))
        if not mx.isfinite(rows).all().item():
            raise CheckpointError(
                "the model's vectors are not numbers: its weights are damaged",
                hints=[Hint("dtype", "float32")],
            )
        self._most = min(default_chunk(), 2 * self._most)
        for (job, i), row in zip(order, rows, strict=True):
            if job.put(i, row):
                self._complete(job)

    def _complete(self, job: EmbedJob) -> None:
        vectors = self._model.shortened(job.vectors(), job.dimensions)
        mx.eval(vectors)
        self._jobs.remove(job)
        self._tell(job, "answered")
        job.tell(vectors)

    def _put_back(self, batch: list[tuple[EmbedJob, int]]) -> None:
        """After MLX failed to allocate: the same texts in smaller batches."""
        self._most = max(1, sum(len(job.ids[i]) for job, i in batch) // 2)
        for job, i in reversed(batch):
            job.pending.appendleft(i)
        mx.clear_cache()

    def _end(self, job: EmbedJob, error: Exception, how: str = "failed") -> None:
        if job in self._jobs:
            self._jobs.remove(job)
            self._tell(job, how)
            job.tell(error)


def _no_room_for_all(n_texts: int, n_bytes: int, room: int) -> OutOfMemory:
    return OutOfMemory(
        f"the vectors of {n_texts:,} texts take {human_bytes(n_bytes)}, and the memory limit "
        f"leaves {human_bytes(max(0, room))}: send fewer at a time"
    )


def _no_room(n_tokens: int, n_bytes: int, room: int) -> OutOfMemory:
    return OutOfMemory(
        f"the vector of a text of {n_tokens:,} tokens takes {human_bytes(n_bytes)} to compute, and "
        f"the memory limit leaves {human_bytes(max(0, room))}"
    )
