"""Drafts that are looked up: what followed the last tokens where they stood before.

`Lookup` looks in the tokens of this prompt and answer, and in those of earlier sequences of the
same owner (`PastTokens`). Of the places where the last `GRAM` tokens stand, it takes the one with
the most tokens before it in common, and of these the latest.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from mlxkv.generation.drafts.drafter import Proposal

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

GRAM = 3
"""Tokens that must agree for a place to be looked at."""
SORTED_FROM = 512
"""Tokens from which on it is faster to sort a text's runs than to take in one after the other."""
MOST_PLACES = 32
"""Places that are compared, the latest of each text."""
LONGEST = 32
"""Tokens before a place that are compared."""
KINDS = (4, 6, 10, 18, LONGEST)
"""Tokens in common below which a proposal is of the first, second ... kind."""
MOST_TEXTS = 6
"""Indices of earlier sequences, each of which a lookup goes through."""
PAST_TOKENS = 2**16
"""Tokens of earlier sequences that are kept for an owner."""
Load = Callable[[], Sequence[Sequence[int]] | None]
_BITS = 21
"""Of a token in a key of three."""


class Ngrams:
    """Where each run of `GRAM` tokens stands in a text.

    What a long text begins with is sorted once by its runs; of what is added, each run has its
    latest place.

    Args:
        tokens: ids; negative ones stand for media, and are in no run.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens = list(tokens)
        self._n_sorted = len(self.tokens) if len(self.tokens) >= SORTED_FROM else 0
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        # Of each added run the latest place behind it, and of each place the one before.
        self._latest: dict[int, int] = {}
        self._before = array("i")

    def places(self, key: int) -> list[int]:
        """Positions behind the latest of these runs, the latest first."""
        self._look()
        found, place = [], self._latest.get(key, 0)
        while place and len(found) < MOST_PLACES:
            found.append(place)
            place = self._before[place - self._n_sorted]
        if self._sorted is not None and (most := MOST_PLACES - len(found)):
            runs, behind = self._sorted
            first, last = runs.searchsorted((key, key + 1)).tolist()
            found += behind[max(first, last - most) : last][::-1].tolist()
        return found

    def _look(self) -> None:
        """Take in the tokens that came since the last time: of use are runs that something follows.

        It is done when it is first asked for: the first token of an answer does not wait for it.
        """
        tokens, before, latest = self.tokens, self._before, self._latest
        if self._sorted is None and self._n_sorted:
            self._sorted = _sorted_runs(tokens[: self._n_sorted])
        for place in range(self._n_sorted + len(before), len(tokens)):
            run = tokens[max(0, place - GRAM) : place]
            is_run = len(run) == GRAM and min(run) >= 0
            key = key_of(run) if is_run else -1
            before.append(latest.get(key, 0))
            if is_run:
                latest[key] = place


def _sorted_runs(tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Runs that a token follows in order, and the places behind them, equal ones' rising."""
    import numpy as np  # takes a tenth of a second, which short prompts do without

    ids = np.array(tokens, np.int64)
    first, second, third = ids[:-GRAM], ids[1:-2], ids[2:-1]
    runs = first << 2 * _BITS | second << _BITS | third
    places = np.flatnonzero(np.minimum(np.minimum(first, second), third) >= 0)
    order = places[np.argsort(runs[places], kind="stable")]
    return runs[order], (order + GRAM).astype(np.int32)


