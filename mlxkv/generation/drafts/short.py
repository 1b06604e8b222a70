"""Drafts of what followed the last one or two tokens when they came last.

That is seldom right in a text, and often in what is laid out alike again and again: the marks
between the fields of an object, the indentation of code. So it is learned from far more often than
it is drafted.

`BehindForced` does the same for the end of what a grammar forces.
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
KIND_BEHIND_FORCED = FIRST_KIND + 2


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
        return self.behind((), most)

    def behind(self, tokens: Sequence[int], most: int) -> Proposal | None:
        """See `LooksBehind`."""
        self._look()
        last = tuple([*self._tokens[-2:], *tokens][-2:])
        if most < 1:
            return None
        for n in range(len(last), 0, -1):
            if (at := self._places.get(last[-n:])) is not None:
                found = self._tokens[at : at + most]
                if found[0] >= 0:
                    end = next((i for i, token in enumerate(found) if token < 0), len(found))
                    return Proposal(found[:end], self.name, FIRST_KIND + n - 1)
        return None

    def _look(self) -> None:
        """Take in the tokens that came since the last time."""
        tokens, places = self._tokens, self._places
        for i in range(self._n_looked, len(tokens)):
            places[tokens[i - 1],] = places[tokens[i - 2], tokens[i - 1]] = i
        self._n_looked = max(self._n_looked, len(tokens))

    def end(self) -> None:
        """Nothing is kept."""


class BehindForced:
    """Proposes what came when what a grammar forces had ended before: a mark, a space, a quote.

    What is forced is another name each time, so that no tokens before the place are the same.
    """

    name = Lookup.name
    hears = False

    def __init__(self) -> None:
        self._tokens: list[int] = []  # the answer's
        self._ends: list[int] = []  # where in it what was forced ended

    def add(self, token: int, hidden: mx.array | None = None) -> None:
        del hidden
        self._tokens.append(token)

    def propose(self, most: int) -> Proposal | None:
        """None: nothing is forced next."""
        del most

    def behind(self, tokens: Sequence[int], most: int) -> Proposal | None:
        """See `LooksBehind`; the tokens are all that is forced."""
        end = len(self._tokens) + len(tokens)
        while self._ends and self._ends[-1] >= end:  # asked before, or of an end that did not come
            self._ends.pop()
        found = self._tokens[self._ends[-1] :][:most] if self._ends else []
        self._ends.append(end)
        return Proposal(found, self.name, KIND_BEHIND_FORCED) if found else None

    def end(self) -> None:
        """Nothing is kept."""
