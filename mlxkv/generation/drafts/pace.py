"""How many drafted tokens are worth computing.

A pass of B rows with T tokens in all takes `seconds(B, T)`, measured as it comes, and what its
drafts took to compute. It gives each row one token, and those of its draft that are right: the
first with the probability p, each behind it with the probability q, where p and q are how often
tokens of this kind were right in this text. T is the one with the most tokens a second; T = B is no
draft at all.

What was known and not drafted is learned from all the same, by the token that came. What has to be
computed first, and how long passes take, is learned from drafts alone: after `BACKOFF` chances that
were passed over, though they would pay if tokens cost as little as at first, a draft is made all
the same, as long as would pay then, and after twice as many chances the next time if it was wrong.
Chances of proposals with little in common with what they are taken from are counted for each kind
and for all: else each kind is tried in a text in which nothing repeats.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LATEST = 4
"""Times that are remembered; the shortest counts, as what holds something up only adds."""
LEARN, LEARN_FIRST = 0.1, 0.25
"""Weight of the latest token in how often tokens are right, and of a text's first one."""
WORTH, WORTH_OF_BATCH = 1.1, 1.2
"""How many times the tokens a second of no draft a draft must promise: of one sequence, and of
several, where a row with a draft leaves the others' block by a copy."""
FIRST_SLOPE = 0.04
"""Time that a token adds to a pass of one, until that has been measured."""
BACKOFF, LONGEST_BACKOFF = 16, 512
LONG = 3
"""Kinds from here on have much in common with what they are taken from."""
PRIORS = (0.3, 0.45, 0.6, 0.75, 0.85, 0.9, 0.5, 0.7, 0.2, 0.35, 0.6)
"""How often a first token of each kind is taken to be right at first."""
FURTHER = 0.85
"""The same of a token behind a right one, at least."""

Kind = tuple[str, int]
"""A drafter, with what tells it from others of its name, and the kind of its proposal."""


class Time:
    """How long something takes: the shortest of the latest times.

    The first is left out: it compiles kernels, and touches memory that is new.
    """

    def __init__(self) -> None:
        self._is_warm = False
        self._latest: deque[float] = deque(maxlen=LATEST)

    @property
    def seconds(self) -> float | None:
        """None until it has been measured."""
        return min(self._latest, default=None)

    def record(self, seconds: float) -> None:
        """It has taken so long."""
        if self._is_warm:
            self._latest.append(seconds)
        self._is_warm = True


class Costs:
    """How long passes of one model take."""

    def __init__(self) -> None:
        self._times: dict[int, dict[int, Time]] = {}  # of rows, and tokens

    def record(self, n_rows: int, n_tokens: int, seconds: float) -> None:
        """A pass of `n_rows` rows and `n_tokens` tokens in all has taken so long."""
        self._times.setdefault(n_rows, {}).setdefault(n_tokens, Time()).record(seconds)

    def seconds(self, n_rows: int, n_tokens: int) -> float | None:
        """How long a pass takes: measured, or between the next narrower and wider one that were.

        Wider than any that was, a token adds half of what it has added so far: what is hoped for is
        measured soon. None where no pass of so many rows without drafts has been measured.
        """
        times = self._times.get(n_rows, {}).items()
        known = {n: seconds for n, time in times if (seconds := time.seconds) is not None}
        if n_rows not in known or n_tokens in known:
            return known.get(n_tokens if n_rows in known else n_rows)
        widths = sorted(known)
        i = bisect_right(widths, n_tokens)
        base, low = known[n_rows], widths[i - 1]
        if i == len(widths):
            slope = FIRST_SLOPE * base
            if low > n_rows:
                slope = max(0.0, known[low] - base) / (low - n_rows) / 2
        else:
            slope = (known[widths[i]] - known[low]) / (widths[i] - low)
        return known[low] + slope * (n_tokens - low)


@dataclass(slots=True)
class _Share:
    """How often something is so: a moving average, which the first cases move more."""

    value: float
    n_seen: int = 0

    def learn(self, is_so: bool) -> None:
        """One more case."""
        self.n_seen += 1
        weight = max(LEARN, 1 / (1 / LEARN_FIRST + self.n_seen - 1))
        self.value += weight * (is_so - self.value)


@dataclass(slots=True)
class _Known:
    """What is known of a kind: how often it is right; and of it or of all: chances passed over."""

    first: _Share = field(default_factory=lambda: _Share(0.0))
    further: _Share = field(default_factory=lambda: _Share(0.0))
    n_passed: int = 0
    backoff: int = BACKOFF


