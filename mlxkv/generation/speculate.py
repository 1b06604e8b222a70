"""Several tokens of an answer in one step: drafts that never change it.

A draft is what a `Drafter` or the answer's grammar says may come next. The model computes the last
token and the draft together, and each place's token is chosen as it would have been alone: behind
the tokens before it, under its own mask and penalties, with its own random numbers. As long as what
is chosen is the draft, the next place is right as well; the first choice that is another is given
out too, and the caches take back what was computed behind it.

Invariants:
- What is given out never depends on a draft, but for the rounding of sums (docs/design.md
  "Drafts"). Random numbers are taken for tokens that are given out, and for no others.
- Between two steps caches hold no token that was not chosen. What was chosen is given out before
  anything else is computed; a row that ends among its tokens keeps the KV of none behind its end.
- A draft stays within the `STEP` for which memory was asked for, and is none where a pass with it
  has no room.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from mlxkv.base import device
from mlxkv.cache import RecurrentCache
from mlxkv.errors import contained
from mlxkv.generation.drafts.chooser import LaneChooser
from mlxkv.generation.drafts.drafter import Promise, Proposal
from mlxkv.generation.drafts.drafts import GRAMMAR, Drafts, LookAhead
from mlxkv.generation.drafts.pace import Chance, Costs, Rates, drafted, tried
from mlxkv.generation.flight import (
    Drawn,
    Flight,
    Lane,
    error_of,
    hears,
    history,
    mask_of,
    settle,
)
from mlxkv.generation.mixed import next_logits
from mlxkv.kv.types import STEP, ceil_step
from mlxkv.nn.batch import batch
from mlxkv.nn.blocks import sliceable
from mlxkv.nn.model import CausalLM
from mlxkv.nn.wide import wide
from mlxkv.sampling.math import soundness
from mlxkv.sampling.sampler import RowChoice, choose

if TYPE_CHECKING:
    import numpy as np


def most_tokens() -> int:
    """Tokens of a pass, all rows together.

    The kernels of the CPU backend compute up to 8 rows at nearly the cost of one, each as it is
    computed alone. On a GPU more rows than 16 take other kernels than a few do.
    """
    return 8 if device.on_cpu() else 16


Plan = Mapping[Lane, Proposal | Promise]
"""The drafts of a pass, cut to what is worth computing."""


@dataclass(slots=True)
class _Row:
    """A sequence of a pass: its draft, what may come at each place, and tokens held before it."""

    lane: Lane
    draft: list[int]
    masks: list[np.ndarray | None]
    n_held: int
    places: range = field(default_factory=lambda: range(0))


class Speculation:
    """Plans and runs the passes of a decoder that compute drafts.

    Args:
        model: of all rows, with other adapters or none.
        model_of: the one that computes some rows together; None for none.
        costs: how long its passes take; shared by all its decoders.
    """

    def __init__(
        self,
        model: CausalLM,
        model_of: Callable[[Sequence[Lane]], CausalLM | None],
        costs: Costs | None = None,
    ):
        self._model, self._model_of = model, model_of
        self.costs = Costs() if costs is None else costs

    @cached_property
    def _stable(self) -> int | None:
        return self._model.stable_tokens

    def plan(self, lanes: Sequence[Lane]) -> dict[Lane, Proposal | Promise]:
        """What is worth drafting for rows that decode together; empty for nothing."""
        if not any(lane.row.drafts for lane in lanes) or not self._takes(lanes):
            return {}
        if self.costs.seconds(len(lanes), len(lanes)) is None:
            return {}
        proposals = {lane: found for lane in lanes if (found := self._proposal(lane)) is not None}
        if not proposals:
            return {}
        chances = [self._chance(lane, proposals.get(lane)) for lane in lanes]
        chosen = drafted(chances, self.costs, most_tokens())
        plan, n_left = {}, most_tokens() - len(lanes) - sum(chosen)
        for lane, chance, n in zip(lanes, chances, chosen, strict=True):
            if (proposal := proposals.get(lane)) is None:
                continue
            if n == 0 and n_left:
                n = _due(_drafts(lane).rates, proposal, chance, n_left)
                n_left -= n
            if n:
                plan[lane] = proposal.first(n)
        return plan

    def _takes(self, lanes: Sequence[Lane]) -> bool:
        """Whether a pass of these rows can have drafts."""
        if len(lanes) >= most_tokens():
            return False
        is_one = len(lanes) == 1
        return is_one or (not self._model.one_part and self._model_of(lanes) is not None)

    def _proposal(self, lane: Lane) -> Proposal | Promise | None:
        row = lane.row
        if row.drafts is None or (row.allowed is not None and row.look_ahead is None):
            return None
        most = self._most(lane)
        if most < 1:
            return None
        if row.look_ahead is not None and (forced := _forced(row.look_ahead)):
            return Proposal(forced[:most], GRAMMAR)
        found = row.drafts.propose(most)
        if row.look_ahead is not None and isinstance(found, Proposal):
            return _led(row.look_ahead, found, most)
        return found

    def _most(self, lane: Lane) -> int:
        """Tokens that a row's draft may have."""
        session, n_held = lane.row.session, lane.row.session.n_held
        if len(sliceable(session.caches)) + len(_states(lane)) != len(session.caches):
            return 0  # a state that cannot be taken back
        n = min(most_tokens() - 1, ceil_step(n_held + 1) - n_held - 1)
        if lane.row.max_tokens is not None:
            n = min(n, lane.row.max_tokens - lane.n_drawn - 1)
        if self._stable is not None:
            n = min(n, self._stable - n_held - 1)
        return n if n > 0 and self._has_room(lane, n + 1) else 0

    @staticmethod
    def _has_room(lane: Lane, n_new: int) -> bool:
        """Whether so many tokens can be computed at once; asked once in a step of `STEP` tokens.

        Nothing gives way for it.
        """
        session = lane.row.session
        asked = session.n_held // STEP, n_new
        if lane.roomy[:2] != asked:
            # A row of shared buffers is copied out for it.
            is_shared = any(cache.row is not None for cache in sliceable(session.caches))
            n_bytes = session.nbytes if is_shared else 0
            n_bytes += sum(cache.nbytes for cache in _states(lane))  # of before it, beside it
            lane.roomy = (*asked, session.has_room(n_bytes, n_new))
        return lane.roomy[2]

    @staticmethod
    def _chance(lane: Lane, proposal: Proposal | Promise | None) -> Chance:
        if proposal is None:
            return Chance()
        if proposal.by == GRAMMAR:
            return Chance(proposal.n, 1.0, 1.0)
        right, further = _drafts(lane).rates.right(proposal.rated)
        sure = proposal.sure if isinstance(proposal, Proposal) else 0
        return Chance(proposal.n, right, further, proposal.seconds, sure)

    def run(self, lanes: Sequence[Lane], plan: Plan) -> bool:
        """Compute the next tokens of rows, which then wait in their queues.

        Args:
            lanes: that go on, each with a token to feed.
            plan: for some of them.

        Returns:
            False, with nothing done, where the grammars, or those who promised, leave nothing of
            the plan.
        """
        drafts = {lane: found for lane in plan if (found := _drawn(lane, plan[lane])) is not None}
        started = time.perf_counter()
        rows = [self._row(lane, drafts.get(lane)) for lane in lanes]
        if not any(row.draft for row in rows):
            return False
        # Those with one token first: see `nn.wide`.
        rows.sort(key=lambda row: len(row.draft) > 0)
        at = 0
        for row in rows:
            row.places = range(at, at + 1 + len(row.draft))
            at += len(row.places)
            row.lane.ready = None
        logits, hidden = self._logits(rows)
        places = [row.lane for row in rows for _ in row.places]
        flight = Flight(places, logits, soundness(logits), None, [], hidden=hidden)
        mx.async_eval(*flight.arrays)
        flight.parts += choose(logits, self._choices(rows, flight))
        settle(flight)
        mx.eval(*flight.arrays)
        self._accept(rows, flight, drafts)
        self.costs.record(len(rows), at, time.perf_counter() - started)
        return True

    def _row(self, lane: Lane, proposal: Proposal | None) -> _Row:
        n_held = lane.row.session.n_held
        if proposal is None or lane.row.look_ahead is None:
            draft = [] if proposal is None else proposal.tokens
            return _Row(lane, draft, [None] * (1 + len(draft)), n_held)
        try:
            masks = lane.row.look_ahead.masks(proposal.tokens)
        except BaseException as error:  # said when it is this token's turn
            contained(error)
            masks = []
        draft = proposal.tokens[: max(0, len(masks) - 1)]
        if not draft and proposal.by != GRAMMAR:
            _drafts(lane).rates.record(proposal.rated, 0, 1)
        return _Row(lane, draft, masks, n_held)

    def _logits(self, rows: Sequence[_Row]) -> tuple[mx.array, mx.array | None]:
        """Logits `[T, V]` of all places, and hidden states `[T, 1, E]` where a row hears them."""
        fed = [token for row in rows for token in (row.lane.row.tokens[-1], *row.draft)]
        tokens = mx.array(fed, mx.int32)
        for cache in (cache for row in rows if row.draft for cache in _states(row.lane)):
            cache.begin_draft()
        first = rows[0].lane.row.session
        places = [row.lane for row in rows for _ in row.places]
        model = first.model if len(rows) == 1 else self._model_of(places)
        assert model is not None, "rows that are not computed together have no drafts"
        if len(rows) == 1 and (self._model.one_part or not device.on_cpu()):
            if not hears(rows[0].lane):
                return model(tokens[None], first.caches)[0], None
            hidden = model.hidden_states(tokens[None], first.caches)
            return model.logits(hidden)[0], hidden.swapaxes(0, 1)
        plain = [row for row in rows if not row.draft]
        drafted = [(row.lane.row.session.caches, len(row.places)) for row in rows if row.draft]
        held = (
            batch([row.lane.row.session.caches for row in plain], first.has_room, new=())
            if plain
            else ()
        )
        caches = wide(held, len(plain), drafted)
        return next_logits(model, tokens[:, None], caches, any(hears(row.lane) for row in rows))

    @staticmethod
    def _choices(rows: Sequence[_Row], flight: Flight) -> dict[int, RowChoice]:
        found = {}
        for row in rows:
            lane = row.lane
            if not row.draft and lane.row.allowed is not None:
                row.masks = [mask_of(flight, row.places[0], lane)]
            for j, place in enumerate(row.places):
                barred = lane.row.ends if lane.n_drawn + j < lane.row.min_tokens else ()
                recent = history(lane, row.draft[:j])
                found[place] = RowChoice(lane.row.sampler, recent, row.masks[j], barred, ahead=j)
        return found

    def _accept(
        self, rows: Sequence[_Row], flight: Flight, drafts: Mapping[Lane, Proposal]
    ) -> None:
        """Queue what was chosen as far as drafts are right, and take back what is behind it."""
        assert flight.tokens is not None
        values = cast(list[int], flight.tokens.tolist())
        sound = [math.isfinite(x) for x in cast(list[float], flight.soundness.tolist())]
        told = {} if flight.told is None else flight.told.by_row()
        for row in rows:
            lane, n_right = row.lane, 0
            for j, place in enumerate(row.places):
                error = lane.error or error_of(sound[place], place in flight.stuck)
                if error is not None:
                    lane.queue.append(Drawn(None, error))
                    break
                logprob, top = told.get(place, (None, ()))
                hidden = flight.heard(place, lane)
                lane.queue.append(Drawn(values[place], None, logprob, top, hidden))
                lane.n_drawn += 1
                lane.row.sampler.take(1)
                if j == len(row.draft) or values[place] != row.draft[j]:
                    lane.ready = mx.array(values[place : place + 1], mx.uint32)
                    break
                n_right += 1
            if row.draft:
                _take_back(lane, row.n_held + 1 + n_right)
                _drafts(lane).record(drafts[lane], len(row.draft), n_right)


