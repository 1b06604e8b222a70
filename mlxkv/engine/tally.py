"""Counters of one model, by owner (API key): an owner sees its own alone."""

from __future__ import annotations

from mlxkv.engine.clients import Clients
from mlxkv.engine.messages import Counts, PutAway
from mlxkv.engine.tasks import Task
from mlxkv.generation.outputs import Chunk, Stats


class Tally:
    """Counters of one model by owner. Other threads may read them.

    Attributes:
        total: of all owners together.
    """

    def __init__(self) -> None:
        self.total = Counts()
        self._of_owner: dict[str, Counts] = {}

    def shown(self, owner: str | None) -> Counts:
        """A snapshot of an owner's counters; those of all owners together for None."""
        if owner is None:
            return self.total.copy()
        return self._of_owner.get(owner, Counts()).copy()

    def count(self, owner: str, **amounts: float) -> None:
        """Add to counters of an owner, by their names."""
        for counts in (self.total, self._of_owner.setdefault(owner, Counts())):
            for name, amount in amounts.items():
                setattr(counts, name, getattr(counts, name) + amount)

    def answered(self, owner: str, stats: Stats | None) -> None:
        """Count an answer that has ended."""
        self.count(owner, answered=1)
        if stats is None:
            return
        self.count(
            owner,
            prompt_tokens=stats.prompt_tokens,
            restored_ram_tokens=stats.restored_ram_tokens,
            restored_ssd_tokens=stats.restored_ssd_tokens,
            computed_tokens=stats.computed_tokens,
            upper_tokens=stats.upper_tokens,
            next_turn_used_tokens=stats.ahead_tokens,
            next_turn_saved_s=stats.ahead_saved_s,
        )
        for counts in (self.total, self._of_owner[owner]):
            if stats.miss is not None:
                _add(counts.misses, stats.miss.reason, 1)
            if stats.drafts is not None:
                counts.draft_passes += stats.drafts.passes
                for drafter, (proposed, accepted) in stats.drafts.by.items():
                    _add(counts.drafted_tokens, drafter, proposed)
                    _add(counts.accepted_tokens, drafter, accepted)


def count_end(
    task: Task, last: Chunk | BaseException | None, tally: Tally, clients: Clients
) -> None:
    """Count the end of a request: its last chunk, an error, or None if it was cancelled."""
    if isinstance(last, Chunk):
        tally.answered(task.owner, last.stats)
        clients.count(task.owner, task.client, last.stats)
    elif last is not None and not isinstance(last, PutAway):
        tally.count(task.owner, failed=1)


def _add(counts: dict[str, int], name: str, n: int) -> None:
    counts[name] = counts.get(name, 0) + n