class Rates:
    """How often proposals are right in one text.

    Args:
        before: what earlier texts of this model have shown, which this one adds to; None for
            nothing.
    """

    def __init__(self, before: Rates | None = None):
        self._before = before
        self._known: dict[Kind, _Known] = {}
        self._all = _Known()

    def right(self, kind: Kind) -> tuple[float, float]:
        """How often the next token of a proposal is right, and each one behind right ones."""
        known = self._of(kind)
        return known.first.value, known.further.value

    def record(self, kind: Kind, n_right: int, n_proposed: int) -> None:
        """Of a proposal's first `n_proposed` tokens the first `n_right` came."""
        known = self._of(kind)
        for i in range(min(n_right + 1, n_proposed)):
            (known.further if i else known.first).learn(i < n_right)
        for each in (known, self._all):
            each.n_passed = 0
            each.backoff = BACKOFF if n_right else min(2 * each.backoff, LONGEST_BACKOFF)
        if self._before is not None:
            self._before.record(kind, n_right, n_proposed)

    def learn(self, kind: Kind, is_right: bool) -> None:
        """Whether the first token of a proposal came, of which nothing was drafted."""
        self._of(kind).first.learn(is_right)
        if self._before is not None:
            self._before.learn(kind, is_right)

    def is_due(self, kind: Kind, *, is_costly: bool = False) -> bool:
        """Count a chance that is passed over; whether it has to be taken.

        One that is costly counts with those of earlier texts: each may begin with a whole prompt.
        """
        counted = [self._of(kind)] if kind[1] >= LONG else [self._of(kind), self._all]
        if is_costly and self._before is not None:
            counted.append(self._before._of(kind))
        for each in counted:
            each.n_passed += 1
        return all(each.n_passed > each.backoff for each in counted)

    def _of(self, kind: Kind) -> _Known:
        if kind not in self._known:
            if self._before is None:
                first = PRIORS[min(kind[1], len(PRIORS) - 1)]
                further = max(FURTHER, first)
            else:
                first, further = self._before.right(kind)
            self._known[kind] = _Known(_Share(first), _Share(further))
        return self._known[kind]


@dataclass(frozen=True, slots=True)
class Chance:
    """A row's proposal.

    Args:
        n: tokens that are proposed; 0 for no proposal.
        right: how often the next one is right.
        further: how often each one behind right ones is.
        seconds: what drafting each of them takes, besides the pass.
        sure: how many of the last ones come where those before them do.
        forced: how many of the first ones come in any case.
    """

    n: int = 0
    right: float = 0.0
    further: float = 0.0
    seconds: float = 0.0
    sure: int = 0
    forced: int = 0

    def gains(self, most: int) -> list[float]:
        """How often each of the first tokens counts."""
        n, first = min(self.n, most), self.forced
        last = max(0, self.n - first - self.sure - 1)
        right, further = self.right, self.further
        guessed = [right * further ** min(k, last) for k in range(n - first)]
        return [1.0] * min(first, n) + guessed


def drafted(chances: Sequence[Chance], costs: Costs, most: int) -> list[int]:
    """How many tokens of each row's proposal are worth computing.

    Args:
        chances: one for each row.
        costs: of passes.
        most: tokens that a pass may have.
    """
    n_rows, chosen = len(chances), [0] * len(chances)
    base = costs.seconds(n_rows, n_rows)
    gains = [(g, i, k) for i, c in enumerate(chances) for k, g in enumerate(c.gains(most))]
    gains.sort(key=lambda gain: (-gain[0], gain[2]))
    worth = WORTH if n_rows == 1 else WORTH_OF_BATCH
    tokens, best, n_best = float(n_rows), worth * n_rows / (base or 1.0), 0
    drafting = 0.0
    for n, (gain, i, _) in enumerate(gains[: max(0, most - n_rows)], start=1):
        tokens += gain
        drafting += chances[i].seconds
        seconds = drafting + (costs.seconds(n_rows, n_rows + n) or 1 + FIRST_SLOPE * n)
        if tokens / seconds > best:
            best, n_best = tokens / seconds, n
    for _, i, _ in gains[:n_best]:
        chosen[i] += 1
    return chosen


def tried(chance: Chance, most: int, *, at_least: int = 1) -> int:
    """How many tokens of a proposal to try, whatever was measured.

    Args:
        chance: has one token or more.
        most: so many.
        at_least: so many, also where they would not pay at the lowest cost that there may be.
    """
    gains = chance.gains(most)
    ratios = [(1 + sum(gains[:n])) / (1 + FIRST_SLOPE * n) for n in range(1, len(gains) + 1)]
    best = max(range(len(ratios)), key=ratios.__getitem__)
    return best + 1 if ratios[best] > WORTH else at_least


@dataclass(slots=True)
class Counts:
    """What drafts gave an answer, or all of them.

    Args:
        passes: steps that computed a draft.
        proposed: drafted tokens that were computed.
        accepted: those of them that came.
        by: drafter -> (proposed, accepted).
    """

    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    by: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, by: Mapping[str, tuple[int, int]]) -> None:
        """Count a pass: drafter -> (proposed, accepted)."""
        self.passes += 1
        for drafter, (proposed, accepted) in by.items():
            self.proposed += proposed
            self.accepted += accepted
            before = self.by.get(drafter, (0, 0))
            self.by[drafter] = before[0] + proposed, before[1] + accepted
