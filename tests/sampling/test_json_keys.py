"""No key comes twice in an object, however the tokens cut it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mlxkv.sampling.grammar import Grammar, Masker
from mlxkv.sampling.json_keys import Keys
from tests.sampling.test_grammar import (
    FAMILIES,
    MASKERS,
    TOKENIZERS,
    Maskers,
    Tokenizer,
    text_of,
    with_template,
)


def keys_of(text: str) -> Iterator[list[str]]:
    """The keys of each object, as they were written, the inner objects first."""
    found: list[list[str]] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append([key for key, _ in pairs])
        return dict(pairs)

    json.JSONDecoder(object_pairs_hook=note).raw_decode(text)
    return iter(found)


def babble(tokenizer: Tokenizer, masker: Masker, seed: int) -> str:
    """What a model writes that knows two letters and JSON."""
    random = np.random.default_rng(seed)
    known = [t for t in range(tokenizer.n_vocab) if set(tokenizer.decode([t])) <= set('ab":{},')]
    tokens: list[int] = []
    while not masker.finished:
        assert len(tokens) < 2000
        allowed = np.flatnonzero(masker.allowed(tokenizer.n_vocab))
        liked = allowed[np.isin(allowed, known)]
        tokens.append(int(random.choice(liked if len(liked) else allowed)))
        masker.advance(tokens[-1])
    return text_of(tokenizer, tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_repeats_itself_writes_no_key_twice(family, seed):
    inner = {"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 3}
    limits = {"minProperties": 5, "maxProperties": 6}
    schema = {"type": "object", "additionalProperties": inner, **limits}
    masker = MASKERS[family].masker(Grammar("json_schema", json.dumps(schema)))
    text = babble(TOKENIZERS[family], masker, seed)
    objects = list(keys_of(text))
    assert len(objects[-1]) >= 5
    for keys in objects:
        assert len(set(keys)) == len(keys), text


PIECES = {0: b'{"a', 1: b'": 1, "', 2: b"a", 3: b'"', 4: b'b"', 5: b'a"', 6: b'": {"a": 1}, "a"',
          7: rb'\u0061"', 8: b'x", "a"'}  # fmt: skip
QUOTING = {token: data for token, data in PIECES.items() if b'"' in data}


def left(*tokens: int, resets: frozenset[int] = frozenset()) -> set[int]:
    keys = Keys(QUOTING, resets)
    for token in tokens:
        keys.advance(token, PIECES[token])
    return {int(i) for i in np.flatnonzero(keys.without_repeats(np.ones(len(PIECES), bool)))}


def test_a_token_that_ends_a_key_again_must_not_come():
    assert left(0) == set(PIECES) - {6}
    assert left(0, 1) == set(PIECES) - {5, 6, 7, 8}
    assert left(0, 1, 2) == set(PIECES) - {1, 3, 6, 8}
    assert left(0, 1, 4) == set(PIECES)


def test_a_token_that_ends_a_text_and_repeats_a_key_must_not_come():
    keys = Keys(QUOTING)
    keys.advance(0, b'{"a": "')
    allowed = keys.without_repeats(np.ones(len(PIECES), bool))
    assert np.flatnonzero(~allowed).tolist() == [6, 8]


def test_the_same_key_may_come_in_another_object():
    keys = Keys(QUOTING)
    keys.advance(0, b'[{"a": 1}, {"')
    assert keys.without_repeats(np.ones(len(PIECES), bool))[5]
    keys.advance(0, b'b": {"a": 1}, "')
    assert keys.without_repeats(np.ones(len(PIECES), bool))[5]
    assert not keys.without_repeats(np.ones(len(PIECES), bool))[4]


def test_behind_a_marker_a_text_begins_anew():
    assert left(0, 1, 2, resets=frozenset({2})) == set(PIECES)


def test_where_nothing_else_can_come_a_key_comes_again():
    keys = Keys(QUOTING)
    keys.advance(0, b'{"a": 1, "')
    only = np.zeros(len(PIECES), bool)
    only[5] = True
    assert keys.without_repeats(only).tolist() == only.tolist()


@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral", "glm4"])
def test_calls_have_no_key_twice(name):
    tokenizer = with_template(name)
    limits = {"minProperties": 4, "maxProperties": 5}
    schema = {"type": "object", "additionalProperties": {"type": "null"}, **limits}
    tools = [{"name": "f", "parameters": schema}]
    grammar = Grammar("tools", json.dumps({"tools": tools, "parallel": False}))
    masker = Maskers(tokenizer).masker(grammar, "<think></think>")
    text = babble(tokenizer, masker, seed=1)
    keys = next(keys_of(text[text.index("{") :]))
    assert len(set(keys)) == len(keys) >= 4
