"""The drafts of a model's answers, and what is remembered for those to come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from mlxkv.checkpoint.mlxkv_json import OWN_DRAFTS
from mlxkv.generation.drafts.borrowed import Borrowed
from mlxkv.generation.drafts.drafter import Drafter
from mlxkv.generation.drafts.drafts import Drafts
from mlxkv.generation.drafts.following import Following
from mlxkv.generation.drafts.lookup import Lookup, PastTokens
from mlxkv.generation.drafts.mtp import Mtp
from mlxkv.generation.drafts.pace import Costs, Rates, Time
from mlxkv.generation.drafts.short import BehindForced, Short
from mlxkv.generation.drafts.small_model import SmallModel
from mlxkv.generation.prefill import Listener
from mlxkv.kv.layout import Cache
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.token_file import TokenFile

Own = Callable[[Sequence[Cache], str], Mtp | Borrowed]
"""(caches of a sequence, their format) -> what drafts it with layers that the model has."""


class Drafting:
    """What a model's drafts share. Owners share no tokens.

    Args:
        load: (owner) -> sequences that an earlier process kept, see `PastTokens`.
        model: may have what `mtp` drafts with.

    Attributes:
        costs: how long passes take.
    """

    def __init__(
        self,
        load: Callable[[str], Sequence[Sequence[int]] | None] | None = None,
        model: CausalLM | None = None,
    ) -> None:
        self.costs = Costs()
        self._own = None if model is None else _own(model)
        self._rates, self._load = Rates(), load
        self._past: dict[str, PastTokens] = {}

    def of_answer(
        self, owner: str, draft: str = "lookup", small: SmallModel | None = None
    ) -> AnswerDrafting:
        """For one answer of an owner.

        Args:
            owner: whose answers share what is looked up.
            draft: the value of `--draft`, but `off`; of its drafters, those that the model has.
            small: a smaller model that drafts as well.
        """
        if owner not in self._past:
            load = self._load
            self._past[owner] = PastTokens(load=None if load is None else lambda: load(owner))
        return AnswerDrafting(
            self._rates,
            None if draft == Mtp.name else self._past[owner],
            None if small is None else lambda t: small.of_answer(owner, t),
            self._own if draft in OWN_DRAFTS else None,
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
        past: tokens of the owner's earlier sequences; None to look nothing up.
        further: (tokens so far) -> another drafter of the answer; None for none.
        own: the drafter of the model's own layers; None for none of their drafts.

    Attributes:
        drafts: None until the answer begins.
    """

    def __init__(
        self,
        rates: Rates,
        past: PastTokens | None,
        further: Callable[[Sequence[int]], Drafter] | None = None,
        own: Own | None = None,
    ):
        self._rates, self._past, self._further = rates, past, further
        self._own, self._mtp = own, cast("Mtp | Borrowed | None", None)
        self.drafts: Drafts | None = None

    def listener(self, caches: Sequence[Cache], kv_type: str) -> Listener | None:
        """What has to hear a prompt that is computed next; the same for all of an answer.

        Args:
            caches: of its sequence.
            kv_type: their format.
        """
        if self._mtp is None and self._own is not None:
            self._mtp = self._own(caches, kv_type)
        return self._mtp

    def begin(self, tokens: Sequence[int]) -> Drafts:
        """The drafts behind the tokens so far, which are asked for once."""
        if self.drafts is None:
            drafters: list[Drafter] = []
            if self._past is not None:
                lookup = Lookup(tokens, self._past)
                drafters += [lookup, Following(lookup), Short(tokens), BehindForced()]
            if self._mtp is not None:
                drafters.append(self._mtp)
            if self._further is not None:
                drafters.append(self._further(tokens))
            self.drafts = Drafts(drafters, Rates(self._rates))
        return self.drafts

    def end(self, tokens: Sequence[int]) -> None:
        """The answer has ended: its sequence is remembered."""
        if self.drafts is not None:
            self.drafts.end()
        if self._past is not None:
            self._past.add(tokens)


def _own(model: CausalLM) -> Own | None:
    """What makes drafters of a model's own layers."""
    time = Time()
    if (predictor := model.predictor()) is not None:
        return lambda _, kv_type: Mtp(predictor, time, kv_type)
    if (reader := model.reader()) is not None:
        return lambda caches, _: Borrowed(reader, time, caches)
    return None
