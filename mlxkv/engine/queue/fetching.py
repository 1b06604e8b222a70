"""Pages of a request that waits are read from disk meanwhile.

Its prompt is not encoded yet, so they are those of the conversation's last turn: of the same key
and client, with the same first message of the user (`Clients`).
"""

from __future__ import annotations

from mlxkv.engine.clients import Clients
from mlxkv.engine.runtime import Runtime
from mlxkv.engine.tasks import Task

FETCH_BYTES = 256 << 20
"""Bytes that are held for requests that wait, at most, and never more than memory has free."""


def fetch_pages(task: Task, runtime: Runtime, clients: Clients) -> None:
    """Begin to read the pages of a request that has just come."""
    links = clients.pages_of_session(task.owner, task.client, task.request.prompt)
    pages = runtime.pages_of(task.owner) if links else None
    if pages is not None:
        free = runtime.budget.limit_bytes - runtime.budget.used_bytes
        pages.fetch(links, min(FETCH_BYTES, max(0, free)))
