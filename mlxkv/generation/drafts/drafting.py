"""The drafts of a model's answers, and what is remembered for those to come."""

from __future__ import annotations

from collections.abc import Sequence

from mlxkv.generation.drafts.drafts import Drafts
from mlxkv.generation.drafts.lookup import Lookup, PastTokens
from mlxkv.generation.drafts.pace import Costs, Rates


class Drafting:
    """What a model's drafts share. Owners share no tokens.

    Attributes:
        costs: how long passes take.
    """

    def __init__(self) -> None:
        self.costs = Costs()
        self._rates = Rates()
        self._past: dict[str, PastTokens] = {}

    def of_answer(self, owner: str) -> AnswerDrafting:
        """For one answer of an owner."""
        return AnswerDrafting(self._rates, self._past.setdefault(owner, PastTokens()))

    def forget(self) -> None:
        """Forget all earlier sequences; what was measured stays."""
        self._past.clear()


class AnswerDrafting:
    """Makes the drafts of one answer, which go on when its row is made anew.

    Args:
        rates: how often proposals were right in earlier texts.
        past: tokens of the owner's earlier sequences.

    Attributes:
        drafts: None until the answer begins.
    """

    def __init__(self, rates: Rates, past: PastTokens):
        self._rates, self._past = rates, past
        self.drafts: Drafts | None = None

    def begin(self, tokens: Sequence[int]) -> Drafts:
        """The drafts behind the tokens so far, which are asked for once."""
        if self.drafts is None:
            self.drafts = Drafts([Lookup(tokens, self._past)], Rates(self._rates))
        return self.drafts

    def end(self, tokens: Sequence[int]) -> None:
        """The answer has ended: its sequence is remembered."""
        if self.drafts is not None:
            self.drafts.end()
        self._past.add(tokens)
