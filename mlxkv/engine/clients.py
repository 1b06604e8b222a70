"""The clients of one model: what their prompts restored and computed, and what they share.

A client is a program of one owner; requests without a client's name are not counted. Sessions are
conversations, told apart by their first user message.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mlxkv.engine.messages import ClientCounts, Lost
from mlxkv.generation.outputs import Stats
from mlxkv.generation.request import Prompt
from mlxkv.kv.types import STEP
from mlxkv.media.parts import mapped
from mlxkv.prefix.layout import Link
from mlxkv.prefix.pages import Pages

MAX_CLIENTS = 64
MAX_SESSIONS = 16
"""Of a client, the latest, to compare a new one with."""
MAX_LOST = 32
SHOWN_LOST = 5
MIN_PAGES = 2
"""A shorter prefix is not worth sparing."""


@dataclass(slots=True)
class _Client:
    counts: ClientCounts
    sessions: OrderedDict[str, tuple[Link, ...]] = field(default_factory=OrderedDict)
    lost: dict[str, Lost] = field(default_factory=dict)


class Clients:
    """The clients of one model, the least recently seen first."""

    def __init__(self) -> None:
        self._clients: OrderedDict[tuple[str, str], _Client] = OrderedDict()

    def count(self, owner: str, name: str, stats: Stats | None) -> None:
        """Count an answer."""
        if not name or stats is None:
            return
        client = self._client(owner, name)
        counts, miss = client.counts, stats.miss
        counts.answered += 1
        counts.prompt_tokens += stats.prompt_tokens
        counts.restored_tokens += stats.restored_tokens
        counts.computed_tokens += stats.computed_tokens
        counts.generated_tokens += stats.generated_tokens
        counts.next_turn_used_tokens += stats.ahead_tokens
        counts.next_turn_saved_s += stats.ahead_saved_s
        if miss is None:
            return
        # The text before is the same each time; what differs behind it is not.
        before = miss.prompt.partition("|")[0]
        known = client.lost.get(before)
        n, times = (known.n_tokens, known.times) if known else (0, 0)
        client.lost[before] = Lost(
            miss.reason, miss.token, miss.held, miss.prompt, n + miss.n_tokens, times + 1
        )
        if len(client.lost) > MAX_LOST:
            least = min(client.lost, key=lambda text: client.lost[text].n_tokens)
            del client.lost[least]

    def count_ahead(self, owner: str, name: str, n_tokens: int) -> None:
        """Count tokens of a next turn that were computed before it was asked for."""
        if name:
            self._client(owner, name).counts.next_turn_tokens += n_tokens

    def last_session(self, owner: str, name: str) -> tuple[Link, ...]:
        """Pages of a client's last conversation; empty where there is none."""
        client = self._clients.get((owner, name))
        return next(reversed(client.sessions.values()), ()) if client is not None else ()

    def pages_of_session(self, owner: str, name: str, prompt: Prompt) -> tuple[Link, ...]:
        """Pages of the last turn of a prompt's conversation; empty where it is not known."""
        client = self._clients.get((owner, name))
        if client is None or (key := session_key(prompt)) is None:
            return ()
        return client.sessions.get(key, ())

    def ended(
        self, owner: str, name: str, prompt: Prompt, links: Iterable[Link], pages: Pages | None
    ) -> None:
        """Note the pages of a request's sequence, and have those spared that sessions share.

        Args:
            owner: whose request it was.
            name: the client's.
            prompt: of the request.
            links: its sequence's pages.
            pages: the owner's.
        """
        key = session_key(prompt)
        if not name or key is None or pages is None:
            return
        client = self._client(owner, name)
        chain = tuple(link for link in links if link.n_tokens == STEP)
        if len(chain) < MIN_PAGES:
            return
        client.sessions.pop(key, None)
        client.sessions[key] = chain
        while len(client.sessions) > MAX_SESSIONS:
            client.sessions.popitem(last=False)
        spared = pages.shared.get(name, ())
        best = shared_prefix(list(client.sessions.values()), spared)
        if best and tuple(best) != tuple(spared):
            pages.share(name, best)
        pages.note_shared()
        client.counts.shared_tokens = best[-1].stop if best else 0

    def figures(self) -> list[ClientCounts]:
        """A snapshot of each client's counts."""
        return [_shown(client) for client in list(self._clients.values())]

    def _client(self, owner: str, name: str) -> _Client:
        key = owner, name
        if key not in self._clients:
            self._clients[key] = _Client(ClientCounts(owner, name))
            if len(self._clients) > MAX_CLIENTS:
                self._clients.popitem(last=False)
        self._clients.move_to_end(key)
        return self._clients[key]


def session_key(prompt: Prompt) -> str | None:
    """What tells a conversation from others; None for a text, token ids or no user."""
    if isinstance(prompt, str):
        return None
    for message in prompt:
        if not isinstance(message, Mapping):
            return None
        if message.get("role") == "user":
            (shown,) = mapped([message], _shortened)
            text = str(shown.get("content"))
            return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return None


def _shortened(source: object) -> object:
    """What tells a medium from others in a few characters."""
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else source


def shared_prefix(chains: Sequence[Sequence[Link]], spared: Sequence[Link]) -> Sequence[Link]:
    """The prefix to spare: the one by which sessions save most.

    That is its length times the sessions that have it besides the first. What is spared already
    stays unless another saves more.

    Args:
        chains: pages of each session, those of the latest last.
        spared: the prefix that is spared now.
    """
    if not chains:
        return spared
    latest = chains[-1]
    common = [n_shared_pages(latest, chain) for chain in chains[:-1]]

    def saved(n: int) -> int:
        return n * sum(each >= n for each in common)

    best = max((n for n in common if n >= MIN_PAGES), key=lambda n: (saved(n), n), default=0)
    having = sum(n_shared_pages(spared, chain) == len(spared) for chain in chains)
    if saved(best) > len(spared) * max(0, having - 1):
        return latest[:best]
    return spared


def n_shared_pages(a: Sequence[Link], b: Sequence[Link]) -> int:
    """Leading pages that two sequences have in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        same = a[middle - 1].name == b[middle - 1].name
        low, high = (middle, high) if same else (low, middle - 1)
    return low


def merge_counts(figures: Iterable[ClientCounts]) -> list[ClientCounts]:
    """The figures of several models, those of one client together."""
    found: dict[tuple[str, str], ClientCounts] = {}
    for each in figures:
        key = each.owner, each.client
        found[key] = found[key] + each if key in found else each
    return list(found.values())


def _shown(client: _Client) -> ClientCounts:
    lost = sorted(client.lost.values(), key=lambda x: -x.n_tokens)[:SHOWN_LOST]
    return client.counts.copy(lost)
