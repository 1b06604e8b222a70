"""The caches of the sequence that a model computed last, for the request that goes on from it.

A next turn would load the pages of the whole conversation into new caches. Where the caches are
still there, it goes on in them.

Invariants:
- One sequence is kept, while its model has no requests: the first prompt that is computed takes it
  over or has it let go. So it takes no memory that a request could have.
- Its KV counts as any sequence's, and pages have all of it: letting it go loses nothing.
- Only requests of its owner take it over, for the same model. Under a request's adapters none is
  kept: they would stay in memory for it.
- Pages that are gone on from in it count as used again: they are written to disk then.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence

from mlxkv.generation.restored import n_shared
from mlxkv.generation.session import Session
from mlxkv.kv.buffers import Buffers
from mlxkv.kv.types import STEP
from mlxkv.nn.model import CausalLM
from mlxkv.prefix.layout import Link

KEPT_S = 60.0
"""How long a sequence is kept: longer than most tools take."""


class Kept:
    """The sequence that is kept of one model, if one is."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._owner, self._until = "", 0.0
        self._n_again: weakref.WeakKeyDictionary[Session, int] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """Bytes that its caches take."""
        return 0 if self._session is None else self._session.nbytes

    def keep(self, session: Session, owner: str) -> None:
        """Keep a sequence, whose prefix pages have, in place of the last; or free its caches.

        They are freed under adapters of a request, where memory was short, where others could not
        go on from its KV, and where that lies in buffers which other sequences had a part of.
        """
        self.let_go()
        can_give = session.gives_pages and session.n_held >= STEP and not session.rungs
        can_give &= session.model is session.model.plain
        if not can_give or not _has_own_buffers(session):
            session.reset()
            return
        if session.listener is not None:  # the next answer has one of its own
            for cache in session.listener.caches:
                cache.reset()
            session.listener = None
        self._session, self._owner = session, owner
        self._until = time.monotonic() + KEPT_S

    def take(self, owner: str, model: CausalLM, tokens: Sequence[int]) -> Session | None:
        """The sequence, for a prompt that shares its first page and half of it; else it is let go.

        Where most of it is of no use its buffers would be larger than the prompt's.
        """
        session = self._session
        if session is None:
            return None
        fits = owner == self._owner and model is session.model
        shared = n_shared(session.tokens, tokens) if fits else 0
        if shared < max(STEP, session.n_held // 2):
            self.let_go()
            return None
        self._session = None
        self._n_again[session] = shared
        return session

    def used_again(self, session: Session, links: Sequence[Link]) -> None:
        """Write those of a sequence's pages that it was gone on from, once its prefix is kept."""
        n = self._n_again.pop(session, 0)
        if n and session.pages is not None:
            session.pages.keep(link for link in links if link.n_tokens == STEP and link.stop <= n)

    def let_go(self) -> bool:
        """Free its caches; whether there were any."""
        session, self._session = self._session, None
        if session is not None:
            session.reset()
        return session is not None

    @property
    def left_s(self) -> float | None:
        """Seconds that it is still kept; None where none is."""
        return None if self._session is None else max(0.0, self._until - time.monotonic())


def _has_own_buffers(session: Session) -> bool:
    """Whether all of its KV is in buffers of its own."""
    return all(isinstance(cache, Buffers) and cache.row is None for cache in session.caches)
