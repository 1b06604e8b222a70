"""Whose request is next, where many owners (API keys) share one model. Pure planning.

- Owners get places in turn: the one with the fewest running requests first, of several with as many
  the one that has waited longest for its turn. An owner's requests keep their order.
- A share is the number of places divided by the owners with requests, at least 1. An owner above it
  gives a place to one below it: its newest answer goes back to the head of its queue.
- Prompts are computed in turn, too: the owner that was served longest ago is next.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from mlxkv.engine.queue.policy import PendingPrompt, next_prompt
from mlxkv.engine.tasks import Decoding, Prefilling, Task, prefilling


class FairQueue:
    """Waiting requests, in turn by owner. Other threads may read its lengths."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Task]] = {}  # the owner whose turn is next first

    def __len__(self) -> int:
        return sum(len(queue) for queue in list(self._queues.values()))

    def __iter__(self) -> Iterator[Task]:
        for queue in list(self._queues.values()):
            yield from list(queue)

    def n_of(self, owner: str) -> int:
        """Requests of one owner."""
        return len(self._queues.get(owner, ()))

    def append(self, task: Task) -> None:
        """Add a request behind its owner's others."""
        self._queues.setdefault(task.owner, deque()).append(task)

    def put_back(self, task: Task) -> None:
        """Add a request before its owner's others."""
        self._queues.setdefault(task.owner, deque()).appendleft(task)

    def remove(self, task: Task) -> None:
        """Remove a request; nothing if it is not here."""
        queue = self._queues.get(task.owner, deque())
        if task in queue:
            queue.remove(task)
        if not queue:
            self._queues.pop(task.owner, None)

    def is_ready(self, task: Task) -> bool:
        """Whether a request can begin."""
        return True

    def next_owner(self, running: Iterable[Task]) -> str | None:
        """The owner whose turn it is; None where nothing waits that is ready."""
        n_of = Counter(task.owner for task in running)
        # A list each: asking a request whether it is ready may begin to prepare it.
        owners = [
            owner for owner, queue in self._queues.items() if any([*map(self.is_ready, queue)])
        ]
        return min(owners, key=lambda owner: n_of[owner], default=None)

    def pop(self, owner: str) -> Task:
        """An owner's next request that is ready; its next turn is after all other owners'."""
        queue = self._queues.pop(owner)
        task = next(filter(self.is_ready, queue))
        queue.remove(task)
        if queue:
            self._queues[owner] = queue
        return task


def share(n_places: int, owners: Iterable[str]) -> int:
    """How many places each owner may have while all of them have requests."""
    return max(1, n_places // max(1, len(set(owners))))


def gives_place(owner: str, running: Sequence[Task], n_places: int) -> Task | None:
    """The answer that gives its place to a waiting request of `owner`; None if none has to.

    Args:
        owner: of the request.
        running: all running requests, the newest last.
        n_places: requests that may run.
    """
    n_of = Counter(task.owner for task in running)
    most = share(n_places, [owner, *n_of])
    if n_of[owner] >= most:
        return None
    above = {other: n for other, n in n_of.items() if n > most}
    for task in reversed(running):
        if n_of[task.owner] == max(above.values(), default=0) and _can_go_on_later(task):
            return task
    return None


def _can_go_on_later(task: Task) -> bool:
    """Whether its KV is kept when it stops, so that little is computed again."""
    match task.state:
        case Prefilling(generation=generation) | Decoding(generation=generation):
            return generation.session.gives_pages
    return False


class Turns:
    """Which owner's prompt is computed next: the one that was served longest ago."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._n_chunks: Counter[str] = Counter()
        self._n = 0

    def next(self, prompts: Sequence[Task]) -> Task | None:
        """The request whose prompt gets the next chunk; None while all wait for room."""
        ready = [task for task in prompts if not prefilling(task).needs_room]
        owner = min(
            (task.owner for task in ready), key=lambda x: self._served.get(x, 0), default=None
        )
        if owner is None:
            return None
        self._n += 1
        self._served[owner] = self._n
        self._n_chunks[owner] += 1
        mine = [task for task in ready if task.owner == owner]
        for_oldest = self._n_chunks[owner] % 2 == 1
        return mine[next_prompt([_pending(task) for task in mine], for_oldest=for_oldest)]


def _pending(task: Task) -> PendingPrompt:
    """A prompt as `policy` sees it."""
    state = prefilling(task)
    session = state.generation.session
    n_computed = None if state.steps is None else session.n_held
    return PendingPrompt(state.tokens, n_computed, task.owner if session.gives_pages else None)
