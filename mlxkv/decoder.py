"""Continuous batching: sequences that join and leave a running decode at any step.

Invariants:
- One step is in flight: while the caller looks at the tokens of one, the next is computed. It has
  been fed the tokens given out, so that a sequence's caches hold what its session knows whenever
  `step` has returned (but for a first and a last token, which are not fed).
- A row's token depends on its own logits, sampler and mask alone: it is the one that
  `Session.decode` gives, whoever else is in the batch.
- What goes wrong in a row ends that row; the others go on.
- An exception out of `step` itself empties the decoder: a token may have reached the caches of some
  layers and not of others, which the sessions put right by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from mlxkv.batch import arranged, batch
from mlxkv.cache import STEP, LayerCache
from mlxkv.errors import CheckpointError, KVCacheFull, UsageError
from mlxkv.layers import CausalLM
from mlxkv.memory import is_allocation_failure
from mlxkv.sampling import Sampler
from mlxkv.sampling_math import log_normalizer, log_probabilities, soundness
from mlxkv.session import Session

Allowed = Callable[[Sequence[int]], mx.array | None]
"""The answer's tokens so far -> which may come next, bool `[V]` with at least one; None: any."""


@dataclass(eq=False, slots=True)
class Row:
    """One sequence of a decoder, from the end of its prompt on.

    Args:
        session: whose caches hold the prompt.
        logits: `[1, V]` after it, as `Session.prefill` gives them.
        sampler: chooses; its own, for it holds random state.
        max_tokens: after which the row leaves by itself; None for as many as are asked for.
        allowed: what a grammar allows next. Called once for each token, when all before it have
            been given out. The model's step is in flight all the same, only the choice is late.
        n_logprobs: how many of the likeliest tokens to tell beside the chosen one; None for none,
            and no log-probabilities at all.

    Attributes:
        tokens: the answer's, given out so far.
    """

    session: Session
    logits: mx.array
    sampler: Sampler
    max_tokens: int | None = None
    allowed: Allowed | None = None
    n_logprobs: int | None = None
    tokens: list[int] = field(default_factory=list, init=False)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step gave a row.

    Args:
        row: the row.
        token: the next token of its answer; None where it failed.
        error: why; the row has left the decoder.
        logprob: the token's log-probability, of the model's own distribution.
        top: the likeliest tokens and theirs, the likeliest first.
    """

    row: Row
    token: int | None
    error: Exception | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False, slots=True)
class _Lane:
    """A row inside the decoder.

    Args:
        row: the row.
        history: `[1, N]` tokens that its repeat penalty looks at; None where it has none.
        n_drawn: tokens chosen, given out or not.
        ready: `[1]`, its first token once that is given out and not yet fed.
        error: what its mask raised.
        full: why it cannot be fed any more, once its last token is given out.
        gone: it has left.
    """

    row: Row
    history: mx.array | None
    n_drawn: int = 0
    ready: mx.array | None = None
    error: Exception | None = None
    full: KVCacheFull | None = None
    gone: bool = False

    @property
    def at_limit(self) -> bool:
        return self.row.max_tokens is not None and self.n_drawn >= self.row.max_tokens


@dataclass(slots=True)
class _Flight:
    """A step's choices, computed or about to be.

    Args:
        lanes: in the order of the logits' rows.
        logits: `[B, V]`.
        tokens: `[B]`; None until the masked rows' are chosen.
        chosen: each row's `[1]` where they are not chosen together; None for a masked row.
        soundness: `[B]`, finite where the logits are sound.
        stuck: for masked rows, bool `[1]`: nothing is allowed.
        logprobs: for rows that ask: of the token `[1]`, of the likeliest, and those `[1, n]`.
    """

    lanes: list[_Lane]
    logits: mx.array
    tokens: mx.array | None
    chosen: list[mx.array | None]
    soundness: mx.array
    stuck: dict[int, mx.array] = field(default_factory=dict)
    logprobs: dict[int, tuple[mx.array, mx.array, mx.array]] = field(default_factory=dict)

    @property
    def arrays(self) -> list[mx.array]:
        """What to compute."""
        found = [self.logits, self.soundness, *self.stuck.values()]
        found += [x for x in (self.tokens, *self.chosen) if x is not None]
        return found + [x for three in self.logprobs.values() for x in three]


class Decoder:
    """Decodes any number of sequences together, on one thread.

    Args:
        model: of all of them. One that does not batch (`model.batches`) runs row by row.
    """

    def __init__(self, model: CausalLM):
        self._model = model
        self._lanes: list[_Lane] = []
        self._fresh: list[_Flight] = []
        self._flight: _Flight | None = None
        self._batch: tuple[list[_Lane], Sequence[LayerCache]] = [], []
        self._n_steps = 0

    @property
    def rows(self) -> list[Row]:
        """Those that go on."""
        return [lane.row for lane in self._lanes]

    def add(self, row: Row) -> None:
        """Have a sequence join at the next step, which gives its first token.

        Raises:
            UsageError: its model is another, it is here already, or `max_tokens` is below 1.
        """
        if row.session.model is not self._model:
            raise UsageError("a decoder's rows must be of its own model")
        if any(lane.row is row or lane.row.session is row.session for lane in self._lanes):
            raise UsageError("the sequence is being decoded already")
        if row.max_tokens is not None and row.max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1; got {row.max_tokens}")
        history = None
        if row.sampler.needs_recent:
            recent = row.session.tokens[-_last_n(row.sampler) :]
            history = mx.array(recent, dtype=mx.uint32)[None]
        lane = _Lane(row, history)
        flight = self._drawn([lane], row.logits)
        self._lanes.append(lane)
        self._fresh.append(flight)

    def remove(self, row: Row) -> None:
        """Have a sequence leave now; nothing where it has left already.

        Its session holds its tokens, all of them given out, and can be finished or gone on with.
        """
        for lane in self._lanes:
            if lane.row is row:
                self._leave(lane)

    def step(self) -> list[Drawn]:
        """The next token of each row; of those that have just joined, where there are any.

        Rows that have reached `max_tokens` or failed have left when this returns.
        """
        try:
            for lane in self._lanes:
                try:
                    lane.row.session.cut_due()
                except Exception as error:  # this row's alone
                    if is_allocation_failure(error):
                        raise
                    lane.error = error
            if self._fresh:
                # Not behind the next step: on the CPU backend that would hold them up.
                fresh, self._fresh = self._fresh, []
                return [drawn for flight in fresh for drawn in self._given(flight, ready=True)]
            if not self._lanes:
                self._flight = None
                return []
            if self._flight is None or all(lane.gone for lane in self._flight.lanes):
                self._flight = self._next(None)
            flight = self._flight
            if flight is None:
                return self._full()
            self._flight = self._next(flight)
            return self._given(flight) + self._full()
        except BaseException:
            self._lanes, self._fresh, self._flight = [], [], None
            self._batch = [], []
            raise

    def _leave(self, lane: _Lane) -> None:
        lane.gone = True
        self._lanes.remove(lane)
        self._batch = [], []  # keeps no caches alive
        self._fresh = [flight for flight in self._fresh if lane not in flight.lanes]
        if self._flight is not None and all(lane.gone for lane in self._flight.lanes):
            self._flight = None  # it would keep the last sequence's KV alive

    def _next(self, flight: _Flight | None) -> _Flight | None:
        """Feed what a flight has chosen, and what rows that have joined bring; None: nothing."""
        lanes, parts = [], []
        if flight is not None:
            tokens = self._chosen(flight)
            kept = [i for i, lane in enumerate(flight.lanes) if self._goes_on(lane)]
            lanes = [flight.lanes[i] for i in kept]
            if len(kept) == len(flight.lanes):
                parts.append(tokens)
            elif kept:
                parts.append(tokens[mx.array(kept)])
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
        lanes, tokens = self._arranged(lanes, tokens)
        for i, lane in enumerate(lanes):
            if lane.history is not None:
                token = tokens[i : i + 1].astype(mx.uint32)[None]
                history = mx.concatenate([lane.history, token], axis=1)
                lane.history = history[:, -_last_n(lane.row.sampler) :]
        return self._drawn(lanes, self._logits(lanes, tokens[:, None]))

    def _goes_on(self, lane: _Lane) -> bool:
        """Whether a row is fed its next token, for which there must be room."""
        if lane.gone or lane.at_limit or lane.error is not None:
            return False
        session = lane.row.session
        kv_type = session.kv_type
        try:
            session.before_step()
        except KVCacheFull as full:
            lane.full = full
        except Exception as error:  # this row's alone
            if is_allocation_failure(error):
                raise
            lane.error = error
        if session.kv_type != kv_type:
            self._batch = [], []  # it has other caches now
        return lane.full is None and lane.error is None

    def _arranged(self, lanes: list[_Lane], tokens: mx.array) -> tuple[list[_Lane], mx.array]:
        """Lanes in the order in which their KV lies, where others have joined or left."""
        if self._batch[0] == lanes or not self._model.batches:
            return lanes, tokens
        room = lanes[0].row.session.has_room
        order = arranged([lane.row.session.caches for lane in lanes], room, self._model.one_part)
        if order == sorted(order):
            return lanes, tokens
        return [lanes[i] for i in order], tokens[mx.array(order)]

    def _logits(self, lanes: list[_Lane], tokens: mx.array) -> mx.array:
        """Logits `[B, V]` after tokens `[B, 1]`."""
        if not self._model.batches and len(lanes) > 1:
            rows = zip(lanes, mx.split(tokens, len(lanes)), strict=True)
            return mx.concatenate(
                [self._model.last_logits(token, lane.row.session.caches) for lane, token in rows]
            )
        if self._batch[0] != lanes:
            caches = [lane.row.session.caches for lane in lanes]
            room = lanes[0].row.session.has_room
            self._batch = lanes, batch(caches, room, self._model.one_part)
        return self._model.last_logits(tokens, self._batch[1])

    def _drawn(self, lanes: list[_Lane], logits: mx.array) -> _Flight:
        """Choose a token for each row that has no mask, its computation under way."""
        flight = _Flight(lanes, logits, None, [], soundness(logits))
        plain = [lane.row.sampler.takes_likeliest and lane.row.allowed is None for lane in lanes]
        best = mx.argmax(logits, axis=-1) if any(plain) else None
        if all(plain):
            flight.tokens = best
        else:
            for i, lane in enumerate(lanes):
                chosen = None
                if plain[i]:
                    chosen = cast(mx.array, best)[i : i + 1]
                elif lane.row.allowed is None:
                    chosen = lane.row.sampler(logits[i : i + 1], lane.history)
                flight.chosen.append(chosen)
        for i, lane in enumerate(lanes):
            lane.n_drawn += 1
            if lane.row.n_logprobs is not None and lane.row.allowed is None:
                token = flight.chosen[i] if flight.chosen else cast(mx.array, best)[i : i + 1]
                self._tell(flight, i, cast(mx.array, token))
        mx.async_eval(*flight.arrays)
        return flight

    def _chosen(self, flight: _Flight) -> mx.array:
        """The tokens `[B]` of a flight, those of its masked rows chosen now."""
        if flight.tokens is not None:
            return flight.tokens
        for i, lane in enumerate(flight.lanes):
            if flight.chosen[i] is None:
                flight.chosen[i] = self._choose_masked(flight, i, lane)
        flight.tokens = mx.concatenate([token for token in flight.chosen if token is not None])
        mx.async_eval(*flight.arrays)
        return flight.tokens

    def _choose_masked(self, flight: _Flight, i: int, lane: _Lane) -> mx.array:
        logits = flight.logits[i : i + 1]
        assert lane.row.allowed is not None
        mask = None
        if not lane.gone:
            try:
                mask = lane.row.allowed(lane.row.tokens)
            except Exception as error:  # the caller's own; the other rows go on
                lane.error = error
        if mask is not None:
            flight.stuck[i] = ~mask.any(keepdims=True)
            logits = mx.where(mask[None], logits.astype(mx.float32), -mx.inf)
        token = lane.row.sampler(logits, lane.history)
        if lane.row.n_logprobs is not None:
            self._tell(flight, i, token)
        return token

    @staticmethod
    def _tell(flight: _Flight, i: int, token: mx.array) -> None:
        """Log-probabilities of a row's token and of the likeliest."""
        n = flight.lanes[i].row.n_logprobs
        logits = flight.logits[i : i + 1]
        n = min(n or 0, logits.shape[1])
        top = mx.argpartition(-logits, kth=max(n - 1, 0), axis=-1)[:, :n]
        total = log_normalizer(logits)
        own = log_probabilities(logits, token[:, None].astype(mx.uint32), total)[0]
        flight.logprobs[i] = own, log_probabilities(logits, top, total), top

    def _full(self) -> list[Drawn]:
        """Rows that cannot be fed, for lack of memory above all; their tokens are given out."""
        ended = [lane for lane in self._lanes if lane.full or lane.error]
        for lane in ended:
            self._leave(lane)
        return [Drawn(lane.row, None, lane.full or lane.error) for lane in ended]

    def _given(self, flight: _Flight, ready: bool = False) -> list[Drawn]:
        """Wait for a flight and give its tokens out."""
        tokens = self._chosen(flight)
        values = cast(list[int], tokens.tolist())
        sound = [math.isfinite(x) for x in cast(list[float], flight.soundness.tolist())]
        found = []
        for i, lane in enumerate(flight.lanes):
            if lane.gone:
                continue
            error = lane.error or _error_of(sound[i], flight.stuck.get(i))
            if error is not None:
                self._leave(lane)
                found.append(Drawn(lane.row, None, error))
                continue
            token = values[i]
            lane.row.session.took(token)
            lane.row.tokens.append(token)
            found.append(Drawn(lane.row, token, None, *_logprobs_of(flight.logprobs.get(i))))
            if len(lane.row.tokens) == lane.row.max_tokens:
                self._leave(lane)
            elif ready:
                lane.ready = tokens[i : i + 1]
        return found


def _last_n(sampler: Sampler) -> int:
    return int(sampler.params.repeat_last_n or 0)


def _error_of(sound: bool, stuck: mx.array | None) -> Exception | None:
    if not sound:
        return CheckpointError(
            "the model's logits are not numbers: its weights are damaged, or overflow in this "
            "dtype (try --dtype float32)"
        )
    if stuck is not None and stuck.item():
        return UsageError("no token is allowed to come next")
    return None


def _logprobs_of(
    arrays: tuple[mx.array, mx.array, mx.array] | None,
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if arrays is None:
        return None, ()
    own, values, ids = arrays
    pairs = zip(
        cast(list[list[int]], ids.tolist())[0],
        cast(list[list[float]], values.tolist())[0],
        strict=True,
    )
    return cast(float, own.item()), tuple(sorted(pairs, key=lambda pair: -pair[1]))
