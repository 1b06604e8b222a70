"""One loaded model and its requests, computed step by step on the calling thread.

Invariants:
- A request's `state` is waiting, prefilling, decoding or ended. `step` computes one chunk of one
  prompt, which `policy` chooses, and one token of every answer, so that an answer waits no longer
  than a chunk takes.
- An error in a request ends that request alone. Its prefix is kept as pages, however it ended.
- Owners never share pages.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator

from mlxkv.base.device import default_chunk
from mlxkv.engine.clients import Clients
from mlxkv.engine.messages import Counts
from mlxkv.engine.next_turn import NextTurns
from mlxkv.engine.policy import Pace, PendingPrompt, next_prompt
from mlxkv.engine.prompt import prepare, start
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.tasks import Decoding, Ended, Prefilling, State, Task, Waiting, keep_prefix
from mlxkv.errors import CheckpointError, KVCacheFull, MlxkvError
from mlxkv.generation.decoder import Decoder, Row, RowResult
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk, TokenLogprobs
from mlxkv.generation.prompt_logprobs import token_logprobs
from mlxkv.generation.request import is_messages
from mlxkv.generation.session import Session
from mlxkv.memory.needs import MIN_CHUNK
from mlxkv.memory.types import ALLOCATION_ERRORS, is_allocation_failure, without_trace

_log = logging.getLogger(__name__)

STALL_S = 0.5
"""How long a chunk of a prompt may delay the next token of running answers."""
MAX_PROMPTS = 4
"""Prompts that are prefilled in turns; the others wait."""


class Scheduler:
    """A loaded model and its requests, of which `max_running` run at a time.

    Attributes:
        next_turns: what can be computed of next turns; `next_turns.step` may be called when the
            scheduler is idle.
    """

    def __init__(self, runtime: Runtime, max_running: int, next_turns: bool = False):
        self.runtime, self.max_running = runtime, max_running
        self.counts = Counts()
        self.clients = Clients()
        self.next_turns = NextTurns(runtime, self.counts, next_turns)
        self.waiting: deque[Task] = deque()
        self._prefilling: list[Task] = []
        self._decoding: dict[Row, Task] = {}
        self._decoder = Decoder(runtime.model)
        self._pace = Pace(STALL_S, MIN_CHUNK, default_chunk())
        self._n_chunks = 0

    @property
    def is_idle(self) -> bool:
        """Whether it has no requests."""
        return not (self.waiting or self._prefilling or self._decoding)

    @property
    def n_sequences(self) -> int:
        """Requests that are prefilling or decoding."""
        return len(self._decoding) + len(self._prefilling)

    def tasks(self) -> Iterator[Task]:
        """All requests that have not ended."""
        yield from list(self.waiting)
        yield from list(self._prefilling)
        yield from list(self._decoding.values())

    def add(self, task: Task) -> None:
        """Queue a request; it starts when there is a place for it."""
        self.waiting.append(task)

    def step(self) -> None:
        """Compute one chunk of a prompt, and one token of every answer."""
        self.next_turns.pause()
        self._drop_cancelled()
        has_place = len(self._prefilling) < MAX_PROMPTS and self.n_sequences < self.max_running
        if self.waiting and has_place:
            self._begin(self.waiting.popleft())
        if (task := self._next_prompt()) is not None:
            self._prefill(task, task.state)  # pyright: ignore[reportArgumentType]
        if self._decoding:
            self._decode()

    def stop(self, error: MlxkvError | None = None) -> None:
        """End all requests, with an error if there is one; their prefixes are kept."""
        for task in self.tasks():
            self._end(task, error)
        self.next_turns.clear()

    def _drop_cancelled(self) -> None:
        for task in [task for task in self.tasks() if task.is_cancelled()]:
            self.counts.cancelled += 1
            self._end(task, None)

    def _begin(self, task: Task) -> None:
        """Render and encode a request's prompt, and start prefill."""
        self.counts.requests += 1
        if is_messages(task.request.prompt):
            self.next_turns.forget(task.owner, task.request.prompt)  # pyright: ignore[reportArgumentType]
        try:
            if task.generation is None:
                prepared = prepare(self.runtime, task.request, task.owner)
                session = self.runtime.session(task.owner)
                task.generation = start(self.runtime, task.request, prepared, session)
            task.state = Prefilling(task.generation, task.generation.remaining())
            self._prefilling.append(task)
            self.runtime.budget.begin()
        except Exception as error:
            self._end(task, error)

    def _chunk(self) -> int | None:
        """Tokens of a chunk while answers are decoding; None for any number otherwise."""
        return self._pace.n_tokens if self._decoding else None

    def _next_prompt(self) -> Task | None:
        """The request whose prompt gets the next chunk; None while all wait for room."""
        ready, prompts = [], []
        for task in self._prefilling:
            state = task.state
            assert isinstance(state, Prefilling)
            if state.needs_room:
                continue
            session = state.generation.session
            n_computed = None if state.steps is None else session.n_held
            owner = task.owner if session.gives_pages else None
            ready.append(task)
            prompts.append(PendingPrompt(state.tokens, n_computed, owner))
        if not ready:
            return None
        self._n_chunks += 1
        return ready[next_prompt(prompts, for_oldest=self._n_chunks % 2 == 1)]

    def _prefill(self, task: Task, state: Prefilling) -> None:
        session = state.generation.session
        try:
            if state.steps is None:  # not earlier: another prompt may have left pages of it
                state.tokens = state.generation.restore()
                state.steps = session.prefilling(state.tokens, self._chunk)
            started, held = time.perf_counter(), session.n_held
            progress = next(state.steps)
            n = session.n_held - held
            if n > 0:
                self._pace.record(n, time.perf_counter() - started)
            if task.request.on_progress is not None:
                task.request.on_progress(*progress)
            return
        except StopIteration as stop:
            # No local variable: a restart in `_join` must be able to free the logits.
            state.logits, stop.value = stop.value, None
        except KVCacheFull as error:
            if any(other.holds_kv for other in self.tasks() if other is not task):
                self._wait_for_room(task, state)
            else:
                self._end(task, error)
            return
        except Exception as error:
            self._end(task, error)
            return
        self._prefilling.remove(task)
        self._join(task, state)

    def _wait_for_room(self, task: Task, state: Prefilling) -> None:
        """Pause a prompt until another request ends; it then resumes from its pages."""
        try:
            keep_prefix(state.generation.session)
            state.generation.session.reset()
        except Exception as error:
            self._end(task, error)
            return
        state.steps, state.needs_room = None, True

    def _join(self, task: Task, state: Prefilling) -> None:
        """Start decoding after prefill."""
        generation, logits = state.generation, state.logits
        assert logits is not None
        state.logits, masker, n_vocab = None, generation.masker, self.runtime.config.vocab_size
        row = Row(
            generation.session,
            logits,
            generation.sampler,
            generation.n_left,
            None if masker is None else lambda _: masker.allowed(n_vocab),
            task.request.logprobs,
            generation.answer,
            generation.ends,
            task.request.min_tokens - generation.n_generated,
        )
        try:
            self._decoder.add(row)
        except Exception as error:
            del row, logits
            if is_allocation_failure(error):
                self._again(task, generation, without_trace(error))
            else:
                self._end(task, error)
            return
        task.state = Decoding(generation, row)
        self._decoding[row] = task

    def _decode(self) -> None:
        try:
            results = self._decoder.step()
        except ALLOCATION_ERRORS as error:
            if not is_allocation_failure(error):
                raise
            self._start_over(without_trace(error))
            return
        for result in results:
            task = self._decoding.get(result.row)
            if task is not None:
                self._handle(task, task.state, result)  # pyright: ignore[reportArgumentType]

    def _start_over(self, error: BaseException) -> None:
        """After MLX failed to allocate: restart all sequences from their pages, one by one."""
        tasks = list(self._decoding.values())
        self._decoding.clear()
        for task in reversed(tasks):
            assert isinstance(task.state, Decoding)
            self._again(task, task.state.generation, error)

    def _again(self, task: Task, generation: Generation, error: BaseException) -> None:
        """After MLX failed to allocate: restart a request from its pages if memory can be freed."""
        tokens = generation.remaining()
        task.state = Prefilling(generation, tokens)
        try:
            generation.session.start_over(tokens, error)
        except Exception as full:
            self._end(task, full)
            return
        generation.sampler.rewind(generation.n_generated)
        self._prefill_again(task, generation, tokens)

    def _handle(self, task: Task, state: Decoding, result: RowResult) -> None:
        """Handle a step's result for one answer."""
        generation, row = state.generation, state.row
        if result.token is None:
            if isinstance(result.error, CheckpointError):
                generation.session.discard()
            self._end(task, result.error)
            return
        self.counts.generated_tokens += 1
        try:
            chunk = generation.add(result.token, self._logprobs(result))
            if generation.masker is not None and not generation.is_over:
                generation.masker.advance(result.token)
                if generation.masker.finished:
                    task.tell(chunk)
                    self._end(task, generation.end("stop"))
                    return
        except Exception as error:
            self._end(task, error)
            return
        if generation.is_over:
            self._end(task, chunk)
            return
        task.tell(chunk)
        if len(row.tokens) == row.max_tokens:
            self._shift(task, state)

    def _shift(self, task: Task, state: Decoding) -> None:
        """The context is full: drop the oldest tokens, and prefill the remaining ones."""
        generation = state.generation
        del self._decoding[state.row]
        tokens = generation.remaining()
        task.state = Prefilling(generation, tokens)
        try:
            generation.session.restore(tokens)
        except Exception as error:
            self._end(task, error)
            return
        self._prefill_again(task, generation, tokens)

    def _prefill_again(self, task: Task, generation: Generation, tokens: list[int]) -> None:
        """Prefill a sequence before other prompts, as its answer has begun."""
        steps = generation.session.prefilling(tokens, self._chunk)
        task.state = Prefilling(generation, tokens, steps)
        self._prefilling.insert(0, task)

    def _logprobs(self, result: RowResult) -> TokenLogprobs | None:
        if result.logprob is None or result.token is None:
            return None
        tokenizer = self.runtime.tokenizer
        top = tuple(token_logprobs(tokenizer, token, logprob) for token, logprob in result.top)
        return token_logprobs(tokenizer, result.token, result.logprob, top)

    def _end(self, task: Task, last: Chunk | BaseException | None) -> None:
        """End a request with its last chunk, an error, or None if it was cancelled."""
        state, task.state = task.state, Ended()
        self._forget(task, state)
        for other in self._prefilling:
            assert isinstance(other.state, Prefilling)
            other.state.needs_room = False
        if isinstance(last, MlxkvError):
            last = without_trace(last)
        if isinstance(state, Prefilling | Decoding):
            generation = state.generation
            try:
                if isinstance(last, KVCacheFull) and generation.n_generated:
                    last = generation.end("memory", last)
                self._keep(task, generation.session)
                if isinstance(last, Chunk):
                    self.next_turns.add(task, generation, last)
                if not task.keeps_session:
                    generation.session.reset()  # references to the task may outlive it
            except Exception:
                _log.exception("ending a request failed")
        if isinstance(last, Chunk):
            self.counts.answered += 1
            self._count(task, last)
            task.tell(last)
            task.tell(None)
            return
        if last is not None:
            self.counts.failed += 1
        task.tell(last)

    def _forget(self, task: Task, state: State) -> None:
        match state:
            case Waiting():
                if task in self.waiting:
                    self.waiting.remove(task)
            case Prefilling(steps=steps):
                if task in self._prefilling:
                    self._prefilling.remove(task)
                if steps is not None:
                    steps.close()
            case Decoding(row=row):
                self._decoder.remove(row)
                self._decoding.pop(row, None)

    def _keep(self, task: Task, session: Session) -> None:
        """Keep a sequence's prefix, and longest what its client's sessions share."""
        links, owner = keep_prefix(session), task.owner
        if not task.client:
            return
        try:
            pages = self.runtime.pages_of(owner)
            self.clients.ended(owner, task.client, task.request.prompt, links, pages)
        except Exception as error:
            _log.warning("what sessions share was not kept: %s", error)

    def _count(self, task: Task, last: Chunk) -> None:
        stats, counts = last.stats, self.counts
        if stats is None:
            return
        self.clients.count(task.owner, task.client, stats)
        counts.prompt_tokens += stats.prompt_tokens
        counts.restored_ram_tokens += stats.restored_ram_tokens
        counts.restored_ssd_tokens += stats.restored_ssd_tokens
        counts.computed_tokens += stats.computed_tokens
        if stats.miss is not None:
            reason = stats.miss.reason
            counts.misses[reason] = counts.misses.get(reason, 0) + 1