class PastTokens:
    """Tokens of an owner's earlier sequences, the latest `PAST_TOKENS`.

    Each has an index of its own until there are `MOST_TEXTS`; then they get one together.

    Args:
        most: tokens.
        load: sequences that an earlier process kept, asked for before the first look, and again
            while it gives None; None for none.

    Attributes:
        texts: what is looked through.
        is_changed: whether a sequence has ended.
    """

    def __init__(self, most: int = PAST_TOKENS, load: Load | None = None):
        self._most, self._load = most, load
        self._sequences: list[tuple[int, ...]] = []
        self.texts: list[Ngrams] = []
        self.is_changed = False

    @property
    def n_tokens(self) -> int:
        """Tokens that are kept."""
        return sum(map(len, self._sequences))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self._sequences), default=0)

    def recalled(self) -> list[Ngrams]:
        """`texts`, the latest first, with what an earlier process kept."""
        if self._load is not None and (kept := self._load()) is not None:
            self._load = None
            if kept:
                self._sequences = self.merged(kept)
                self.texts = [self._together()]
        return self.texts[::-1]

    def merged(self, kept: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
        """The sequences behind those that are kept elsewhere, as many of the latest as there may
        be."""
        found = [tuple(one) for one in kept]
        for new in self._sequences:
            found = [old for old in found if new[: len(old)] != old] + [new]
        n_tokens = sum(map(len, found))
        while n_tokens > self._most:
            n_tokens -= len(found.pop(0))
        return found

    def _together(self) -> Ngrams:
        return Ngrams(token for one in self._sequences for token in (*one, -1))

    def add(self, tokens: Sequence[int]) -> None:
        """A sequence that has ended: prompt and answer. One that it goes on from is dropped."""
        new = tuple(tokens[-self._most :])
        if len(new) <= GRAM:
            return
        kept = [old for old in self._sequences if new[: len(old)] != old]
        self._sequences, self.is_changed = [*kept, new], True
        while self.n_tokens > self._most:
            del self._sequences[0]
        if len(self.texts) < MOST_TEXTS:
            self.texts.append(Ngrams(new))
        else:
            self.texts = [self._together()]


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a text the last tokens stand.

    Args:
        text: theirs.
        at: position behind them.
        n: so many tokens before it are the last ones.
    """

    text: Ngrams
    at: int
    n: int

    @property
    def kind(self) -> int:
        """Of what is proposed from there."""
        return sum(self.n >= n for n in KINDS)


class Lookup:
    """Proposes what followed the last tokens before.

    Args:
        tokens: of the prompt.
        past: of earlier sequences; None for none.

    Attributes:
        found: where the last proposal was taken from; None for none.
    """

    name = "lookup"
    hears = False

    def __init__(self, tokens: Sequence[int], past: PastTokens | None = None):
        self._own, self._past = Ngrams(tokens), past
        self._texts: list[Ngrams] | None = None
        self.found: Place | None = None

    def add(self, token: int, hidden: mx.array | None = None) -> None:
        del hidden
        self._own.tokens.append(token)
        self.found = None

    def end(self) -> None:
        """Nothing: the answer is given to `PastTokens` as a whole."""

    def propose(self, most: int) -> Proposal | None:
        self.found = place = self._place(self._own.tokens) if most >= 1 else None
        if place is None:
            return None
        found = self.standing(place.text, place.at, most)
        return Proposal(found, self.name, place.kind) if found else None

    def behind(self, tokens: Sequence[int], most: int) -> Proposal | None:
        """See `LooksBehind`."""
        place = self._place([*self._own.tokens[-LONGEST:], *tokens]) if most >= 1 else None
        if place is None:
            return None
        found = _behind(place.text.tokens, place.at, most, grows=False)
        return Proposal(found, self.name, place.kind) if found else None

    def _place(self, tokens: Sequence[int]) -> Place | None:
        """Where the last of these tokens stand with the most before them."""
        if len(tokens) < GRAM or min(tokens[-GRAM:]) < 0:
            return None
        if self._texts is None:  # not before the first token
            self._texts = [] if self._past is None else self._past.recalled()
        key = key_of(tokens)
        best, text, at = 0, self._own, 0
        for source in (self._own, *self._texts):
            for place in source.places(key):
                n = _n_common(source.tokens, place, tokens)
                if n > best:
                    best, text, at = n, source, place
        return Place(text, at, best) if best else None

    @property
    def tokens(self) -> list[int]:
        """All so far, the prompt's and the answer's."""
        return self._own.tokens

    def standing(self, text: Ngrams, at: int, most: int) -> list[int]:
        """Tokens that stand from a place on, at most so many."""
        return _behind(text.tokens, at, most, grows=text is self._own)


def key_of(tokens: Sequence[int]) -> int:
    """Of the last `GRAM` tokens."""
    a, b, c = tokens[-GRAM:]
    return a << 2 * _BITS | b << _BITS | c


def _n_common(text: Sequence[int], place: int, tokens: Sequence[int]) -> int:
    """Tokens before `place` that are the last of `tokens`, `LONGEST` at most."""
    n, most = GRAM, min(LONGEST, place, len(tokens))
    while n < most and text[place - 1 - n] == tokens[-1 - n]:
        n += 1
    return n


def _behind(text: Sequence[int], at: int, most: int, grows: bool) -> list[int]:
    """Tokens from `at` on, up to media or the end of a sequence.

    Args:
        grows: whether what is found stands behind the text, so that it may repeat itself.
    """
    found: list[int] = []
    for token in islice(text, at, at + most):
        if token < 0:
            return found
        found.append(token)
    while grows and found and len(found) < most:
        found.append(found[len(found) - (len(text) - at)])
    return found
