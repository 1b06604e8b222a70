"""One loaded model and the requests that it answers, step by step, all on the thread that calls.

Invariants:
- A request is waiting, prefilling, decoding or ended: its `state`. `step` computes one chunk of one
  prompt, which `policy` chooses, and one token of every answer, so that none waits longer than a
  chunk takes.
- What goes wrong in a request ends that request. Its prefix is kept as pages, however it ended.
- Pages of one owner are never another's.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator

from mlxkv.base.device import default_chunk
from mlxkv.engine.messages import Counts
from mlxkv.engine.policy import Pace, PendingPrompt, next_prompt
from mlxkv.engine.prompt import prepare, start
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.tasks import Decoding, Ended, Prefilling, State, Task, Waiting
from mlxkv.errors import CheckpointError, KVCacheFull, MlxkvError
from mlxkv.generation.decoder import Allowed, Decoder, Row, RowResult
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk, TokenLogprobs
from mlxkv.generation.session import Session
from mlxkv.memory.types import ALLOCATION_ERRORS, is_allocation_failure, without_trace
from mlxkv.sampling.grammar import Masker

_log = logging.getLogger(__name__)

STALL_S = 0.5
"""How long a chunk of one prompt may hold up the answers that are being written."""
MIN_CHUNK = 16
MAX_PROMPTS = 4
"""Prompts that are computed in turns; the others wait."""


class Scheduler:
    """A loaded model and its requests.

    Args:
        runtime: the model.
        max_running: requests that are computed at a time.
    """

    def __init__(self, runtime: Runtime, max_running: int):
        self.runtime, self.max_running = runtime, max_running
        self.counts = Counts()
        self.waiting: deque[Task] = deque()
        self._prefilling: list[Task] = []
        self._decoding: dict[Row, Task] = {}
        self._decoder = Decoder(runtime.model)
        self._pace = Pace(STALL_S, MIN_CHUNK, default_chunk())
        self._n_chunks = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self._prefilling or self._decoding)

    @property
    def n_sequences(self) -> int:
        """Requests that are being computed."""
        return len(self._decoding) + len(self._prefilling)

    def tasks(self) -> Iterator[Task]:
        """All requests that have not ended."""
        yield from list(self.waiting)
        yield from list(self._prefilling)
        yield from list(self._decoding.values())

    def add(self, task: Task) -> None:
        """Have a request begin as soon as there is a place for it."""
        self.waiting.append(task)

    def step(self) -> None:
        """One chunk of a prompt, and one token of every answer."""
        self._drop_cancelled()
        has_place = len(self._prefilling) < MAX_PROMPTS and self.n_sequences < self.max_running
        if self.waiting and has_place:
            self._begin(self.waiting.popleft())
        if (task := self._next_prompt()) is not None:
            self._prefill(task, task.state)  # pyright: ignore[reportArgumentType]
        if self._decoding:
            self._decode()

    def stop(self, error: MlxkvError | None = None) -> None:
        """End all requests, with an error or in silence; their prefixes are kept."""
        for task in self.tasks():
            self._end(task, error)

    def _drop_cancelled(self) -> None:
        for task in [task for task in self.tasks() if task.is_cancelled()]:
            self.counts.cancelled += 1
            self._end(task, None)

    def _begin(self, task: Task) -> None:
        """Render and encode a prompt, and find out what it asks for."""
        self.counts.requests += 1
        try:
            if task.generation is None:
                prepared = prepare(self.runtime, task.request)
                session = self.runtime.session(task.owner)
                task.generation = start(self.runtime, task.request, prepared, session)
            task.state = Prefilling(task.generation, task.generation.remaining())
            self._prefilling.append(task)
            self.runtime.budget.begin()
        except Exception as error:  # one request's, whatever it is
            self._end(task, error)

    def _chunk(self) -> int | None:
        """Tokens of a prompt that may hold the others up; None where nothing is held up."""
        return self._pace.n_tokens if self._decoding else None

    def _next_prompt(self) -> Task | None:
        """The request whose prompt the next chunk is of; None while all need room."""
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
            if state.steps is None:  # only now: the prompt before may have left pages of it
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
            # Not in a variable of this function: a restart in `_join` must be able to free them.
            state.logits, stop.value = stop.value, None
        except KVCacheFull as error:
            if any(other.holds_kv for other in self.tasks() if other is not task):
                self._wait_for_room(task, state)
            else:
                self._end(task, error)
            return
        except Exception as error:  # one request's, whatever it is
            self._end(task, error)
            return
        self._prefilling.remove(task)
        self._join(task, state)

    def _wait_for_room(self, task: Task, state: Prefilling) -> None:
        """Others have the memory: a prompt goes on, from its pages, when one of them has ended."""
        try:
            keep_prefix(state.generation.session)
            state.generation.session.reset()
        except Exception as error:  # one request's, whatever it is
            self._end(task, error)
            return
        state.steps, state.needs_room = None, True

    def _join(self, task: Task, state: Prefilling) -> None:
        """A prompt is computed: its answer joins the others."""
        generation, logits = state.generation, state.logits
        assert logits is not None
        state.logits, masker = None, generation.masker
        row = Row(
            generation.session,
            logits,
            generation.sampler,
            generation.n_left,
            None if masker is None else _allowed(masker, self.runtime.config.vocab_size),
            task.request.logprobs,
            generation.answer,
            generation.ends,
            task.request.min_tokens - generation.n_generated,
        )
        try:
            self._decoder.add(row)
        except Exception as error:  # one request's, whatever it is
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
            drawn = self._decoder.step()
        except ALLOCATION_ERRORS as error:
            if not is_allocation_failure(error):
                raise
            self._start_over(without_trace(error))
            return
        for one in drawn:
            task = self._decoding.get(one.row)
            if task is not None:
                self._take(task, task.state, one)  # pyright: ignore[reportArgumentType]

    def _start_over(self, error: BaseException) -> None:
        """MLX could not allocate: all sequences go on from their pages, one after the other."""
        tasks = list(self._decoding.values())
        self._decoding.clear()
        for task in reversed(tasks):
            assert isinstance(task.state, Decoding)
            self._again(task, task.state.generation, error)

    def _again(self, task: Task, generation: Generation, error: BaseException) -> None:
        """MLX could not allocate: a request goes on from its pages, if anything gives way."""
        tokens = generation.remaining()
        task.state = Prefilling(generation, tokens)
        try:
            generation.session.start_over(tokens, error)
        except Exception as full:
            self._end(task, full)
            return
        generation.sampler.rewind(generation.n_generated)
        self._prefill_again(task, generation, tokens)

    def _take(self, task: Task, state: Decoding, drawn: RowResult) -> None:
        """A step's token of one answer."""
        generation, row = state.generation, state.row
        if drawn.token is None:
            if isinstance(drawn.error, CheckpointError):
                generation.session.discard()
            self._end(task, drawn.error)
            return
        self.counts.generated_tokens += 1
        try:
            chunk = generation.add(drawn.token, self._logprobs(drawn))
            if generation.masker is not None and not generation.is_over:
                generation.masker.advance(drawn.token)
                if generation.masker.finished:
                    task.tell(chunk)
                    self._end(task, generation.end("stop"))
                    return
        except Exception as error:  # one request's, whatever it is
            self._end(task, error)
            return
        if generation.is_over:
            self._end(task, chunk)
            return
        task.tell(chunk)
        if len(row.tokens) == row.max_tokens:
            self._shift(task, state)

    def _shift(self, task: Task, state: Decoding) -> None:
        """The context is full, and the oldest tokens go: what remains is computed like a prompt."""
        generation = state.generation
        del self._decoding[state.row]
        tokens = generation.remaining()
        task.state = Prefilling(generation, tokens)
        try:
            generation.session.restore(tokens)
        except Exception as error:  # one request's, whatever it is
            self._end(task, error)
            return
        self._prefill_again(task, generation, tokens)

    def _prefill_again(self, task: Task, generation: Generation, tokens: list[int]) -> None:
        """What a sequence holds is computed before other prompts: its answer has begun."""
        steps = generation.session.prefilling(tokens, self._chunk)
        task.state = Prefilling(generation, tokens, steps)
        self._prefilling.insert(0, task)

    def _logprobs(self, drawn: RowResult) -> TokenLogprobs | None:
        if drawn.logprob is None or drawn.token is None:
            return None
        top = tuple(self._token(token, logprob) for token, logprob in drawn.top)
        return self._token(drawn.token, drawn.logprob, top)

    def _token(
        self, token: int, logprob: float, top: tuple[TokenLogprobs, ...] = ()
    ) -> TokenLogprobs:
        data = self.runtime.tokenizer.bytes_of(token)
        return TokenLogprobs(token, data.decode(errors="replace"), data, logprob, top)

    def _end(self, task: Task, last: Chunk | BaseException | None) -> None:
        """A request is over, with a last chunk, an error, or because it is not wanted any more."""
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
                keep_prefix(generation.session)
                if not task.keeps_session:
                    generation.session.reset()  # the task may be referred to for longer
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


def keep_prefix(session: Session) -> None:
    """Keep a sequence's prefix; where that fails, its answer is no worse for it."""
    try:
        session.finish()
    except Exception as error:
        _log.warning("the prefix is not kept: %s", error)


def _allowed(masker: Masker, n_vocab: int) -> Allowed:
    """What a grammar allows next; the scheduler advances it."""
    return lambda _: masker.allowed(n_vocab)
