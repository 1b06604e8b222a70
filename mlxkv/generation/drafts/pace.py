"""How many drafted tokens are worth computing.

A pass of B rows with T tokens in all takes `seconds(B, T)`, measured as it comes, and what its
drafts took to compute. It gives each row
one token, and those of its draft that are right: the k-th with the probability p^k, where p is how
often tokens of this kind were right in this text. T is the one with the most tokens a second; T = B
is no draft at all.

What is never drafted is never learned: after `BACKOFF` chances that were passed over a draft is
made all the same, as long as would pay if tokens cost as little as at first, and after twice as
many chances the next time if it was wrong. Chances of proposals with little in common with what
they are taken from are counted for each kind and for all: else each kind is tried in a text in
which nothing repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FADE = 0.15
"""Weight of the latest pass in a moving average."""
LEARN = 0.1
"""Weight of the latest token in how often tokens are right."""
WORTH, WORTH_OF_BATCH = 1.1, 1.5
"""How many times the tokens a second of no draft a draft must promise: of one sequence, and of
several, where a row with a draft leaves the others' block by a copy."""
FIRST_SLOPE = 0.04
"""Time that a token adds to a pass of one, until that has been measured."""
BACKOFF, LONGEST_BACKOFF = 16, 512
LONG = 3
"""Kinds from here on have much in common with what they are taken from."""
PRIORS = (0.3, 0.45, 0.6, 0.75, 0.85, 0.9)
"""How often tokens of each kind are taken to be right at first."""

Kind = tuple[str, int]
"""A drafter, and the kind of its proposal."""


def moved(known: float | None, seconds: float) -> float:
    """A moving average of times with one more; None for none yet.

    One that was held up by something else counts as a slow one, and not as what it was.
    """
    return seconds if known is None else known + FADE * (min(seconds, 2 * known) - known)


class Costs:
    """How long passes of one model take."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}

    def record(self, n_rows: int, n_tokens: int, seconds: float) -> None:
        """A pass of `n_rows` rows and `n_tokens` tokens in all has taken so long."""
        known = self._seconds.get((n_rows, n_tokens))
        if known is not None:
            seconds = moved(known, seconds)
        elif (base := self._seconds.get((n_rows, n_rows))) is not None:
            # As many passes without drafts would have done it.
            seconds = min(seconds, base * n_tokens / n_rows)
        self._seconds[n_rows, n_tokens] = seconds

    def seconds(self, n_rows: int, n_tokens: int) -> float | None:
        """How long a pass takes; by the next shorter one, until it has been measured itself.

        None where no pass of so many rows has been measured.
        """
        for n in range(n_tokens, n_rows - 1, -1):
            known = self._seconds.get((n_rows, n))
            if known is not None:
                return known * (1 + FIRST_SLOPE * (n_tokens - n))
        return None


@dataclass(slots=True)
class _Known:
    """What is known of a kind, or of all: how often it is right, and chances passed over."""

    right: float
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
        self._all = _Known(0.0)

    def right(self, kind: Kind) -> float:
        """How often the next token of a proposal is right."""
        return self._of(kind).right

    def record(self, kind: Kind, n_right: int, n_proposed: int) -> None:
        """Of a proposal's first `n_proposed` tokens the first `n_right` came."""
        known = self._of(kind)
        for i in range(min(n_right + 1, n_proposed)):
            known.right += LEARN * ((i < n_right) - known.right)
        for each in (known, self._all):
            each.n_passed = 0
            each.backoff = BACKOFF if n_right else min(2 * each.backoff, LONGEST_BACKOFF)
        if self._before is not None:
            self._before.record(kind, n_right, n_proposed)

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
            first = PRIORS[min(kind[1], len(PRIORS) - 1)]
            right = first if self._before is None else self._before.right(kind)
            self._known[kind] = _Known(right)
        return self._known[kind]


@dataclass(frozen=True, slots=True)
class Chance:
    """A row's proposal.

    Args:
        n: tokens that are proposed; 0 for no proposal.
        right: how often the next one is right.
        seconds: what drafting each of them takes, besides the pass.
    """

    n: int = 0
    right: float = 0.0
    seconds: float = 0.0


def drafted(chances: Sequence[Chance], costs: Costs, most: int) -> list[int]:
    """How many tokens of each row's proposal are worth computing.

    Args:
        chances: one for each row.
        costs: of passes.
        most: tokens that a pass may have.
    """
    n_rows, chosen = len(chances), [0] * len(chances)
    base = costs.seconds(n_rows, n_rows)
    gains = [(c.right**k, i, k) for i, c in enumerate(chances) for k in range(1, c.n + 1)]
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


def tried(chance: Chance, most: int) -> int:
    """How many tokens of a proposal to try, whatever was measured: at least one."""
    gains = [chance.right**k for k in range(1, min(chance.n, most) + 1)]
    ratios = [(1 + sum(gains[:n])) / (1 + FIRST_SLOPE * n) for n in range(1, len(gains) + 1)]
    return max(range(len(ratios)), key=ratios.__getitem__) + 1


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

    def add(self, drafter: str, proposed: int, accepted: int) -> None:
        self.passes += 1
        self.proposed += proposed
        self.accepted += accepted
        before = self.by.get(drafter, (0, 0))
        self.by[drafter] = before[0] + proposed, before[1] + accepted
