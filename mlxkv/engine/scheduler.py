"""One loaded model and the requests that it answers, step by step, all on the thread that calls.

Invariants:
- A request is waiting, has its prompt computed, or decodes. `step` computes one chunk of one
  prompt, which `prompt_order` chooses, and one token of all that decode, so that nobody waits
  longer than a chunk takes.
- What goes wrong in a request ends that request. Its prefix is kept as pages, however it ended.
- Pages of one owner are never another's.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxkv.base.device import default_chunk
from mlxkv.engine.messages import Ask, Counts
from mlxkv.engine.policy import Pace, Prompt, next_prompt
from mlxkv.engine.runtime import keep_prefix
from mlxkv.errors import CheckpointError, KVCacheFull, MlxkvError
from mlxkv.generation.decoder import Allowed, Decoder, Drawn, Row
from mlxkv.generation.generation import Turn
from mlxkv.generation.outputs import Chunk, TokenLogprobs
from mlxkv.generation.request import Request
from mlxkv.generation.session import Session
from mlxkv.kv.types import first_kv_type
from mlxkv.llm.llm import LLM
from mlxkv.memory.types import ALLOCATION_ERRORS, is_allocation_failure, without_trace
from mlxkv.prefix.open import open_pages
from mlxkv.prefix.pages import Pages
from mlxkv.sampling.grammar import Masker, Maskers

_log = logging.getLogger(__name__)

STALL_S = 0.5
"""How long a chunk of one prompt may hold up the answers that are being written."""
MIN_CHUNK = 16
MAX_PROMPTS = 4
"""Prompts that are computed in turns; the others wait."""


@dataclass(eq=False)
class Task:
    """A request inside the engine.

    Args:
        ask: what is asked for.
        tell: takes the chunks of the answer, and at last None or the error that ended it.
        is_cancelled: whether nobody wants the rest.
    """

    ask: Ask
    tell: Callable[[Chunk | BaseException | None], None]
    is_cancelled: Callable[[], bool]
    turn: Turn | None = field(default=None, init=False)
    prompt: list[int] = field(default_factory=list, init=False)
    row: Row | None = field(default=None, init=False)
    masker: Masker | None = field(default=None, init=False)
    steps: Generator[tuple[int, int], None, mx.array] | None = field(default=None, init=False)
    logits: mx.array | None = field(default=None, init=False)
    was_begun: bool = field(default=False, init=False)
    waits_for_room: bool = field(default=False, init=False)

    @property
    def has_kv(self) -> bool:
        """Whether its prompt is being computed, or is."""
        return self.steps is not None or self.row is not None


class ServedModel:
    """A loaded model and its requests.

    Args:
        name: as requests name it.
        llm: the model.
        max_running: requests that decode at a time.
    """

    def __init__(self, name: str, llm: LLM, max_running: int):
        self.name, self.llm, self.max_running = name, llm, max_running
        self.counts = Counts()
        self.waiting: deque[Task] = deque()
        self.prompts: list[Task] = []
        self.running: dict[Row, Task] = {}
        self._decoder = Decoder(llm.model)
        self._pages: dict[str, Pages | None] = {"": llm.pages}
        self._maskers: Maskers | None = None
        self._pace = Pace(STALL_S, MIN_CHUNK, default_chunk())
        self._n_chunks = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.prompts or self.running)

    @property
    def n_sequences(self) -> int:
        """Requests that are being computed."""
        return len(self.running) + len(self.prompts)

    def tasks(self) -> Iterator[Task]:
        """All requests that have not ended."""
        yield from self.waiting
        yield from list(self.prompts)
        yield from list(self.running.values())

    def step(self) -> None:
        """One chunk of a prompt, and one token of every answer."""
        self._drop_cancelled()
        if self.waiting and len(self.prompts) < MAX_PROMPTS and self.n_sequences < self.max_running:
            self._begin(self.waiting.popleft())
        if (task := self._next_prompt()) is not None:
            self._prefill(task)
        if self.running:
            self._decode()

    def close(self) -> None:
        """Keep prefixes that are worth it, and forget the model."""
        for task in list(self.tasks()):
            self._end(task, MlxkvError("the model was unloaded"))
        self.waiting.clear()
        for pages in self._pages.values():
            if pages is not None:
                try:
                    pages.close()
                except Exception as error:  # the files of a model may be gone
                    _log.warning("prefixes are not kept: %s", error)

    def _drop_cancelled(self) -> None:
        for task in [task for task in self.tasks() if task.is_cancelled()]:
            self.counts.cancelled += 1
            if task in self.waiting:
                self.waiting.remove(task)
            self._end(task, None)

    def _begin(self, task: Task) -> None:
        """Find out what a request wants."""
        self.counts.requests += 1
        self.prompts.append(task)
        try:
            request = Request.of(**self._options(task.ask))
            session = Session(
                self.llm.model, self.llm.kv_type, self._pages_of(task.ask.owner), self.llm.budget
            )
            turn, text = self.llm.prepare(task.ask.prompt, request, session)
            task.turn = turn
            if task.ask.grammar is not None:
                if self._maskers is None:
                    self._maskers = Maskers(self.llm.tokenizer)
                task.masker = self._maskers.masker(task.ask.grammar, text)
            task.prompt = turn.bound.remaining(turn.sequence)
            self.llm.budget.begin()
        except Exception as error:  # one request's, whatever it is
            self._end(task, error)

    def _options(self, ask: Ask) -> dict[str, Any]:
        """A request's options; what it leaves open is what the model's maker recommends."""
        return {**self.llm.recommended.chosen(), **ask.options}

    def _pages_of(self, owner: str) -> Pages | None:
        if owner not in self._pages:
            llm = self.llm
            self._pages[owner] = pages = open_pages(
                llm.model, llm.path, first_kv_type(llm.kv_type), 0, owner=owner
            )
            if pages is not None:
                llm.budget.adopt(pages)
        return self._pages[owner]

    def _chunk(self) -> int | None:
        """Tokens of a prompt that may hold the others up; None where nobody is held up."""
        return self._pace.n_tokens if self.running else None

    def _next_prompt(self) -> Task | None:
        """The request whose prompt the next chunk is of; None while all wait for room."""
        ready = [task for task in self.prompts if not task.waits_for_room]
        if not ready:
            return None
        prompts = []
        for task in ready:
            assert task.turn is not None
            session = task.turn.session
            n_computed = None if task.steps is None else session.n_held
            owner = task.ask.owner if session.gives_pages else None
            prompts.append(Prompt(task.prompt, n_computed, owner))
        self._n_chunks += 1
        return ready[next_prompt(prompts, for_oldest=self._n_chunks % 2 == 1)]

    def _prefill(self, task: Task) -> None:
        turn = task.turn
        assert turn is not None
        try:
            if task.steps is None:  # only now: the prompt before may have left pages of it
                if task.was_begun:
                    turn.session.restore(task.prompt)
                else:
                    task.was_begun, task.prompt = True, turn.begin()
                task.steps = turn.session.prefilling(task.prompt, self._chunk)
            start, held = time.perf_counter(), turn.session.n_held
            next(task.steps)
            n = turn.session.n_held - held
            if n > 0:
                self._pace.took(n, time.perf_counter() - start)
            return
        except StopIteration as stop:
            task.logits, stop.value = stop.value, None
        except KVCacheFull as error:
            others = [other for other in self.tasks() if other.has_kv and other is not task]
            if others:
                self._wait_for_room(task)
            else:
                self._end(task, error)
            return
        except Exception as error:  # one request's, whatever it is
            self._end(task, error)
            return
        task.steps = None
        self.prompts.remove(task)
        self._add(task)

    def _wait_for_room(self, task: Task) -> None:
        """Others have the memory: a prompt goes on, from its pages, when one of them has ended."""
        assert task.turn is not None
        try:
            keep_prefix(task.turn.session)
            task.turn.session.reset()
        except Exception as error:  # one request's, whatever it is
            self._end(task, error)
            return
        task.steps, task.waits_for_room = None, True

    def _add(self, task: Task) -> None:
        """A prompt is computed: its answer joins the others."""
        turn, logits = task.turn, task.logits
        assert turn is not None and logits is not None
        task.logits = None  # whoever starts over is the last to know them
        n = len(turn.sequence)
        room = turn.bound.context - (n - turn.bound.n_dropped(n))
        left = None if turn.limit is None else turn.limit - turn.n_generated
        row = Row(
            turn.session,
            logits,
            turn.sampler,
            room if left is None else min(room, left),
            None if task.masker is None else _allowed(task.masker, self.llm.config.vocab_size),
            task.ask.logprobs,
        )
        try:
            self._decoder.add(row)
        except Exception as error:  # one request's, whatever it is
            del row, logits
            if is_allocation_failure(error):
                self._again(task, without_trace(error))
            else:
                self._end(task, error)
            return
        task.row = row
        self.running[row] = task

    def _decode(self) -> None:
        try:
            drawn = self._decoder.step()
        except ALLOCATION_ERRORS as error:
            if not is_allocation_failure(error):
                raise
            self._start_over(without_trace(error))
            return
        for one in drawn:
            task = self.running.get(one.row)
            if task is not None:
                self._take(task, one)

    def _start_over(self, error: BaseException) -> None:
        """MLX could not allocate: all sequences go on from their pages, one after the other."""
        tasks = list(self.running.values())
        self.running.clear()
        for task in reversed(tasks):
            self._again(task, error)

    def _again(self, task: Task, error: BaseException) -> None:
        """MLX could not allocate: a request goes on from its pages, if anything gives way."""
        turn = task.turn
        assert turn is not None
        task.row = None
        held = turn.bound.remaining(turn.sequence)
        try:
            turn.session.start_over(held, error)
        except Exception as full:
            self._end(task, full)
            return
        turn.sampler.rewind(turn.n_generated)
        task.prompt = held
        task.steps = turn.session.prefilling(held, self._chunk)
        self.prompts.insert(0, task)

    def _take(self, task: Task, drawn: Drawn) -> None:
        """A step's token of one answer."""
        turn, row = task.turn, task.row
        assert turn is not None and row is not None
        if drawn.token is None:
            if isinstance(drawn.error, CheckpointError):
                turn.session.discard()
            self._end(task, drawn.error)
            return
        self.counts.generated_tokens += 1
        try:
            chunk = turn.took(drawn.token, self._logprobs(drawn))
            if task.masker is not None and not turn.over:
                task.masker.advance(drawn.token)
                if task.masker.finished:
                    task.tell(chunk)
                    self._end(task, turn.ended("stop"))
                    return
        except Exception as error:  # one request's, whatever it is
            self._end(task, error)
            return
        if turn.over:
            self._end(task, chunk)
            return
        task.tell(chunk)
        if len(row.tokens) == row.max_tokens:
            self._shift(task)

    def _shift(self, task: Task) -> None:
        """The context is full, and the oldest tokens go: what remains is computed like a prompt."""
        turn = task.turn
        assert turn is not None and task.row is not None
        del self.running[task.row]
        task.row = None
        try:
            task.prompt = turn.bound.remaining(turn.sequence)
            turn.session.restore(task.prompt)
            task.steps = turn.session.prefilling(task.prompt, self._chunk)
        except Exception as error:  # one request's, whatever it is
            self._end(task, error)
            return
        self.prompts.insert(0, task)

    def _logprobs(self, drawn: Drawn) -> TokenLogprobs | None:
        if drawn.logprob is None or drawn.token is None:
            return None
        top = tuple(self._token(token, logprob) for token, logprob in drawn.top)
        return self._token(drawn.token, drawn.logprob, top)

    def _token(
        self, token: int, logprob: float, top: tuple[TokenLogprobs, ...] = ()
    ) -> TokenLogprobs:
        data = self.llm.tokenizer.bytes_of(token)
        return TokenLogprobs(token, data.decode(errors="replace"), data, logprob, top)

    def _end(self, task: Task, last: Chunk | BaseException | None) -> None:
        """A request is over, with a last chunk, an error, or because nobody wants it."""
        if task.row is not None:
            self._decoder.remove(task.row)
            self.running.pop(task.row, None)
        if task in self.prompts:
            self.prompts.remove(task)
        if task.steps is not None:
            task.steps.close()
        for other in self.prompts:
            other.waits_for_room = False
        if isinstance(last, BaseException):
            if not isinstance(last, MlxkvError):
                _log.error("a request failed", exc_info=last)
            last = without_trace(last)
        if (turn := task.turn) is not None:
            try:
                if isinstance(last, KVCacheFull) and turn.n_generated:
                    last = turn.ended("memory", last)
                keep_prefix(turn.session)
                turn.session.reset()  # whoever still knows the task keeps no KV
            except Exception:
                _log.exception("a request did not end in order")
        if isinstance(last, Chunk):
            self.counts.answered += 1
            self._count(last)
            task.tell(last)
            task.tell(None)
            return
        if last is not None:
            self.counts.failed += 1
        task.tell(last)

    def _count(self, last: Chunk) -> None:
        stats, counts = last.stats, self.counts
        if stats is None:
            return
        counts.prompt_tokens += stats.prompt_tokens
        counts.restored_ram_tokens += stats.restored_ram_tokens
        counts.restored_ssd_tokens += stats.restored_ssd_tokens
        counts.computed_tokens += stats.computed_tokens
        if stats.miss is not None:
            reason = stats.miss.reason
            counts.misses[reason] = counts.misses.get(reason, 0) + 1


def _allowed(masker: Masker, n_vocab: int) -> Allowed:
    """What a grammar allows next; the engine advances it."""
    return lambda _: masker.allowed(n_vocab)
