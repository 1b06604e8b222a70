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
from dataclasses import replace
from functools import cached_property
from typing import cast

import mlx.core as mx

from mlxkv.base import device
from mlxkv.cache import RecurrentCache, RotatingKVCache
from mlxkv.errors import contained
from mlxkv.generation.drafts.chooser import LaneChooser
from mlxkv.generation.drafts.drafter import Promise, Proposal
from mlxkv.generation.drafts.drafts import GRAMMAR, Drafts, LookAhead
from mlxkv.generation.drafts.pace import Chance, Costs, Rates, drafted, tried
from mlxkv.generation.drafts.places import PassRow, find_masks, lay_out, mask_of_one, pass_row
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
from mlxkv.kv.layout import Cache
from mlxkv.kv.types import STEP, ceil_step
from mlxkv.nn.batch import batch
from mlxkv.nn.blocks import sliceable
from mlxkv.nn.model import CausalLM
from mlxkv.nn.wide import wide
from mlxkv.sampling.math import rows_of, soundness
from mlxkv.sampling.sampler import RowChoice, choose


def most_tokens() -> int:
    """Tokens of a pass, all rows together.

    The kernels of the CPU backend compute up to 8 rows at nearly the cost of one, each as it is
    computed alone. On a GPU more rows than 16 take other kernels than a few do.
    """
    return 8 if device.on_cpu() else 16


