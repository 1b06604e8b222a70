"""What of a prompt did not have to be computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlxkv.prefix.layout import n_common, token_bytes
from mlxkv.prefix.match import Match


@dataclass(frozen=True, slots=True)
class Restored:
    """What did not have to be computed of a prompt.

    Args:
        n_tokens: leading tokens whose KV was there.
        ssd_tokens: those of them that came from disk; the others were in memory.
        shared: leading tokens that what was held shares with the prompt.
        held: tokens of that sequence from `shared` on, to say what differs.
        n_known: how far that sequence is known.
        states: whether layers keep a state, which is kept in few places.
    """

    n_tokens: int
    ssd_tokens: int = 0
    shared: int = 0
    held: tuple[int, ...] = ()
    n_known: int = 0
    states: bool = False

    def of_first(self, n: int) -> Restored:
        """The same of the first `n` tokens alone."""
        if self.n_tokens <= n:
            return self
        return Restored(n, max(0, self.ssd_tokens - (self.n_tokens - n)))

    def diverged_at(self, n_prompt: int) -> int | None:
        """The first token that differs from what was held.

        None where nothing was, or one is the beginning of the other.
        """
        return self.shared if 0 < self.shared < min(n_prompt, self.n_known) else None


def explained(restored: Restored, live: Restored, match: Match) -> Restored:
    """With the known sequence that shares most with the prompt."""
    best = max(live, match, key=lambda known: known.shared)
    return replace(restored, shared=best.shared, held=best.held, n_known=best.n_known)


def n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Leading tokens that two sequences have in common."""
    return n_common(token_bytes(a), token_bytes(b))
