"""The drafts of one answer: who proposes them, what its grammar says of them, how they went."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

from mlxkv.generation.drafts.drafter import Drafter, LooksBehind, Promise, Proposal
from mlxkv.generation.drafts.pace import Chance, Counts, Kind, Rates

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np

    from mlxkv.sampling.grammar import Masker

    May = np.ndarray | int | None
    """What may come at a place: bool `[V]`; a token, where nothing else may; None for anything."""

GRAMMAR = "grammar"
"""The name under which tokens that a grammar forces are counted."""

TOLL = 0.1
"""How much less a promise counts than a proposal, which is known already."""
COUNTED = 8
"""Tokens of a proposal that count where proposals are compared."""


class LookAhead(Protocol):
    """What a grammar says of tokens to come; it stays where it is."""

    def forced(self) -> list[int]:
        """Tokens that come next whatever is chosen, as far as that is known cheaply."""
        ...

    def led(self, draft: Sequence[int]) -> tuple[int, list[int]]:
        """How many tokens of a draft may come, and what comes behind them whatever is chosen."""
        ...

    def masks(self, draft: Sequence[int], only: Collection[int] = ()) -> list[May]:
        """What may come in place of the first token, and behind each token of a draft.

        Args:
            draft: the tokens.
            only: indices of those that `forced` or `led` has named.

        Returns:
            As many as tokens of the draft may come, and one more.
        """
        ...


class MaskerAhead:
    """`LookAhead` of a masker.

    Args:
        masker: of the answer.
        n_vocab: V.
    """

    def __init__(self, masker: Masker, n_vocab: int):
        self._masker, self._n_vocab = masker, n_vocab

    def forced(self) -> list[int]:
        return self._known(self._masker.forced())

    def led(self, draft: Sequence[int]) -> tuple[int, list[int]]:
        n, forced = self._masker.led(draft)
        return n, self._known(forced)

    def _known(self, tokens: Sequence[int]) -> list[int]:
        return [*takewhile(lambda token: token < self._n_vocab, tokens)]

    def masks(self, draft: Sequence[int], only: Collection[int] = ()) -> list[May]:
        fork, found = self._masker.fork(), []
        for i, token in enumerate(draft):
            if i in only:
                if i and fork.forced()[:1] != [token]:
                    return found
                found.append(token)
            else:
                found.append(mask := fork.allowed(self._n_vocab))
                if not mask[token]:
                    return found
            fork.advance(token)
            if fork.finished:  # the answer ends with it
                return found
        found.append(fork.allowed(self._n_vocab))
        return found


class Drafts:
    """What proposes the next tokens of one answer, and how that went.

    Args:
        drafters: whose proposal is taken that promises the most right tokens by what this text has
            shown; of equal ones the first.
        rates: how often proposals are right in this text.

    Attributes:
        hears: whether `add` needs hidden states.
    """

    def __init__(self, drafters: Sequence[Drafter], rates: Rates | None = None):
        self._drafters = drafters
        self._lookers = [each for each in drafters if isinstance(each, LooksBehind)]
        self.rates = Rates() if rates is None else rates
        self.counts = Counts()
        self.hears = any(drafter.hears for drafter in drafters)
        self._open: dict[
            Kind, int
        ] = {}  # the first tokens of proposals that nothing was drafted of

    def add(self, token: int, hidden: mx.array | None = None) -> None:
        """A token was given out; see `Drafter.add`."""
        for kind, first in self._open.items():
            self.rates.learn(kind, first == token)
        self._open = {}
        for drafter in self._drafters:
            drafter.add(token, hidden)

    def propose(self, most: int) -> Proposal | Promise | None:
        """What may come next, at most so many tokens."""
        found = [each for one in self._drafters if (each := one.propose(most)) is not None]
        known = [each for each in found if isinstance(each, Proposal)]
        self._open = {each.rated: each.tokens[0] for each in known}
        return max(found, key=self._worth, default=None)

    def behind(self, tokens: Sequence[int], most: int) -> Proposal | None:
        """What may come behind tokens that come next in any case, at most so many."""
        found = [each for one in self._lookers if (each := one.behind(tokens, most)) is not None]
        self._open = {}  # what was known of the next token says nothing of those behind it
        return max(found, key=self._worth, default=None)

    def _worth(self, found: Proposal | Promise) -> float:
        gains = Chance(found.n, *self.rates.right(found.rated)).gains(COUNTED)
        return sum(gains) * (1 - TOLL if isinstance(found, Promise) else 1)

    def end(self) -> None:
        """The answer has ended."""
        for drafter in self._drafters:
            drafter.end()

    def record(self, proposal: Proposal, n_proposed: int, n_right: int) -> None:
        """Of a proposal so many tokens were computed, and so many came."""
        forced = min(proposal.forced, n_proposed)
        by = {GRAMMAR: (forced, min(n_right, forced))} if forced else {}
        if n_proposed > forced:
            by[proposal.by] = n_proposed - forced, max(0, n_right - forced)
        self.counts.add(by)
        n_guessed = min(proposal.n_guessed, n_proposed - forced)
        if n_guessed > 0 and n_right >= forced:
            self._open.pop(proposal.rated, None)
            self.rates.record(proposal.rated, min(n_right - forced, n_guessed), n_guessed)
