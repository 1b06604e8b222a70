"""A sequence asks the budget for memory, and does what the grants say."""

from __future__ import annotations

from typing import Protocol

from mlxkv.memory.budget import Budget
from mlxkv.memory.types import Consumer, Grant


class Applies(Consumer, Protocol):
    """A sequence that does what a grant asks for."""

    def apply(self, grant: Grant) -> None: ...


def asked(
    sequence: Applies,
    budget: Budget | None,
    n_new: int,
    *,
    last: bool,
    beside: int = 0,
    whole: bool = False,
) -> int:
    """How many of the next tokens may be computed at once; see `Budget.grant`; all without one.

    Raises:
        KVCacheFull: there is no room for any.
    """
    while budget is not None:
        grant = budget.grant(sequence, n_new, last=last, beside=beside, whole=whole)
        sequence.apply(grant)
        if grant.n_tokens:
            return grant.n_tokens
    return n_new