def _states(lane: Lane) -> list[RecurrentCache]:
    return [c for c in lane.row.session.caches if isinstance(c, RecurrentCache)]


def _drafts(lane: Lane) -> Drafts:
    assert lane.row.drafts is not None
    return lane.row.drafts


def _due(rates: Rates, proposal: Proposal | Promise, chance: Chance, most: int) -> int:
    """How many tokens of a proposal that is not worth it, as far as is known, to try now."""
    is_promise = isinstance(proposal, Promise)
    n = tried(chance, most, at_least=int(is_promise))
    is_due = n > 0 and rates.is_due(proposal.rated, is_costly=is_promise)
    return n if is_due else 0


def _drawn(lane: Lane, planned: Proposal | Promise) -> Proposal | None:
    """What a plan has for a row, computed where that was only promised."""
    if isinstance(planned, Proposal):
        return planned
    tokens = planned.draw(planned.n, LaneChooser(lane))
    return Proposal(tokens, planned.by, planned.kind, planned.source) if tokens else None


def _forced(look_ahead: LookAhead) -> list[int]:
    try:
        return look_ahead.forced()
    except BaseException as error:  # its mask says what is wrong
        contained(error)
        return []


def _led(look_ahead: LookAhead, found: Proposal, most: int) -> Proposal | None:
    """A proposal as far as a grammar allows it, and what that forces behind it."""
    try:
        n, forced = look_ahead.led(found.tokens)
    except BaseException as error:  # its mask says what is wrong
        contained(error)
        return found
    tokens = [*found.tokens[:n], *forced][:most]
    return replace(found, tokens=tokens, sure=max(0, len(tokens) - n)) if tokens else None


def _take_back(lane: Lane, n_tokens: int) -> None:
    """Have a row's caches hold `n_tokens`: what was computed behind them did not come."""
    if not all(cache.rewind(n_tokens) for cache in lane.row.session.caches):
        raise AssertionError("a cache cannot take a draft back")
