"""No key comes twice in an object of a call that is not JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mlxkv.sampling.grammar import Maskers
from tests.support.tool_calls import grammar_of, read, tokenizer_of, tool

OPEN = {"type": "object", "additionalProperties": {"type": ["object", "null"]}}
FLAT = {"type": "object", "additionalProperties": {"type": "null"}}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
HEADS = {
    "glm": ("<tool_call>f_1<arg_key>", "</arg_key><arg_value>", "</arg_value><arg_key>"),
    "qwen_xml": (
        "<tool_call>\n<function=f_1>\n<parameter=",
        ">\n",
        "\n</parameter>\n<parameter=",
    ),
    "gemma4": ("<|tool_call>call:f_1{", ":", ","),
    "functiongemma": ("<start_function_call>call:f_1{", ":", ","),
}

ENDS = {"glm": "</arg_key>", "qwen_xml": ">"}
"""Of keys; in Gemma's formats a colon."""


def allowed_behind(name: str, schema: Any, text: str, **changes: Any) -> set[str]:
    """The tokens that may come behind the beginning of an answer."""
    tokenizer = tokenizer_of(name)
    masker = Maskers(tokenizer).masker(grammar_of([tool(schema)], **changes))
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert masker.allowed(tokenizer.n_vocab)[token], tokenizer.decode([token])
        masker.advance(token)
    may = np.flatnonzero(masker.allowed(tokenizer.n_vocab))
    return {tokenizer.bytes_of(int(i)).decode(errors="replace") for i in may}


@pytest.mark.parametrize("name", HEADS)
def test_a_key_that_came_is_not_ended_again(name):
    opens, between, behind = HEADS[name]
    end = ENDS.get(name, ":")

    def ends(key: str) -> bool:
        text = f"{opens}ab{between}null{behind}{key}"
        return any(each.startswith(end) for each in allowed_behind(name, OPEN, text))

    assert not ends("ab")
    assert ends("a") and ends("abc") and ends("abab")


@pytest.mark.parametrize("name", HEADS)
def test_nor_in_an_object_within(name):
    opens, between, _ = HEADS[name]
    is_json = name in ("glm", "qwen_xml")
    inner = '{"k": null, "' if is_json else "{k:null,"

    def ends(key: str) -> bool:
        text = f"{opens}k{between}{inner}{key}"  # the same key outside is no hindrance
        end = '"' if is_json else ":"
        return any(each.startswith(end) for each in allowed_behind(name, OPEN, text))

    assert not ends("k") and ends("kk")


@pytest.mark.parametrize("name", ["gemma4", "functiongemma"])
def test_a_key_between_tokens_is_the_same_as_without(name):
    quote = {"gemma4": '<|"|>', "functiongemma": "<escape>"}[name]
    opens = HEADS[name][0]
    assert quote not in allowed_behind(name, OPEN, f"{opens}ab:null,{quote}ab")
    assert quote in allowed_behind(name, OPEN, f"{opens}ab:null,{quote}a b")


@pytest.mark.parametrize("name", ["glm", "qwen_xml"])
def test_braces_in_a_text_say_nothing(name):
    opens, between, _ = HEADS[name]
    text = '{"a": 1, "a'
    assert '"' in allowed_behind(name, STRINGS, f"{opens}s{between}{text}")


@pytest.mark.parametrize("name", HEADS)
def test_each_call_has_keys_of_its_own(name):
    opens, between, _ = HEADS[name]
    closes = {
        "glm": "</arg_value></tool_call>",
        "qwen_xml": "\n</parameter>\n</function>\n</tool_call>\n",
        "gemma4": "}<tool_call|>",
        "functiongemma": "}<end_function_call>",
    }[name]
    end = ENDS.get(name, ":")
    text = f"{opens}ab{between}null{closes}{opens}ab"
    assert any(each.startswith(end) for each in allowed_behind(name, OPEN, text))


@pytest.mark.parametrize("name", HEADS)
def test_json_in_the_place_of_a_call_is_followed_too(name):
    content = {"kind": "json_schema", "text": json.dumps(OPEN)}
    assert '"' not in allowed_behind(name, OPEN, '{"a": null, "a', content=content)
    assert '"' in allowed_behind(name, OPEN, '{"a": null, "b', content=content)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("seed", range(2))
def test_a_model_that_repeats_itself_makes_calls_that_are_read(name, seed):
    tokenizer, tools = tokenizer_of(name), [tool(FLAT)]
    masker = Maskers(tokenizer).masker(grammar_of(tools, parallel=False))
    random = np.random.default_rng(seed)
    pieces = {t: tokenizer.bytes_of(t).decode(errors="replace") for t in range(tokenizer.n_vocab)}
    plain = {t for t, piece in pieces.items() if set(piece) <= set("ab")}
    plain |= {t for t, piece in pieces.items() if piece == ENDS.get(name, ":")}
    tokens: list[int] = []
    while not masker.finished:
        assert len(tokens) < 4000
        allowed = np.flatnonzero(masker.allowed(tokenizer.n_vocab))
        known = allowed[np.isin(allowed, [*plain])]
        tokens.append(int(random.choice(known if len(known) else allowed)))
        masker.advance(tokens[-1])
    calls = read(tokenizer, tokens, tools)[1]
    assert [call.error for call in calls] == [None]
