"""Which tokens were computed before a prompt with them came, and what that saved."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mlxkv.generation.session import n_shared

MAX_RECORDS = 16
"""Sequences that are remembered; the oldest is forgotten for another."""


@dataclass(eq=False, slots=True)
class Ahead:
    """A sequence whose tokens from `start` to `stop` were computed before a prompt had them.

    Args:
        owner: owner of its pages.
        tokens: the sequence.
        start: the first token that was not held before; later, that no prompt has used yet.
        stop: as far as it is computed.
        n_computed: tokens that were computed for it; more than `stop` minus `start` where some
            were computed again.
        seconds: how long that took.
        adapter: that it was computed under.
    """

    owner: str
    tokens: Sequence[int]
    start: int
    stop: int = 0
    n_computed: int = 0
    seconds: float = 0.0
    adapter: Sequence[str] = ()

    def use(self, tokens: Sequence[int], n_restored: int) -> int:
        """How many unused tokens a prompt was restored from; they count as used now."""
        stop = min(self.stop, n_restored, len(tokens))
        if stop <= self.start:
            return 0
        if tokens[:stop] != self.tokens[:stop]:
            stop = n_shared(tokens[:stop], self.tokens)
        n = max(0, stop - self.start)
        self.start += n
        return n


class Records:
    """The latest sequences of one model that were computed ahead."""

    def __init__(self) -> None:
        self._records: deque[Ahead] = deque(maxlen=MAX_RECORDS)

    def add(self, ahead: Ahead) -> None:
        """Remember a sequence; nothing if it is here."""
        if ahead not in self._records and ahead.stop > ahead.start:
            self._records.append(ahead)

    def use(
        self, owner: str, tokens: Sequence[int], n_restored: int, adapter: Sequence[str] = ()
    ) -> tuple[int, float]:
        """What a prompt was restored from, and the seconds that saved, by the speed then.

        Args:
            owner: of the prompt.
            tokens: the prompt.
            n_restored: leading tokens of it that were restored.
            adapter: that it is computed under.
        """
        n_used, saved_s = 0, 0.0
        for ahead in list(self._records):
            if (ahead.owner, ahead.adapter) != (owner, adapter):
                continue
            if not (n := ahead.use(tokens, n_restored)):
                continue
            n_used += n
            saved_s += n * ahead.seconds / max(ahead.n_computed, 1)
            if ahead.start >= ahead.stop:
                self._records.remove(ahead)
        return n_used, saved_s