Plan = Mapping[Lane, Proposal | Promise]
"""The drafts of a pass, cut to what is worth computing."""


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
        if row.look_ahead is None:
            return row.drafts.propose(most)
        if not (forced := _forced(row.look_ahead)[:most]):
            found = row.drafts.propose(most)
            return _led(row.look_ahead, found, most) if isinstance(found, Proposal) else found
        only = Proposal(forced, GRAMMAR, forced=len(forced))
        found = row.drafts.behind(forced, most - len(forced)) if len(forced) < most else None
        if found is None:
            return only
        found = replace(found, tokens=[*forced, *found.tokens], forced=len(forced))
        led = _led(row.look_ahead, found, most)
        return led if led is not None and led.n_guessed else only

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
        """Whether so many tokens can be computed at once; nothing gives way for it.

        Asked once in a step of `STEP` tokens, and where windows are to be moved.
        """
        session = lane.row.session
        # A window may have become full since it was asked, and is moved then.
        moved_bytes = sum(cache.room_bytes(n_new) for cache in _windows(session.caches))
        asked = session.n_held // STEP, n_new, moved_bytes
        if lane.roomy[:3] != asked:
            # A row of shared buffers is copied out for it.
            is_shared = any(cache.row is not None for cache in sliceable(session.caches))
            n_bytes = moved_bytes + (session.nbytes if is_shared else 0)
            n_bytes += sum(cache.state_bytes for cache in _states(lane))  # of before it, beside it
            lane.roomy = (*asked, session.has_room(n_bytes, n_new))
        return lane.roomy[3]

    @staticmethod
    def _chance(lane: Lane, proposal: Proposal | Promise | None) -> Chance:
        if proposal is None:
            return Chance()
        right, further = _drafts(lane).rates.right(proposal.rated)
        if isinstance(proposal, Promise):
            return Chance(proposal.n, right, further, proposal.seconds)
        return Chance(proposal.n, right, further, 0.0, proposal.sure, proposal.forced)

    def run(self, lanes: Sequence[Lane], plan: Plan) -> bool:
        """Compute the next tokens of rows, which then wait in their queues.

        Args:
            lanes: that go on, each with a token to feed.
            plan: for some of them.

        Returns:
            False, with nothing done, where those who promised leave nothing of the plan.
        """
        drafts = {lane: found for lane in plan if (found := _drawn(lane, plan[lane])) is not None}
        started = time.perf_counter()
        if not drafts:
            return False
        rows = [pass_row(lane, drafts.get(lane)) for lane in lanes]
        # Those with one token first: see `nn.wide`.
        rows.sort(key=lambda row: len(row.draft) > 0)
        n_tokens = lay_out(rows)
        logits, hidden = self._logits(rows)
        places = [row.lane for row in rows for i in row.at if i is not None]
        flight = Flight(places, logits, soundness(logits), None, [], hidden=hidden)
        mx.async_eval(*flight.arrays)
        for row in rows:  # while the pass is computed
            find_masks(row)
        flight.parts += choose(logits, self._choices(rows, flight))
        settle(flight)
        mx.eval(*flight.arrays)
        self._accept(rows, flight, drafts)
        if len(places) == n_tokens:  # a pass that leaves logits out says nothing of others
            self.costs.record(len(rows), n_tokens, time.perf_counter() - started)
        return True

    def _logits(self, rows: Sequence[PassRow]) -> tuple[mx.array, mx.array | None]:
        """Logits `[n, V]` of the places that need them, and hidden states `[T, 1, E]` of all places
        where a row hears them."""
        fed = [token for row in rows for token in (row.lane.row.tokens[-1], *row.draft)]
        tokens = mx.array(fed, mx.int32)
        for cache in (cache for row in rows if row.draft for cache in _states(row.lane)):
            cache.begin_draft()
        first = rows[0].lane.row.session
        lanes = [row.lane for row in rows for _ in row.places]
        model = first.model if len(rows) == 1 else self._model_of(lanes)
        assert model is not None, "rows that are not computed together have no drafts"
        places = [place for row in rows for place in row.places]
        at = [i for row in rows for i in row.at]
        used = [place for place, i in zip(places, at, strict=True) if i is not None]
        hear = any(hears(row.lane) for row in rows)
        for row in rows:
            for cache in _windows(row.lane.row.session.caches if row.draft else ()):
                cache.make_room(len(row.places))
        if len(rows) == 1 and self._model.one_part:
            return rows_of(model(tokens[None], first.caches)[0], used), None
        if len(rows) == 1 and not device.on_cpu():
            hidden = model.hidden_states(tokens[None], first.caches)
            logits = model.logits(rows_of(hidden[0], used)[None])[0]
            return logits, hidden.swapaxes(0, 1) if hear else None
        plain = [row for row in rows if not row.draft]
        drafted = [(row.lane.row.session.caches, len(row.places)) for row in rows if row.draft]
        held = (
            batch([row.lane.row.session.caches for row in plain], first.has_room, new=())
            if plain
            else ()
        )
        caches = wide(held, len(plain), drafted)
        if len(used) == len(fed) or model is not first.model:  # rows of several adapters stay
            logits, hidden = next_logits(model, tokens[:, None], caches, hear)
            return rows_of(logits, used), hidden
        hidden = model.hidden_states(tokens[:, None], caches)
        return model.logits(rows_of(hidden, used))[:, 0], hidden if hear else None

    @staticmethod
    def _choices(rows: Sequence[PassRow], flight: Flight) -> dict[int, RowChoice]:
        found = {}
        for row in rows:
            lane, first = row.lane, row.at[0]
            if not row.draft and lane.row.allowed is not None and first is not None:
                row.masks = [mask_of(flight, first, lane)]
            for j, i in enumerate(row.at):
                if i is None:
                    continue
                barred = lane.row.ends if lane.n_drawn + j < lane.row.min_tokens else ()
                recent = history(lane, row.draft[:j])
                # Places that do not count are chosen for as well, and not looked at.
                mask = row.masks[j] if j < len(row.masks) else None
                if isinstance(mask, int):
                    mask = mask_of_one(mask, flight.logits.shape[1])
                found[i] = RowChoice(lane.row.sampler, recent, mask, barred, ahead=j)
        return found

    def _accept(
        self, rows: Sequence[PassRow], flight: Flight, drafts: Mapping[Lane, Proposal]
    ) -> None:
        """Queue what was chosen as far as drafts are right, and take back what is behind it."""
        assert flight.tokens is not None
        values = cast(list[int], flight.tokens.tolist())
        sound = [math.isfinite(x) for x in cast(list[float], flight.soundness.tolist())]
        told = {} if flight.told is None else flight.told.by_row()
        for row in rows:
            lane, n_right = row.lane, 0
            for j, (place, i) in enumerate(zip(row.places, row.at, strict=True)):
                error = lane.error
                if i is not None:
                    error = error or error_of(sound[i], i in flight.stuck)
                if error is not None:
                    lane.queue.append(Drawn(None, error))
                    break
                token = cast(int, row.masks[j]) if i is None else values[i]
                logprob, top = (None, ()) if i is None else told.get(i, (None, ()))
                hidden = flight.heard(place, lane)
                lane.queue.append(Drawn(token, None, logprob, top, hidden))
                lane.n_drawn += 1
                lane.row.sampler.take(1)
                if j == len(row.draft) or token != row.draft[j]:
                    lane.ready = mx.array([token], mx.uint32)
                    break
                n_right += 1
            if len(row.places) > 1:
                _take_back(lane, row.n_held + 1 + n_right)
                _drafts(lane).record(drafts[lane], len(row.places) - 1, n_right)


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


def _windows(caches: Sequence[Cache]) -> list[RotatingKVCache]:
    return [cache for cache in caches if isinstance(cache, RotatingKVCache)]


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
