"""The drafts of a model's answers, and what is remembered for those to come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlxkv.generation.drafts.drafter import Drafter
from mlxkv.generation.drafts.drafts import Drafts
from mlxkv.generation.drafts.lookup import Lookup, PastTokens
from mlxkv.generation.drafts.pace import Costs, Rates
from mlxkv.generation.drafts.small_model import SmallModel
from mlxkv.prefix.token_file import TokenFile


class Drafting:
    """What a model's drafts share. Owners share no tokens.

    Args:
        load: (owner) -> sequences that an earlier process kept, see `PastTokens`.

    Attributes:
        costs: how long passes take.
    """

    def __init__(self, load: Callable[[str], Sequence[Sequence[int]] | None] | None = None) -> None:
        self.costs = Costs()
        self._rates, self._load = Rates(), load
        self._past: dict[str, PastTokens] = {}

    def of_answer(self, owner: str, small: SmallModel | None = None) -> AnswerDrafting:
        """For one answer of an owner, which a smaller model may draft."""
        if owner not in self._past:
            load = self._load
            self._past[owner] = PastTokens(load=None if load is None else lambda: load(owner))
        past = self._past[owner]
        return AnswerDrafting(
            self._rates, past, None if small is None else lambda t: small.of_answer(owner, t)
        )

    def forget(self) -> None:
        """Forget all earlier sequences, also of earlier processes; what was measured stays."""
        self._past.clear()
        self._load = None

    def longest(self, owner: str) -> int:
        """Tokens of the longest sequence of an owner that ended here; 0 for none."""
        past = self._past.get(owner)
        return past.longest if past is not None and past.is_changed else 0

    def save(self, owner: str, file: TokenFile) -> None:
        """Add an owner's sequences to those that are kept for later processes."""
        past = self._past.get(owner)
        if past is not None and past.is_changed:
            file.update(past.merged)


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
