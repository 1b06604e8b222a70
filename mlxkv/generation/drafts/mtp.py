"""Drafts by the layer that a model has for it (`nn.model.Predictor`).

Invariants:
- The layer's cache holds a row for each pair of a token and the hidden state that it was chosen
  from, from where hearing began: the beginning of the prompt, or the end of what was restored. Rows
  behind `_n_rows` are guesses, and are taken back before anything else.
- Pairs wait until the layer is run: for a draft, or when there are `MOST_WAITING`.
- Nothing here changes an answer: a pair that is missed costs right guesses alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import mlx.core as mx

from mlxkv.cache import make_cache
from mlxkv.generation.drafts.drafter import Chooser, Promise
from mlxkv.generation.drafts.pace import LONG, Time
from mlxkv.kv.layout import Cache
from mlxkv.kv.types import layer_types
from mlxkv.nn.model import Predictor

MOST_WAITING, MOST_TIMED = 64, 16
"""Pairs that wait for the layer at most, where nothing is drafted; and where a draft is timed."""


def guessed(n: int, choose: Chooser, logits: Callable[[mx.array | None], mx.array]) -> list[int]:
    """Up to n tokens, each chosen behind the ones before it.

    Args:
        n: at least one.
        choose: chooses them; it may end them.
        logits: (the token before `[1]`, None for the first one) -> `[1, V]`.
    """
    found, known = list[mx.array](), list[int]()
    for i in range(n):
        token = choose(logits(found[-1] if found else None), i, known)
        if token is None:
            break
        found.append(token)
        if choose.reads_draft:
            known.append(cast(int, token.item()))
    return cast(list[int], mx.concatenate(found).tolist()) if found else []


class Mtp:
    """Proposes what a model's own layer guesses, one token after the other.

    Args:
        predictor: the model's.
        time: what a guess takes, of all its drafters.
        kv_type: format of the layer's cache.

    Attributes:
        caches: see `Listener`.
    """

    name = "mtp"
    hears = True
    hears_all = True

    def __init__(self, predictor: Predictor, time: Time, kv_type: str = "native"):
        self._predictor, self._time = predictor, time
        self.caches: list[Cache] = [make_cache(self._predictor.spec, layer_types(kv_type).default)]
        self._n_rows = 0
        self._next = 0  # position of the prompt's next token
        self._last: mx.array | None = None  # [1, 1, E], that the next token is chosen from
        self._tokens: list[mx.array] = []  # [1, n] each, of pairs that wait
        self._hidden: list[mx.array] = []  # [1, n, E] each
        self._n_waiting = 0
        self._guess: mx.array | None = None  # [1, 1, E], of the layer for the last pair

    def hear(self, start: int, tokens: mx.array, hidden: mx.array) -> list[mx.array]:
        if start != self._next or self._last is None:
            self._forget()
        else:
            self._wait(tokens[:, :1], self._last)
        if tokens.shape[1] > 1:
            self._wait(tokens[:, 1:], hidden[:, :-1])
        self._last, self._next = hidden[:, -1:], start + tokens.shape[1]
        self._run()
        return self.caches[0].state

    def add(self, token: int, hidden: mx.array | None = None) -> None:
        is_first = self._last is not None
        hidden = self._last if hidden is None else hidden
        self._last, self._next = None, -1  # of a prompt that has ended
        if hidden is None:
            return
        self._wait(mx.array([[token]], mx.int32), hidden)
        if is_first or self._n_waiting >= MOST_WAITING:  # not while a draft is timed
            self._run()
            mx.async_eval(self.caches[0].state)

    def propose(self, most: int) -> Promise | None:
        if most < 1 or not (self._n_waiting or self._guess is not None):
            return None
        return Promise(most, self.name, self._draw, LONG, self._time.seconds or 0.0)

    def end(self) -> None:
        """Give the layer's keys and values back."""
        self._forget()

    def _draw(self, n: int, choose: Chooser) -> list[int]:
        """Up to n tokens that the layer guesses."""
        started, n_waited = time.perf_counter(), self._n_waiting
        self._run()
        assert self._guess is not None
        hidden = self._guess

        def logits(drafted: mx.array | None) -> mx.array:
            nonlocal hidden
            if drafted is not None:
                hidden = self._predictor.hidden(drafted[None], hidden, self.caches[0])
            return self._predictor.logits(hidden)[:, -1]

        tokens = guessed(n, choose, logits)
        if tokens and n_waited <= MOST_TIMED:
            self._time.record((time.perf_counter() - started) / len(tokens))
        return tokens

    def _wait(self, tokens: mx.array, hidden: mx.array) -> None:
        self._tokens.append(tokens)
        self._hidden.append(hidden)
        self._n_waiting += tokens.shape[1]

    def _run(self) -> None:
        """Run the layer over the pairs that wait."""
        cache = self.caches[0]
        # Guesses go; a sequence that had to start over has emptied the cache.
        cache.rewind(min(self._n_rows, cache.offset))
        if not self._n_waiting:
            return
        tokens = mx.concatenate(self._tokens, axis=1)
        hidden = self._predictor.hidden(tokens, mx.concatenate(self._hidden, axis=1), cache)
        self._guess, self._n_rows = hidden[:, -1:], cache.offset
        self._tokens, self._hidden, self._n_waiting = [], [], 0

    def _forget(self) -> None:
        """Begin anew, from the next token on."""
        self.caches[0].reset()
        self._tokens, self._hidden, self._n_waiting = [], [], 0
        self._n_rows, self._last, self._guess = 0, None, None
