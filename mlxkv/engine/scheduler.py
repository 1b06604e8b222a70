"""One loaded model and its requests, computed step by step on the calling thread.

Invariants:
- A request's `state` is waiting, prefilling, decoding or ended. `step` computes one chunk of one
  prompt, which `policy` chooses, and one token of every answer: none waits longer than for a chunk.
- Whatever a request raises ends that request alone. Its prefix is kept as pages, however it ended.
  Where a batch fails and it is not known by which row, each of its rows goes on in a batch of its
  own, from its pages.
- Owners never share pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from mlxkv.base.device import default_chunk
from mlxkv.base.faults import log_fault
from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.ahead.next_turn import NextTurns
from mlxkv.engine.asleep.answers import Sleep, begin_answer, chunks_of
from mlxkv.engine.clients import Clients
from mlxkv.engine.embedding import queue_of
from mlxkv.engine.queue.fetching import Fetching
from mlxkv.engine.queue.policy import MAX_PROMPTS, Pace, Paces
from mlxkv.engine.queue.shares import Turns, gives_place
from mlxkv.engine.queue.waiting import WaitingTasks
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.tally import Tally, count_end
from mlxkv.engine.tasks import (
    Decoding,
    Ended,
    Prefilling,
    State,
    Task,
    Waiting,
    keep_prefix,
    last_chunk,
    prefilling,
    quietly,
)
from mlxkv.errors import CheckpointError, InternalError, KVCacheFull, MlxkvError, contained
from mlxkv.generation.decoder import Decoder, Row, RowResult
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.prompt_logprobs import answer_logprobs
from mlxkv.memory.needs import MIN_CHUNK
from mlxkv.memory.types import is_allocation_failure, without_trace


class Scheduler:
    """A loaded model and its requests, of which `max_running` run at a time.

    Attributes:
        next_turns: computes next turns; `next_turns.step` may be called when this is idle.
        sleep: puts answers away; `embedding`: requests to an embedding model.
    """

    def __init__(self, runtime: Runtime, max_running: int, idle: IdleCompute | None = None):
        self.runtime, self.max_running, self.sleep = runtime, max_running, Sleep(None, runtime.path)
        self.tally, self.clients = Tally(), Clients()
        self.counts = self.tally.total
        self.next_turns = NextTurns(runtime, self.tally, self.clients, idle)
        self.fetching = Fetching(runtime, self.clients, self.tally, idle)
        self._paces = Paces(MIN_CHUNK, default_chunk())
        self.waiting, self.embedding = WaitingTasks(runtime), queue_of(runtime, self.tally)
        self._empty()

    def _empty(self) -> None:
        self._turns = Turns()
        self._prefilling: list[Task] = []
        self._decoding: dict[Row, Task] = {}
        self._decoder = self.runtime.decoder()
        self._alone: dict[Row, Decoder] = {}  # rows of batches that failed

    @property
    def is_idle(self) -> bool:
        """Whether it has no requests."""
        return not (self.waiting or self._prefilling or self._decoding or self.embedding)

    @property
    def n_sequences(self) -> int:
        """Requests that are prefilling, decoding or being embedded."""
        return len(self._decoding) + len(self._prefilling) + len(self.embedding)

    def tasks(self) -> Iterator[Task]:
        """All requests that have not ended."""
        yield from list(self.waiting)
        yield from list(self._prefilling)
        yield from list(self._decoding.values())

    def add(self, task: Task) -> None:
        """Queue a request; it starts when there is a place."""
        self.waiting.append(task)
        quietly("fetching pages failed", lambda: self.fetching.arrived(task))

    def step(self) -> None:
        """Compute a batch of texts, one chunk of a prompt, and one token of every answer."""
        self.embedding.step()
        quietly("pausing a next turn failed", self.next_turns.pause)
        self._drop_cancelled()
        if self.waiting and not (self._prefilling or self._decoding):
            self.waiting.wait_for_grammars()
        self._admit()
        if (task := self._turns.next(self._prefilling)) is not None:
            self._prefill(task, task.state)  # pyright: ignore[reportArgumentType]
        if self._decoding:
            started = time.perf_counter()
            self._decode()
            if task is None:
                self._paces.stepped(time.perf_counter() - started)

    def stop(self, error: MlxkvError | None = None) -> None:
        """End all requests, with an error if there is one; their prefixes are kept."""
        self.embedding.stop(error or MlxkvError("the model was unloaded"))
        for task in self.tasks():
            self._end(task, error)
        quietly("forgetting next turns failed", self.next_turns.clear)

    def start_again(self, error: MlxkvError) -> None:
        """The loop failed between steps: answers go on from pages, and end the second time."""
        for task in [*self.tasks()][::-1]:
            if task.starts_again:
                self._end(task, error)
            elif not isinstance(task.state, Waiting):
                self._put_back(task)
            task.starts_again = True
        quietly("forgetting next turns failed", self.next_turns.clear)
        self._empty()

    def _drop_cancelled(self) -> None:
        for task in [task for task in self.tasks() if task.is_cancelled()]:
            self.tally.count(task.owner, cancelled=1)
            self._end(task, None)

    def _admit(self) -> None:
        """Begin the next waiting request, if there is a place for it."""
        owner = self.waiting.next_owner([*self._prefilling, *self._decoding.values()])
        n_prompts = sum(task.owner == owner for task in self._prefilling)
        if owner is None or (n_prompts and len(self._prefilling) >= MAX_PROMPTS):
            return
        if self.n_sequences >= self.max_running:
            self._make_place(owner)
        if self.n_sequences < self.max_running:
            self._begin(self.waiting.pop(owner))

    def _make_place(self, owner: str) -> None:
        """Have another owner's answer wait if this owner has less than its share."""
        running = [*self._decoding.values(), *self._prefilling]
        if (task := gives_place(owner, running, self.max_running)) is not None:
            self._put_back(task)

    def _put_back(self, task: Task) -> None:
        """Have a running request wait for a place, and go on from its pages."""
        state = task.state
        assert isinstance(state, Prefilling | Decoding)
        if self._put_away(task, state):
            task.generation, task.state = state.generation, Waiting()
            self.waiting.put_back(task)

    def _put_away(self, task: Task, state: Prefilling | Decoding) -> bool:
        """Take a running request out, its KV kept as pages; False if it failed, and has ended."""
        session, sampler = state.generation.session, state.generation.sampler
        try:
            self._forget(task, state)
            keep_prefix(session)
            session.reset()
            sampler.rewind(state.generation.n_generated)
        except BaseException as error:
            self._end(task, contained(error))
            return False
        return True

    def _begin(self, task: Task) -> None:
        """Start prefill of a request; a short prompt is rendered and encoded here."""
        if not task.has_begun:
            self.tally.count(task.owner, requests=1)
        task.has_begun = True
        try:
            quietly("forgetting a next turn failed", lambda: self.next_turns.forget(task))
            if task.generation is None:
                task.generation = begin_answer(task, self.runtime, self.sleep, self.waiting)
            task.state = Prefilling(task.generation, task.generation.remaining())
            self._prefilling.append(task)
            self.runtime.budget.begin()
        except BaseException as error:
            self._end(task, contained(error))

    def _chunks(self, task: Task) -> Callable[[], int | None]:
        """Tokens of a chunk while answers are decoding; None for any number otherwise."""
        return lambda: self._pace(task).n_tokens if self._decoding else None

    def _pace(self, task: Task) -> Pace:
        owners = {other.owner for other in self._decoding.values()}
        return self._paces.of(task.is_scored, others_wait=bool(owners - {task.owner}))

    def _prefill(self, task: Task, state: Prefilling) -> None:
        try:
            if state.steps is None:  # not earlier: another prompt may have left pages of it
                self.next_turns.restore(task, state)
                quietly("counting pages failed", lambda: self.fetching.found(task))
                session, chunks = state.generation.session, chunks_of(task, self._chunks(task))
                state.steps = session.prefilling(state.tokens, chunks)
            session = state.generation.session
            started, held, pace = time.perf_counter(), session.n_held, self._pace(task)
            progress = next(state.steps)
            pace.record(session.n_held - held, time.perf_counter() - started)
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
        except BaseException as error:
            self._end(task, contained(error))
            return
        self._prefilling.remove(task)
        self._join(task, state)

    def _wait_for_room(self, task: Task, state: Prefilling) -> None:
        """Pause a prompt until another request ends; it then resumes from its pages."""
        try:
            keep_prefix(state.generation.session)
            state.generation.session.reset()
        except BaseException as error:
            self._end(task, contained(error))
            return
        state.steps, state.needs_room = None, True

    def _join(self, task: Task, state: Prefilling) -> None:
        """Start decoding after prefill."""
        generation, logits = state.generation, state.logits
        assert logits is not None
        state.logits = None
        row, decoder = None, self.runtime.decoder() if task.decodes_alone else self._decoder
        try:
            row = generation.row(logits)
            decoder.add(row)
        except BaseException as error:
            del row, logits
            if is_allocation_failure(error):
                self._again(task, generation, without_trace(error))
            else:
                self._end(task, contained(error))
            return
        task.state = Decoding(generation, row)
        self._decoding[row] = task
        if task.decodes_alone:
            self._alone[row] = decoder

    def _decode(self) -> None:
        for decoder in [self._decoder, *self._alone.values()]:
            for _ in range(1 + decoder.is_joined):  # first tokens, then the others' next ones
                self._step(decoder)

    def _step(self, decoder: Decoder) -> None:
        rows = decoder.rows
        try:
            results = decoder.step()
        except BaseException as error:
            if is_allocation_failure(error):
                self._start_over(without_trace(error))
            else:
                self._failed(rows, contained(error))
            return
        for result in results:
            if (task := self._decoding.get(result.row)) is not None:
                self._handle(task, task.state, result)  # pyright: ignore[reportArgumentType]

    def _failed(self, rows: list[Row], error: Exception) -> None:
        """A batch failed: if it has one row, end that; else have each go on from its pages."""
        tasks = [task for row in rows if (task := self._decoding.get(row)) is not None]
        if len(tasks) == 1:
            self._end(tasks[0], error)
            return
        log_fault(f"a batch of {len(tasks)} answers failed; each goes on alone", error)
        error.__traceback__ = None  # it would keep caches alive
        for task in reversed(tasks):
            state, task.decodes_alone = task.state, True
            assert isinstance(state, Decoding)
            if self._put_away(task, state):  # it goes on before other prompts
                task.state = Prefilling(state.generation, state.generation.remaining())
                self._prefilling.insert(0, task)

    def _start_over(self, error: BaseException) -> None:
        """After MLX failed to allocate: restart all sequences from their pages, one by one."""
        tasks = list(self._decoding.values())
        self._decoding.clear()
        self._alone.clear()
        self._decoder = self.runtime.decoder()
        for task in reversed(tasks):
            assert isinstance(task.state, Decoding)
            self._again(task, task.state.generation, error)

    def _again(self, task: Task, generation: Generation, error: BaseException) -> None:
        """After MLX failed to allocate: restart a request from its pages if memory can be freed."""
        tokens = generation.remaining()
        task.state = Prefilling(generation, tokens)
        try:
            generation.session.start_over(tokens, error)
            generation.sampler.rewind(generation.n_generated)
        except BaseException as full:
            self._end(task, contained(full))
            return
        self._prefill_again(task, generation, tokens)

    def _handle(self, task: Task, state: Decoding, result: RowResult) -> None:
        """Handle a step's result for one answer."""
        generation, row = state.generation, state.row
        if result.token is None:
            if isinstance(result.error, CheckpointError):
                quietly("forgetting what was computed failed", generation.session.discard)
            self._end(task, result.error)
            return
        self.tally.count(task.owner, generated_tokens=1)
        try:
            told = answer_logprobs(self.runtime.tokenizer, result.token, result.logprob, result.top)
            chunk = generation.add(result.token, told)
            if generation.advance(result.token):
                task.tell(chunk)
                self._end(task, generation.end("stop"))
                return
        except BaseException as error:
            self._end(task, contained(error))
            return
        if generation.is_over:
            self._end(task, chunk)
            return
        task.tell(chunk)
        self.sleep.note(task, generation)
        if len(row.tokens) == row.max_tokens:
            self._shift(task, state)

    def _shift(self, task: Task, state: Decoding) -> None:
        """The context is full: drop the oldest tokens, and prefill the remaining ones."""
        generation = state.generation
        self._forget(task, state)
        tokens = generation.remaining()
        task.state = Prefilling(generation, tokens)
        try:
            generation.session.restore(tokens)
        except BaseException as error:
            self._end(task, contained(error))
            return
        self._prefill_again(task, generation, tokens)

    def _prefill_again(self, task: Task, generation: Generation, tokens: list[int]) -> None:
        """Prefill a sequence before other prompts, as its answer has begun."""
        steps = generation.session.prefilling(tokens, self._chunks(task))
        task.state = Prefilling(generation, tokens, steps)
        self._prefilling.insert(0, task)

    def _end(self, task: Task, last: Chunk | BaseException | None) -> None:
        """End a request with its last chunk, an error, or None if it was cancelled."""
        state, task.state = task.state, Ended()
        quietly("ending a request failed", lambda: self._forget(task, state))
        quietly("removing a file failed", lambda: self.sleep.ended(task, last))
        for other in self._prefilling:
            prefilling(other).needs_room = False
        if isinstance(last, MlxkvError) and not isinstance(last, InternalError):
            last = without_trace(last)
        if isinstance(state, Prefilling | Decoding):
            generation = state.generation
            if isinstance(last, KVCacheFull) and generation.n_generated:
                last = last_chunk(generation, last)
            quietly("keeping a prefix failed", lambda: self._keep(task, generation, last))
            idle = self.is_idle and isinstance(last, Chunk)
            quietly("freeing caches failed", lambda: self.next_turns.free(task, generation, idle))
        quietly(
            "counting an answer failed", lambda: count_end(task, last, self.tally, self.clients)
        )
        task.tell(last)
        if isinstance(last, Chunk):
            task.tell(None)

    def _forget(self, task: Task, state: State) -> None:
        match state:
            case Waiting():
                self.waiting.remove(task)
            case Prefilling(steps=steps):
                if task in self._prefilling:
                    self._prefilling.remove(task)
                if steps is not None:
                    steps.close()
            case Decoding(row=row):
                self._decoding.pop(row, None)
                self._alone.pop(row, self._decoder).remove(row)

    def _keep(self, task: Task, generation: Generation, last: object) -> None:
        """Keep a sequence's prefix, longest what a client's sessions share; note the next turn."""
        links, pages = keep_prefix(generation.session), generation.session.pages
        self.clients.ended(task.owner, task.client, task.request.prompt, links, pages)
        ended = last if isinstance(last, Chunk) else None
        self.next_turns.add(task, generation, links, ended)
