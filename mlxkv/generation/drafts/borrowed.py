"""Drafts by layers that read the model's own keys and values (`nn.model.Reader`).

They keep nothing: a draft is made of the last token, the hidden state that it was chosen from, and
what the sequence's caches hold.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx

from mlxkv.generation.drafts.drafter import Chooser, Promise
from mlxkv.generation.drafts.mtp import Mtp, guessed
from mlxkv.generation.drafts.pace import LONG, Time
from mlxkv.kv.layout import Cache
from mlxkv.nn.model import Reader


class Borrowed:
    """Proposes what the layers guess, one token after the other.

    Args:
        reader: the model's.
        time: what a guess takes, of all its drafters.
        sequence: the caches of the answer's sequence.
    """

    name = Mtp.name
    hears = True
    hears_all = False

    def __init__(self, reader: Reader, time: Time, sequence: Sequence[Cache]):
        self._reader, self._time, self._sequence = reader, time, sequence
        self.caches: list[Cache] = []
        self._token: int | None = None
        self._hidden: mx.array | None = None  # [1, 1, E], that it, or the next one, is chosen from

    def hear(self, start: int, tokens: mx.array, hidden: mx.array) -> list[mx.array]:
        del start, tokens
        self._hidden = hidden[:, -1:]
        return []

    def add(self, token: int, hidden: mx.array | None = None) -> None:
        self._token = token
        if hidden is not None:
            self._hidden = hidden

    def propose(self, most: int) -> Promise | None:
        if most < 1 or self._token is None or self._hidden is None:
            return None
        return Promise(most, self.name, self._draw, LONG, self._time.seconds or 0.0)

    def end(self) -> None:
        """Nothing: nothing is kept."""

    def _draw(self, n: int, choose: Chooser) -> list[int]:
        """Up to n tokens that the layers guess."""
        started, reader = time.perf_counter(), self._reader
        assert self._token is not None and self._hidden is not None
        kv, position = reader.keys_values(self._sequence), self._sequence[0].offset
        first, hidden = mx.array([self._token], mx.int32), self._hidden

        def logits(drafted: mx.array | None) -> mx.array:
            nonlocal hidden
            token = first if drafted is None else drafted
            hidden, found = reader.guess(token[None], hidden, kv, position)
            return found[:, -1]

        tokens = guessed(n, choose, logits)
        if tokens:
            self._time.record((time.perf_counter() - started) / len(tokens))
        return tokens
