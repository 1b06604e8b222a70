"""The drafts of a model's answers, and what is remembered for those to come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlxkv.generation.drafts.drafter import Drafter
from mlxkv.generation.drafts.drafts import Drafts
from mlxkv.generation.drafts.lookup import Lookup, PastTokens
from mlxkv.generation.drafts.pace import Costs, Rates
from mlxkv.generation.drafts.small_model import SmallModel


class Drafting:
    """What a model's drafts share. Owners share no tokens.

    Attributes:
        costs: how long passes take.
    """

    def __init__(self) -> None:
        self.costs = Costs()
        self._rates = Rates()
        self._past: dict[str, PastTokens] = {}

    def of_answer(self, owner: str, small: SmallModel | None = None) -> AnswerDrafting:
        """For one answer of an owner, which a smaller model may draft."""
        past = self._past.setdefault(owner, PastTokens())
        return AnswerDrafting(
            self._rates, past, None if small is None else lambda t: small.of_answer(owner, t)
        )

    def forget(self) -> None:
        """Forget all earlier sequences; what was measured stays."""
        self._past.clear()


class AnswerDrafting:
    """Makes the drafts of one answer, which go on when its row is made anew.

    Args:
        rates: how often proposals were right in earlier texts.
        past: tokens of the owner's earlier sequences.
        further: (tokens so far) -> another drafter of the answer; None for none.

    Attributes:
        drafts: None until the answer begins.
    """

    def __init__(
        self,
        rates: Rates,
        past: PastTokens,
        further: Callable[[Sequence[int]], Drafter] | None = None,
    ):
        self._rates, self._past, self._further = rates, past, further
        self.drafts: Drafts | None = None

    def begin(self, tokens: Sequence[int]) -> Drafts:
        """The drafts behind the tokens so far, which are asked for once."""
        if self.drafts is None:
            drafters: list[Drafter] = [Lookup(tokens, self._past)]
            if self._further is not None:
                drafters.append(self._further(tokens))
            self.drafts = Drafts(drafters, Rates(self._rates))
        return self.drafts

    def end(self, tokens: Sequence[int]) -> None:
        """The answer has ended: its sequence is remembered."""
        if self.drafts is not None:
            self.drafts.end()
        self._past.add(tokens)
