"""Drafts of a text that is copied with changes.

Where a token is another than the one that stands at its place, `Lookup` finds nothing until some
tokens have come, or something that stands behind these alone. `Following` goes on at the place: a
token may stand for another (`- module_1: 40` becomes `- module_2: 41`), be left out or be added.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from mlxkv.generation.drafts.drafter import Proposal
from mlxkv.generation.drafts.lookup import Lookup, Ngrams, Place

if TYPE_CHECKING:
    import mlx.core as mx

REMEMBERED, NEEDED, MANY = 16, 6, 12
"""Of so many of the last tokens so many must have stood there; with `MANY` it is another kind."""
FIRST_KIND = 6
"""Of the kinds of `Following`, which come behind those of `Lookup`."""
LEFT_OUT = 4
"""Tokens that may be left out at a time."""


class Following:
    """Proposes what stands behind the place that was followed so far.

    Args:
        lookup: finds places to follow; it hears of tokens, and is asked, before this.
    """

    name = Lookup.name
    hears = False

    def __init__(self, lookup: Lookup):
        self._lookup = lookup
        self._text: Ngrams | None = None
        self._at = 0
        self._agreed = 0  # a bit for each of the last tokens, the latest the lowest

    def add(self, token: int, hidden: mx.array | None = None) -> None:
        del hidden
        if self._text is None:
            return
        tokens, at = self._text.tokens, self._at
        is_right = at < len(tokens) and tokens[at] == token
        was_right = self._agreed & 1
        self._agreed = (self._agreed << 1 | is_right) & ((1 << REMEMBERED) - 1)
        if is_right:
            self._at += 1
            return
        behind = list(islice(tokens, at + 1, at + 1 + LEFT_OUT))
        if token in behind:
            self._at += 2 + behind.index(token)
        elif was_right:
            self._at += 1  # it stands for another
        if self._agreed.bit_count() < NEEDED // 2:
            self._text = None

    def propose(self, most: int) -> Proposal | None:
        found = self._lookup.found
        if found is not None and found.n > self._n_common:
            agreed = self._agreeing(found)
            if self._text is None or agreed.bit_count() >= self._agreed.bit_count():
                self._text, self._at, self._agreed = found.text, found.at, agreed
        if self._text is None or most < 1 or self._agreed.bit_count() < NEEDED:
            return None
        if found is not None and (found.text, found.at) == (self._text, self._at):
            return None  # it is proposed already
        tokens = self._lookup.standing(self._text, self._at, most)
        kind = FIRST_KIND + (self._agreed.bit_count() >= MANY)
        return Proposal(tokens, self.name, kind) if tokens else None

    def _agreeing(self, place: Place) -> int:
        """`_agreed`, of a place that is found."""
        tokens, known = place.text.tokens, self._lookup.tokens
        n = min(REMEMBERED, place.at, len(known))
        pairs = zip(tokens[place.at - n : place.at], known[-n:], strict=True)
        return sum((a == b) << (n - 1 - i) for i, (a, b) in enumerate(pairs))

    @property
    def _n_common(self) -> int:
        """Tokens since one was another."""
        return (~self._agreed & (self._agreed + 1)).bit_length() - 1

    def end(self) -> None:
        """Nothing is kept."""
