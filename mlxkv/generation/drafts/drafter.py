"""What proposes the next tokens of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mlxkv.generation.drafts.pace import Kind

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next.

    Args:
        tokens: at least one.
        by: name of the drafter.
        kind: proposals of one drafter and kind are right about as often.
        source: which of the drafters of this name; a model's path.
        sure: how many of the last tokens come where those before them do: a grammar forces them.
        forced: how many of the first tokens come whatever is chosen.
    """

    tokens: list[int]
    by: str
    kind: int = 0
    source: str = ""
    sure: int = 0
    forced: int = 0

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.tokens)

    @property
    def n_guessed(self) -> int:
        """How many may be wrong where those before them are right."""
        return max(0, self.n - self.forced - self.sure)

    @property
    def seconds(self) -> float:
        """What each takes to find."""
        return 0.0

    @property
    def rated(self) -> Kind:
        """What its tokens are right as often as."""
        return self.by + self.source, self.kind

    def first(self, n: int) -> Proposal:
        """The first n of them."""
        sure = max(0, self.sure - max(0, self.n - n))
        return replace(self, tokens=self.tokens[:n], sure=sure, forced=min(self.forced, n))

    def is_only(self, i: int) -> bool:
        """Whether nothing but token i can come at its place."""
        return i < self.forced or self.n - self.sure <= i < self.n


class Chooser(Protocol):
    """Chooses drafted tokens as the answer's own sampler will choose at their places.

    Attributes:
        reads_draft: whether that depends on the drafted tokens before a place: penalties, a format.
    """

    @property
    def reads_draft(self) -> bool: ...

    def __call__(self, logits: mx.array, n_before: int, draft: Sequence[int]) -> mx.array | None:
        """The token `[1]` of logits `[1, V]`, lazily; None where the answer ends before it.

        Args:
            logits: of a drafter, V being the answer's own model's.
            n_before: drafted tokens before it.
            draft: these; anything where `reads_draft` is False.
        """
        ...


@dataclass(frozen=True, slots=True)
class Promise:
    """Tokens that a drafter can compute, which is done only where they are worth it.

    Args:
        n: so many, at least one.
        by: name of the drafter.
        draw: (how many, chooser) -> the tokens; fewer or none where it has no more.
        kind: as of a `Proposal`.
        seconds: what each takes to compute.
        source: as of a `Proposal`.
    """

    n: int
    by: str
    draw: Callable[[int, Chooser], list[int]]
    kind: int = 0
    seconds: float = 0.0
    source: str = ""

    @property
    def rated(self) -> Kind:
        """As of a `Proposal`."""
        return self.by + self.source, self.kind

    def first(self, n: int) -> Promise:
        """Of the first n of them."""
        return replace(self, n=min(n, self.n))


class Drafter(Protocol):
    """Proposes tokens for one answer. A proposal may be wrong; it changes no answer.

    Attributes:
        hears: whether it needs the hidden states that tokens are chosen from.
    """

    hears: bool

    def add(self, token: int, hidden: mx.array | None = None) -> None:
        """The answer's next token, which has been given out.

        Args:
            token: its id.
            hidden: `[1, 1, E]`, the model's final hidden state that it was chosen from; None where
                that is of the prompt, or no drafter hears.
        """
        ...

    def propose(self, most: int) -> Proposal | Promise | None:
        """What may follow the tokens so far, at most so many; None for no idea."""
        ...

    def end(self) -> None:
        """The answer has ended."""
        ...


@runtime_checkable
class LooksBehind(Protocol):
    """A drafter that can say what may follow tokens which have not come yet."""

    def behind(self, tokens: Sequence[int], most: int) -> Proposal | None:
        """What may follow the tokens so far and these, at most so many."""
        ...
