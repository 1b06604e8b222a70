"""Drafts that are looked up: what followed the last tokens where they stood before.

`Lookup` looks in the tokens of this prompt and answer, and in those of earlier sequences of the
same owner (`PastTokens`). Of the places where the last `GRAM` tokens stand, it takes the one with
the most tokens before it in common, and of these the latest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from mlxkv.generation.drafts.drafter import Proposal

if TYPE_CHECKING:
    import numpy as np

GRAM = 3
"""Tokens that must agree for a place to be looked at."""
MOST_PLACES = 8
"""Places that are compared, the latest of each text."""
LONGEST = 32
"""Tokens before a place that are compared."""
KINDS = (4, 6, 10, 18, LONGEST)
"""Tokens in common below which a proposal is of the first, second ... kind."""
MOST_TEXTS = 6
"""Indices of earlier sequences, each of which a lookup goes through."""
PAST_TOKENS = 2**17
"""Tokens of earlier sequences that are kept for an owner."""
_BITS = 21
"""Of a token in a key of three."""


class Ngrams:
    """Where each run of `GRAM` tokens stands in a text that does not change.

    Args:
        tokens: ids; negative ones stand for media, and are in no run.
    """

    def __init__(self, tokens: Sequence[int]):
        import numpy as np

        self.tokens = list(tokens)
        ids = np.asarray(self.tokens, np.int64)
        n = max(0, len(ids) - GRAM)  # behind the last run nothing is known to follow
        keys = (ids[:n] << 2 * _BITS) | (ids[1 : n + 1] << _BITS) | ids[2 : n + 2]
        is_text = (ids[:n] >= 0) & (ids[1 : n + 1] >= 0) & (ids[2 : n + 2] >= 0)
        keys[~is_text] = -1
        order = np.argsort(keys, kind="stable")
        self._keys: np.ndarray = keys[order]
        self._places: np.ndarray = order.astype(np.int32) + GRAM

    def places(self, key: int) -> list[int]:
        """Positions behind the latest of these runs, the latest last."""
        stop = int(self._keys.searchsorted(key, "right"))
        start = int(self._keys.searchsorted(key, "left"))
        return self._places[max(start, stop - MOST_PLACES) : stop].tolist()


class PastTokens:
    """Tokens of an owner's earlier sequences, the latest `PAST_TOKENS`.

    Each has an index of its own until there are `MOST_TEXTS`; then they get one together.
    """

    def __init__(self, most: int = PAST_TOKENS):
        self._most = most
        self._sequences: list[tuple[int, ...]] = []
        self.texts: list[Ngrams] = []

    @property
    def n_tokens(self) -> int:
        """Tokens that are kept."""
        return sum(map(len, self._sequences))

    def add(self, tokens: Sequence[int]) -> None:
        """A sequence that has ended: prompt and answer. One that it goes on from is dropped."""
        new = tuple(tokens[-self._most :])
        if len(new) <= GRAM:
            return
        kept = [old for old in self._sequences if new[: len(old)] != old]
        self._sequences = [*kept, new]
        while self.n_tokens > self._most:
            del self._sequences[0]
        if len(self.texts) < MOST_TEXTS:
            self.texts.append(Ngrams(new))
        else:
            self.texts = [Ngrams([token for one in self._sequences for token in (*one, -1)])]


class Lookup:
    """Proposes what followed the last tokens before.

    Args:
        tokens: of the prompt.
        past: of earlier sequences; None for none.
    """

    name = "lookup"

    def __init__(self, tokens: Sequence[int], past: PastTokens | None = None):
        self._tokens, self._n_prompt = list(tokens), len(tokens)
        # Made when it is first asked for: the first token does not wait for it.
        self._prompt: Ngrams | None = None
        self._past = [] if past is None else list(past.texts)
        self._own: dict[int, list[int]] = {}

    def add(self, token: int) -> None:
        tokens = self._tokens
        if len(tokens) >= GRAM and min(tokens[-GRAM:]) >= 0:
            # Only now: a run is of use once something follows it.
            places = self._own.setdefault(_key(tokens), [])
            places.append(len(tokens))
            del places[:-MOST_PLACES]
        tokens.append(token)

    def propose(self, most: int) -> Proposal | None:
        tokens = self._tokens
        if most < 1 or len(tokens) < GRAM or min(tokens[-GRAM:]) < 0:
            return None
        key = _key(tokens)
        best, text, at = 0, tokens, 0
        for source, places in self._places(key):
            for place in reversed(places):
                n = _n_common(source, place, tokens)
                if n > best:
                    best, text, at = n, source, place
        if not best:
            return None
        found = _behind(text, at, most, grows=text is tokens)
        kind = sum(best >= n for n in KINDS)
        return Proposal(found, self.name, kind) if found else None

    def _places(self, key: int) -> list[tuple[list[int], list[int]]]:
        """Texts with the places in them, this sequence first."""
        if self._prompt is None:
            self._prompt = Ngrams(self._tokens[: self._n_prompt])
        own = [*self._prompt.places(key), *self._own.get(key, ())]
        found = [(self._tokens, own[-MOST_PLACES:])]
        return found + [(text.tokens, text.places(key)) for text in reversed(self._past)]


def _key(tokens: Sequence[int]) -> int:
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
