"""Drafts of a smaller model that has the same tokens.

Invariants:
- It has caches, pages and a budget of its own, and one answer's sequence at a time: other answers
  have no drafts of it meanwhile.
- Its caches hold tokens that came, and behind them drafted ones. Before it computes anything, those
  that did not come are taken back.
- It computes its prompt once the answer has begun, a chunk at a time between two steps of the
  answer, and not at all for an answer that is short beside its prompt.
- What fails here ends an answer's drafts, never the answer.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import cast

import mlx.core as mx

from mlxkv.base.faults import log_fault
from mlxkv.cache import RotatingKVCache
from mlxkv.errors import KVCacheFull, contained
from mlxkv.generation.drafts.drafter import Chooser, Promise
from mlxkv.generation.drafts.pace import Time
from mlxkv.generation.session import Session
from mlxkv.memory.types import is_allocation_failure

NAME = "model"
KIND = 3
"""Taken to be right three times in four at first, see `pace.PRIORS`."""
CHUNK = 256
"""Tokens of a prompt that are computed between two steps of the answer."""
PATIENCE = 32
"""Tokens of a prompt that are computed for each token of the answer so far."""


class SmallModel:
    """A smaller model, and the one answer that it drafts.

    Args:
        open_session: (owner) -> empty caches, with the owner's pages.
        n_kept: (owner, tokens) -> how many of the first tokens pages have.
        context: tokens that it can have.
        n_own: width of its logits, which is the number of tokens it can take.
        n_vocab: width of the logits of the model that it drafts for.
        name: tells it from other models that draft for the same one.
    """

    def __init__(
        self,
        open_session: Callable[[str], Session],
        n_kept: Callable[[str, Sequence[int]], int],
        context: int,
        n_own: int,
        n_vocab: int,
        name: str = "",
    ):
        self.open_session, self.n_kept = open_session, n_kept
        self.context, self.n_own, self.n_vocab, self.name = context, n_own, n_vocab, name
        self.time = Time()
        self._drafter: weakref.ref[ModelDrafter] | None = None

    def of_answer(self, owner: str, tokens: Sequence[int]) -> ModelDrafter:
        """Drafts one answer.

        Args:
            owner: of the answer.
            tokens: before it; negative ones stand for media.
        """
        return ModelDrafter(self, owner, tokens)

    def is_free(self, drafter: ModelDrafter) -> bool:
        """Whether it drafts no other answer."""
        return self._drafter is None or self._drafter() in (None, drafter)

    def take(self, drafter: ModelDrafter) -> None:
        """Draft this answer from now on."""
        self._drafter = weakref.ref(drafter)

    def leave(self, drafter: ModelDrafter) -> None:
        """Draft this answer no more."""
        if self.is_free(drafter):
            self._drafter = None


class ModelDrafter:
    """Drafts one answer with a smaller model; see the module."""

    hears = False

    def __init__(self, source: SmallModel, owner: str, tokens: Sequence[int]):
        self._source, self._owner, self._tokens = source, owner, list(tokens)
        self._n_prompt = len(tokens)
        self._n_kept: int | None = None
        self._session: Session | None = None
        self._filling: Generator[tuple[int, int], None, mx.array] | None = None
        self._n_fed = 0
        self._drafted: list[int] = []  # tokens behind these that were fed and may not come
        self._is_over = not all(0 <= token < source.n_own for token in tokens)

    def add(self, token: int, hidden: mx.array | None = None) -> None:
        del hidden
        self._tokens.append(token)
        self._is_over |= token >= self._source.n_own

    def propose(self, most: int) -> Promise | None:
        n = len(self._tokens)
        most = min(most, self._source.context - n)
        if self._is_over or n < 2 or most < 1 or not self._source.is_free(self):
            return None
        if self._n_kept is None:
            self._n_kept = self._source.n_kept(self._owner, self._tokens[:-1])
        n_left = n - max(self._n_fed, self._n_kept)
        if self._session is None and n_left > PATIENCE * (n - self._n_prompt):
            return None
        source = self._source
        seconds = source.time.seconds or 0.0
        return Promise(most, NAME, self._draw, KIND, seconds, source.name)

    def end(self) -> None:
        """Keep what was computed as pages, and the caches no longer."""
        session, self._filling = self._session, None  # a prompt that is not computed ends here
        try:
            if session is not None and self._n_fed:
                self._take_back(session)
                session.finish()
        except BaseException as error:
            log_fault("a draft model's prefix was not kept", contained(error))
        finally:
            self._give_up()

    def _give_up(self) -> None:
        session, self._session, self._filling = self._session, None, None
        self._is_over = True
        if session is not None:
            session.reset()
        self._source.leave(self)

    def _draw(self, n: int, choose: Chooser) -> list[int]:
        """Compute n tokens; none while the prompt is not computed, of which this does a chunk."""
        try:
            session = self._ready()
            if session is None:
                return []
            started = time.perf_counter()  # the prompt counts once, and is no part of a token
            found = self._computed(session, n, choose)
        except BaseException as error:
            self._give_up()
            if not (isinstance(error, KVCacheFull) or is_allocation_failure(error)):
                log_fault("a draft model failed", contained(error))
            return []
        if found:
            self._source.time.record((time.perf_counter() - started) / len(found))
        return found

    def _ready(self) -> Session | None:
        """The sequence, all but its last tokens computed; None while more of them are to be."""
        if self._session is None:
            if not self._source.is_free(self):  # another answer was faster
                return None
            self._source.take(self)
            head = self._tokens[:-1]
            self._session = session = self._source.open_session(self._owner)
            session.restore(head)
            self._filling = session.prefilling(head, lambda: CHUNK)
            self._n_fed = len(head)
        session = self._session
        if self._filling is not None:
            try:
                next(self._filling)
                return None
            except StopIteration as stop:
                mx.eval(stop.value)
                self._filling = None
        self._take_back(session)
        if len(self._tokens) - self._n_fed > CHUNK:  # others have drafted meanwhile
            mx.eval(self._feed(session, self._tokens[self._n_fed :][:CHUNK]))
            return None
        return session

    def _take_back(self, session: Session) -> None:
        """Have the caches hold tokens that came and no others; one at least is left to feed."""
        tokens, n = self._tokens, self._n_fed
        for token in self._drafted:
            if n >= len(tokens) - 1 or tokens[n] != token:
                break
            session.append(token)
            n += 1
        if self._drafted and not all(cache.rewind(n) for cache in session.caches):
            raise AssertionError("a cache cannot take a draft back")
        self._n_fed, self._drafted = n, []
        session.cut_due()

    def _feed(self, session: Session, new: Sequence[int]) -> mx.array:
        """Logits `[1, V]` behind tokens that came."""
        session.before_step(len(new))
        logits = session.model.last_logits(mx.array(list(new), mx.int32)[None], session.caches)
        for token in new:
            session.append(token)
        self._n_fed += len(new)
        return logits

    def _computed(self, session: Session, n: int, choose: Chooser) -> list[int]:
        logits = self._feed(session, self._tokens[self._n_fed :])
        n_more = max(2, n - 1)  # see `_behind_full_window`
        if n > 1:
            session.before_step(n_more)
        is_full = any(
            isinstance(cache, RotatingKVCache) and self._n_fed + n_more > cache.max_size
            for cache in session.caches
        )
        chosen: list[mx.array] = []
        draft: list[int] = []
        while (token := choose(self._fitted(logits), len(chosen), draft)) is not None:
            chosen.append(token)
            if choose.reads_draft or is_full:
                draft += cast(list[int], token.tolist())
            if len(chosen) == n:
                break
            if is_full:
                logits = self._behind_full_window(session, draft)
            else:
                logits = session.model.last_logits(token[None], session.caches)
        if not is_full:
            draft = cast(list[int], mx.concatenate(chosen).tolist()) if chosen else []
            self._drafted = draft[: session.n_held - self._n_fed]
        return draft

    def _behind_full_window(self, session: Session, draft: list[int]) -> mx.array:
        """Logits `[1, V]` behind a draft, which caches take as one chunk.

        A full window takes a chunk back, and no single tokens: they overwrite others. So the whole
        draft is fed each time, a first token with another behind it.
        """
        if not all(cache.rewind(self._n_fed) for cache in session.caches):
            raise AssertionError("a cache cannot take a draft back")
        self._drafted = fed = list(draft) if len(draft) > 1 else [*draft, *draft]
        logits = session.model(mx.array(fed, mx.int32)[None], session.caches)
        return logits[:, len(draft) - 1]

    def _fitted(self, logits: mx.array) -> mx.array:
        """Logits of as many tokens as the other model has: the rest of either are no tokens."""
        n_vocab, n_own = self._source.n_vocab, logits.shape[-1]
        if n_own > n_vocab:
            return logits[:, :n_vocab]
        if n_own < n_vocab:
            none = mx.full((1, n_vocab - n_own), -mx.inf, logits.dtype)
            return mx.concatenate([logits, none], axis=-1)
        return logits
