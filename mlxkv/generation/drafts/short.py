"""Drafts of what followed the last one or two tokens when they came last.

That is seldom right in a text, and often in what is laid out alike again and again: the marks
between the fields of an object, the indentation of code. So it is learned from far more often than
it is drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlxkv.generation.drafts.drafter import Proposal
from mlxkv.generation.drafts.following import FIRST_KIND as FIRST_OF_FOLLOWING
from mlxkv.generation.drafts.lookup import Lookup

if TYPE_CHECKING:
    import mlx.core as mx

MOST_OF_PROMPT = 1024
"""Tokens of a prompt's end that are looked at."""
FIRST_KIND = FIRST_OF_FOLLOWING + 2
"""One token in common, then two; behind the kinds of `Following`."""


class Short:
    """Proposes what followed the last tokens.

    Args:
        tokens: of the prompt.
    """

    name = Lookup.name
    hears = False

    def __init__(self, tokens: Sequence[int]):
        self._tokens = list(tokens[-MOST_OF_PROMPT:])
        self._n_looked = 1
        self._places: dict[tuple[int, ...], int] = {}  # of one or two tokens, behind the latest

    def add(self, token: int, hidden: mx.array | None = None) -> None:
        del hidden
        self._tokens.append(token)

    def propose(self, most: int) -> Proposal | None:
        tokens, places = self._tokens, self._places
        for i in range(self._n_looked, len(tokens)):
            places[tokens[i - 1],] = places[tokens[i - 2], tokens[i - 1]] = i
        self._n_looked = max(self._n_looked, len(tokens))
        if most < 1 or not tokens:
            return None
        for n in (2, 1):
            if (at := places.get(tuple(tokens[-n:]))) is not None:
                found = tokens[at : at + most]
                if found[0] >= 0:
                    end = next((i for i, token in enumerate(found) if token < 0), len(found))
                    return Proposal(found[:end], self.name, FIRST_KIND + n - 1)
        return None

    def end(self) -> None:
        """Nothing is kept."""
