"""Pages are read from disk before a prompt needs them.

- When the head of a request comes, its prompt is not read yet: those of the client's last
  conversation are guessed, as far as `--idle-compute` allows.
- When its prompt is here, not encoded yet: those of its conversation's last turn, of the same key
  and client, with the same first message of the user (`Clients`).
"""

from __future__ import annotations

from mlxkv.engine.ahead.choice import IdleCompute
from mlxkv.engine.clients import Clients
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.tally import Tally
from mlxkv.engine.tasks import Task
from mlxkv.kv.types import STEP
from mlxkv.prefix.layout import Link
from mlxkv.prefix.pages import Pages


class Fetching:
    """Reads pages of one model ahead.

    Args:
        runtime: the model.
        clients: their conversations.
        tally: what was used is counted there.
        idle: how much may be read on a guess; None for nothing.
    """

    def __init__(self, runtime: Runtime, clients: Clients, tally: Tally, idle: IdleCompute | None):
        self._runtime, self._clients, self._tally = runtime, clients, tally
        self._idle = idle or IdleCompute("off")

    def expect(self, owner: str, client: str) -> None:
        """The head of a request has come: begin to read what it may need."""
        links = self._clients.last_session(owner, client)
        pages = self._runtime.pages_of(owner) if links else None
        self._fetch(pages, links[: self._idle.read_limit // STEP], is_guess=True)

    def arrived(self, task: Task) -> None:
        """A request has come: begin to read its pages."""
        links = self._clients.pages_of_session(task.owner, task.client, task.request.prompt)
        self._fetch(self._pages(task) if links else None, links)

    def found(self, task: Task) -> None:
        """Count what a request, whose prefix was just restored, did not have to read."""
        pages = self._pages(task)
        if pages is not None and (fetched := pages.fetched())[0]:
            self._tally.count(task.owner, fetched_bytes=fetched[0], fetch_saved_s=fetched[1])

    def _pages(self, task: Task) -> Pages | None:
        return self._runtime.pages_of(task.owner, task.request.adapter)

    def _fetch(self, pages: Pages | None, links: tuple[Link, ...], is_guess: bool = False) -> None:
        if pages is not None:
            free = self._runtime.budget.limit_bytes - self._runtime.budget.used_bytes
            pages.fetch(links, free, is_guess=is_guess)
