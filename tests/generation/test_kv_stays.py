"""A decoder leaves the KV of sequences where it is when others join and leave."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mlxkv.generation.decoder import Decoder
from mlxkv.kv.types import STEP
from tests.generation.test_decoder import folder, load, request

__all__ = ["folder"]


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3-text"])
def test_kv_of_the_others_stays_where_it_is_when_sequences_join_and_leave(name: str, folder):
    model, chance = load(folder, name), random.Random(5)
    decoder, n_moved = Decoder(model), Counter[str]()
    waiting = [request(chance.randint(190, 252), seed=i) for i in range(24)]
    while waiting or decoder.rows:
        if waiting and (len(decoder.rows) < 2 or chance.random() < 0.4):
            decoder.add(waiting.pop().row(model, max_tokens=chance.randint(10, 40)))
        before = {row: [(c.row, c.offset) for c in row.session.caches] for row in decoder.rows}
        # A call feeds one token, or two.
        grows = any(caches[0][1] % STEP in (0, STEP - 1) for caches in before.values())
        decoder.step()
        for row in decoder.rows:
            if [cache.row for cache in row.session.caches] != [at for at, _ in before[row]]:
                joins = before[row][0][1] + len(row.tokens) <= len(row.session.tokens)
                n_moved["joins" if joins else "grows" if grows else "others"] += 1
    assert n_moved["joins"] > 10 and n_moved["grows"] > 0 and n_moved["others"] == 0
