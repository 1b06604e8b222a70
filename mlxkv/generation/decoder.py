"""Continuous batching: sequences that join and leave a running decode at any step.

Invariants:
- One step is in flight: while the caller looks at the tokens of one, the next is computed. It has
  been fed the tokens given out, so that a sequence's caches hold what its session knows whenever
  `step` has returned (but for a first and a last token, which are not fed).
- A row's token depends on its own logits, sampler and mask: it gets the same one alone, whatever
  else is in the batch.
- What goes wrong in a row ends that row; the others go on.
- An exception out of `step` itself empties the decoder: a token may have reached the caches of some
  layers and not of others, which the sessions put right by themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import mlx.core as mx

from mlxkv.errors import KVCacheFull, UsageError, contained
from mlxkv.generation.drafts.pace import Costs
from mlxkv.generation.flight import (
    Allowed,
    Flight,
    Lane,
    Row,
    RowResult,
    error_of,
    hears,
    last_n,
    mask_of,
    settle,
)
from mlxkv.generation.mixed import MixedModels, each_alone, next_logits
from mlxkv.generation.speculate import Speculation
from mlxkv.kv.layout import LayerCache
from mlxkv.kv.types import STEP
from mlxkv.memory.types import is_allocation_failure
from mlxkv.nn.batch import batch, is_current, is_settled, kv_order
from mlxkv.nn.model import CausalLM
from mlxkv.sampling.math import log_normalizer, soundness
from mlxkv.sampling.sampler import AnswerIds, Recent, RowChoice, choose

__all__ = ["Allowed", "Decoder", "Row", "RowResult", "decode"]


class Decoder:
    """Decodes any number of sequences together, on one thread.

    Args:
        model: of all of them, with other adapters or none (`CausalLM.plain`). One that does not
            batch (`model.batches`) runs row by row.
        costs: how long the model's passes take, for rows with drafts.
        mixed: for rows with different adapters; None for its own.
    """

    def __init__(
        self, model: CausalLM, costs: Costs | None = None, mixed: MixedModels | None = None
    ):
        self._model, self._mixed = model, mixed or MixedModels()
        self._speculation = Speculation(model, self._model_of, costs)
        self._n_timed = 0  # rows of the last step, if that was one whose time says something
        self._lanes: list[Lane] = []
        self._fresh: list[Flight] = []
        self._flight: Flight | None = None
        self._batch: tuple[list[Lane], Sequence[LayerCache]] = [], []
        self._n_steps = 0

    @property
    def rows(self) -> list[Row]:
        """Those that go on."""
        return [lane.row for lane in self._lanes]

    @property
    def is_joined(self) -> bool:
        """Whether the next step gives first tokens, while rows that joined before wait for one."""
        return bool(self._fresh) and len(self._lanes) > len(self._fresh)

    def add(self, row: Row) -> None:
        """Have a sequence join at the next step, which gives its first token.

        Raises:
            UsageError: its model is another, it is here already, or `max_tokens` is below 1.
        """
        if row.session.model.plain is not self._model.plain:
            raise UsageError("a decoder's rows must be of its own model")
        if any(lane.row is row or lane.row.session is row.session for lane in self._lanes):
            raise UsageError("the sequence is being decoded already")
        if row.max_tokens is not None and row.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1; got {row.max_tokens}")
        n_recent = last_n(row.sampler)
        answer = None
        if row.sampler.needs_answer:
            answer = AnswerIds(row.sampler.n_vocab, row.answered)
        session = row.session
        before = session.media.vocabulary(session.tokens[-n_recent:]) if n_recent else None
        lane = Lane(row, before, answer)
        flight = self._choose([lane], row.logits)
        self._lanes.append(lane)
        self._fresh.append(flight)

    def remove(self, row: Row) -> None:
        """Have a sequence leave now; nothing where it has left already.

        Its session holds its tokens, all of them given out, and can be finished or gone on with.
        """
        for lane in self._lanes:
            if lane.row is row:
                self._leave(lane)

    def step(self) -> Iterable[RowResult]:
        """The next token of each row; of those that have just joined, where there are any.

        Where a row had a draft, the next tokens of each row, read once and before the next step: a
        row that is removed meanwhile gives no more of them, and its session has none of them.
        Rows that have reached `max_tokens` or failed have left when their last result is read.
        """
        started, n_timed = time.perf_counter(), self._n_timed
        self._n_timed = 0
        try:
            if any(lane.queue for lane in self._lanes):
                return self._given()
            for lane in self._lanes:
                try:
                    lane.row.session.cut_due()
                except BaseException as error:  # this row's alone
                    if is_allocation_failure(error):
                        raise
                    lane.error = contained(error)
            if self._fresh:
                # Not behind the next step: on the CPU backend that would hold them up.
                fresh, self._fresh = self._fresh, []
                return [drawn for flight in fresh for drawn in self._deliver(flight, ready=True)]
            if not self._lanes:
                self._flight = None
                return []
            if self._flight is None or all(lane.gone for lane in self._flight.lanes):
                if self._drafted():
                    return self._given()
                self._flight = self._next(None)
            flight = self._flight
            if flight is None:
                return self._full()
            if self._speculation.plan(self._lanes):
                # What comes next can be drafted once this step's tokens are known.
                self._flight = None
                return self._deliver(flight, ready=True) + self._full()
            self._flight = self._next(flight)
            found = self._deliver(flight) + self._full()
            self._n_timed = n = len(flight.lanes)
            if n_timed == n:
                self._speculation.costs.record(n, n, time.perf_counter() - started)
            return found
        except BaseException:
            self._lanes, self._fresh, self._flight = [], [], None
            self._batch = [], []
            raise

    def _drafted(self) -> bool:
        """Compute a step with drafts, if there are any; its tokens are in the rows' queues."""
        lanes = [lane for lane in self._lanes if lane.ready is not None]
        if not (plan := self._speculation.plan(lanes)):
            return False
        going = [lane for lane in lanes if self._goes_on(lane)]
        return any(lane in plan for lane in going) and self._speculation.run(going, plan)

    def _given(self) -> Iterator[RowResult]:
        """Give out what is in the rows' queues, and the errors of rows that cannot be fed."""
        for lane in list(self._lanes):
            row = lane.row
            while lane.queue and not lane.gone:
                drawn = lane.queue.popleft()
                if drawn.token is None:
                    self._leave(lane)
                else:
                    self._give(lane, drawn.token, drawn.hidden)
                yield RowResult(
                    row, drawn.token, drawn.error, drawn.logprob, drawn.top[: row.n_logprobs]
                )
        yield from self._full()

    def _give(self, lane: Lane, token: int, hidden: mx.array | None) -> None:
        """A token goes out, chosen from `hidden`; the row leaves where it is its last."""
        row = lane.row
        row.session.append(token)
        row.tokens.append(token)
        if row.drafts is not None:
            row.drafts.add(token, hidden)
        if len(row.tokens) == row.max_tokens:
            self._leave(lane)

    def _leave(self, lane: Lane) -> None:
        lane.gone = True
        self._lanes.remove(lane)
        self._batch = [], []  # keeps no caches alive
        if not self._lanes:
            self._mixed.clear()
        self._fresh = [flight for flight in self._fresh if lane not in flight.lanes]
        if self._flight is not None and all(lane.gone for lane in self._flight.lanes):
            self._flight = None  # it would keep the last sequence's KV alive

    def _next(self, flight: Flight | None) -> Flight | None:
        """Feed what a flight has chosen, and what rows that have joined bring; None: nothing."""
        lanes, parts = [], []
        if flight is not None:
            tokens = self._choose_masked(flight)
            kept = [i for i, lane in enumerate(flight.lanes) if self._goes_on(lane)]
            lanes = [flight.lanes[i] for i in kept]
            if len(kept) == len(flight.lanes):
                parts.append(tokens)
            elif kept:
                parts.append(tokens[mx.array(kept)])
        n_before = len(lanes)
        for lane in list(self._lanes):
            if lane.ready is None:
                continue
            ready, lane.ready = lane.ready, None
            if self._goes_on(lane):
                lanes.append(lane)
                parts.append(ready)
        if not lanes:
            return None
        self._n_steps += 1
        if self._n_steps % STEP == 0:
            mx.clear_cache()
        tokens = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        lanes, tokens = self._in_kv_order(lanes, tokens, n_before)
        logits, hidden = self._logits(lanes, tokens[:, None])
        return self._choose(lanes, logits, tokens, hidden)

    def _goes_on(self, lane: Lane) -> bool:
        """Whether a row is fed its next token, for which there must be room."""
        if lane.gone or lane.at_limit or lane.error is not None:
            return False
        session = lane.row.session
        kv_type = session.kv_type
        try:
            session.before_step()
        except KVCacheFull as full:
            lane.full = full
        except BaseException as error:  # this row's alone
            if is_allocation_failure(error):
                raise
            lane.error = contained(error)
        if session.kv_type != kv_type:
            self._batch = [], []  # it has other caches now
        return lane.full is None and lane.error is None

    def _in_kv_order(
        self, lanes: list[Lane], tokens: mx.array, n_before: int
    ) -> tuple[list[Lane], mx.array]:
        """Lanes in the order in which their KV lies, where others have joined or left.

        The first `n_before` were in the last step as well.
        """
        is_same = self._batch[0] == lanes
        if is_same or not self._model.batches or self._model_of(lanes) is None:
            return lanes, tokens
        caches, room = [lane.row.session.caches for lane in lanes], lanes[0].row.session.has_room
        new = range(n_before, len(lanes))
        order = kv_order(caches, room, self._model.one_part, new)
        if order == sorted(order):
            return lanes, tokens
        return [lanes[i] for i in order], tokens[mx.array(order)]

    def _logits(self, lanes: list[Lane], tokens: mx.array) -> tuple[mx.array, mx.array | None]:
        """Logits `[B, V]` after tokens `[B, 1]`, and hidden states `[B, 1, E]` where a row hears
        them."""
        model, hear = self._model_of(lanes), any(hears(lane) for lane in lanes)
        if model is None:
            return each_alone([lane.row.session for lane in lanes], tokens, hear)
        is_same = self._batch[0] == lanes
        if not is_same or not is_current(self._batch[1]):
            settled = is_same and is_settled(self._batch[1])
            caches = [lane.row.session.caches for lane in lanes]
            room = lanes[0].row.session.has_room
            # Those that join have been moved already.
            made = batch(caches, room, self._model.one_part, new=(), settled=settled)
            self._batch = lanes, made
        return next_logits(model, tokens, self._batch[1], hear)

    def _model_of(self, lanes: Sequence[Lane]) -> CausalLM | None:
        """The model that computes these rows together; None where each is computed alone."""
        if len(lanes) > 1 and not self._model.batches:
            return None
        sessions = [lane.row.session for lane in lanes]
        return self._mixed.of([session.model for session in sessions], sessions[0].has_room)

    def _choose(
        self,
        lanes: list[Lane],
        logits: mx.array,
        fed: mx.array | None = None,
        hidden: mx.array | None = None,
    ) -> Flight:
        """Choose a token for each row that has no mask, its computation under way.

        The logits are those behind the tokens `fed` `[B]`; behind the prompts without.
        """
        for i, lane in enumerate(lanes):
            lane.recent = _recent(lane, fed, i)
            lane.barred = lane.row.ends if lane.n_drawn < lane.row.min_tokens else ()
        all_tell = all(lane.row.n_logprobs is not None for lane in lanes)
        normalizer = log_normalizer(logits) if all_tell else None
        sound = soundness(logits) if normalizer is None else normalizer[:, 0]
        asked = {
            i: RowChoice(lane.row.sampler, lane.recent, barred=lane.barred)
            for i, lane in enumerate(lanes)
            if lane.row.allowed is None
        }
        flight = Flight(lanes, logits, sound, normalizer, choose(logits, asked), hidden=hidden)
        if len(asked) == len(lanes):
            settle(flight)
        for lane in lanes:
            lane.n_drawn += 1
        mx.async_eval(*flight.arrays)
        return flight

    def _choose_masked(self, flight: Flight) -> mx.array:
        """The tokens `[B]` of a flight, those of its masked rows chosen now."""
        if flight.tokens is not None:
            return flight.tokens
        asked = {
            i: RowChoice(lane.row.sampler, lane.recent, mask_of(flight, i, lane), lane.barred)
            for i, lane in enumerate(flight.lanes)
            if lane.row.allowed is not None
        }
        flight.parts += choose(flight.logits, asked)
        tokens = settle(flight)
        mx.async_eval(*flight.arrays)
        return tokens

    def _full(self) -> list[RowResult]:
        """Rows that cannot be fed, for lack of memory above all; their tokens are given out."""
        ended = [lane for lane in self._lanes if lane.full or lane.error]
        for lane in ended:
            self._leave(lane)
        return [RowResult(lane.row, None, lane.full or lane.error) for lane in ended]

    def _deliver(self, flight: Flight, ready: bool = False) -> list[RowResult]:
        """Wait for a flight and give its tokens out."""
        tokens = self._choose_masked(flight)
        values = cast(list[int], tokens.tolist())
        sound = [math.isfinite(x) for x in cast(list[float], flight.soundness.tolist())]
        told = {} if flight.told is None else flight.told.by_row()
        found = []
        for i, lane in enumerate(flight.lanes):
            if lane.gone:
                continue
            error = lane.error or error_of(sound[i], i in flight.stuck)
            if error is not None:
                self._leave(lane)
                found.append(RowResult(lane.row, None, error))
                continue
            token = values[i]
            self._give(lane, token, flight.heard(i, lane))
            logprob, top = told.get(i, (None, ()))
            found.append(RowResult(lane.row, token, None, logprob, top))
            if ready and not lane.gone:
                lane.ready = tokens[i : i + 1]
        return found


def decode(row: Row) -> Iterator[int]:
    """The tokens of one sequence, decoded alone.

    Raises:
        CheckpointError: the logits are not numbers: damaged weights, or an overflow.
        KVCacheFull: there is no room for more, after the last token that there was room for.
    """
    decoder = Decoder(row.session.model)
    decoder.add(row)
    while decoder.rows:
        for drawn in decoder.step():
            if drawn.error is not None:
                raise drawn.error
            if drawn.token is not None:
                yield drawn.token


def _recent(lane: Lane, fed: mx.array | None, row: int) -> Recent | None:
    """What a row's penalties look at behind `fed[row]`."""
    if lane.before is None and lane.answer is None:
        return None
    # What was fed last may have been given out or not; it is taken from the device either way.
    n_known, n = max(lane.n_drawn - 1, 0), last_n(lane.row.sampler) - (fed is not None)
    known = [] if lane.before is None else lane.before
    if lane.before is not None:
        known = [*known, *lane.row.tokens[max(n_known - n, 0) : n_known]]
        known = known[max(len(known) - n, 0) :]
    answer = None if lane.answer is None else lane.answer.first(lane.row.tokens, n_known)
    return Recent(known, fed, row, answer)
