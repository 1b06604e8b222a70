"""What proposes the next tokens of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next.

    Args:
        tokens: at least one.
        by: name of the drafter.
        kind: proposals of one drafter and kind are right about as often.
    """

    tokens: list[int]
    by: str
    kind: int = 0


class Drafter(Protocol):
    """Proposes tokens for one answer. A proposal may be wrong; it changes no answer."""

    def add(self, token: int) -> None:
        """The answer's next token, which has been given out."""
        ...

    def propose(self, most: int) -> Proposal | None:
        """What may follow the tokens so far, at most so many; None for no idea."""
        ...
