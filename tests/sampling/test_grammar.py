"""Masks from grammars: only what matches, and it ends, with every kind of tokenizer."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from mlxkv.chat.chat_template import ChatTemplate
from mlxkv.errors import UsageError
from mlxkv.generation.reader import read_answer
from mlxkv.parsers.formats import parser_for
from mlxkv.sampling.grammar import MAX_SPACES, MAX_TEXT, Grammar, Masker, Maskers
from mlxkv.text.tokenizer import Tokenizer
from tests.support.paths import TOKENIZERS as FOLDER

FAMILIES = ("byte_level", "gemma", "llama", "metaspace")
TOKENIZERS = {name: Tokenizer.from_dir(FOLDER / name) for name in FAMILIES}
MASKERS = {name: Maskers(tokenizer) for name, tokenizer in TOKENIZERS.items()}
PADDING = 25

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b é"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def width(tokenizer: Tokenizer) -> int:
    return tokenizer.n_vocab + PADDING


def write(
    tokenizer: Tokenizer, masker: Masker, score: Callable[[int], float], limit: int = 1500
) -> list[int]:
    """The tokens of a model that likes each token as much as `score` says."""
    liked = np.array([score(token) for token in range(width(tokenizer))], np.float32)
    tokens: list[int] = []
    while not masker.finished:
        assert len(tokens) < limit, f"no end: {tokenizer.decode(tokens)[-80:]!r}"
        allowed = masker.allowed(len(liked))
        assert allowed.any()
        tokens.append(int(np.where(allowed, liked, -np.inf).argmax()))
        masker.advance(tokens[-1])
    return tokens


def text_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode([t for t in tokens if t not in tokenizer.eos_token_ids])


def likes(tokenizer: Tokenizer, characters: str, seed: int = 0) -> Callable[[int], float]:
    """A model that likes tokens of these characters, the first ones most; then some at random."""
    order = np.random.default_rng(seed).random(width(tokenizer))

    def score(token: int) -> float:
        if token >= tokenizer.n_vocab:
            return 1000.0
        if token in tokenizer.eos_token_ids:
            return -1.0
        text = tokenizer.decode([tokenizer.encode("a", add_special_tokens=False)[0], token])[1:]
        if text and set(text) <= set(characters):
            return 100.0 - characters.index(text[0])
        if not text.strip():
            return 0.0
        return float(order[token])

    return score


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_a_json_object_ends_for_a_model_that_likes_blanks_and_never_the_end(self, family):
        tokenizer = TOKENIZERS[family]
        masker = MASKERS[family].masker(Grammar("json_object"))
        text = text_of(tokenizer, write(tokenizer, masker, likes(tokenizer, ' \n\t\r}"')))
        assert isinstance(json.loads(text), dict)
        assert max(map(len, re.findall(r"\s+", text)), default=0) <= MAX_SPACES

    @pytest.mark.parametrize("seed", range(4))
    def test_json_of_a_schema_is_of_the_schema(self, family, seed):
        tokenizer = TOKENIZERS[family]
        masker = MASKERS[family].masker(Grammar("json_schema", json.dumps(SCHEMA)))
        value = json.loads(text_of(tokenizer, write(tokenizer, masker, likes(tokenizer, "", seed))))
        assert value.keys() == {"name", "age", "tags"}
        assert len(value["name"]) <= 8 and 0 <= value["age"] <= 150
        assert len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "b é"}

    def test_a_schema_in_characters_that_are_bytes_to_the_tokenizer_is_matched(self, family):
        tokenizer = TOKENIZERS[family]
        schema = {"enum": ["温度 20°C 😀"]}
        masker = MASKERS[family].masker(Grammar("json_schema", json.dumps(schema)))
        tokens = write(tokenizer, masker, likes(tokenizer, ""))
        assert json.loads(text_of(tokenizer, tokens)) == "温度 20°C 😀"

    def test_a_regex_is_matched_as_a_whole(self, family):
        tokenizer, pattern = TOKENIZERS[family], r"(yes|no), [0-9]{2} of [a-z]{3,5}"
        masker = MASKERS[family].masker(Grammar("regex", pattern))
        text = text_of(tokenizer, write(tokenizer, masker, likes(tokenizer, "")))
        assert re.fullmatch(pattern, text)

    def test_a_lark_grammar_is_followed(self, family):
        tokenizer = TOKENIZERS[family]
        masker = MASKERS[family].masker(Grammar("lark", 'start: ("a" | "b")~3 " end"'))
        text = text_of(tokenizer, write(tokenizer, masker, likes(tokenizer, "")))
        assert re.fullmatch("[ab]{3} end", text)

    def test_behind_the_end_only_end_tokens_are_left(self, family):
        tokenizer = TOKENIZERS[family]
        masker = MASKERS[family].masker(Grammar("regex", "ab"))
        for token in tokens_of(tokenizer, "ab"):
            masker.advance(token)
        assert masker.finished
        allowed = np.flatnonzero(masker.allowed(width(tokenizer)))
        assert set(allowed.tolist()) == tokenizer.eos_token_ids

    def test_where_it_may_end_and_go_on_both_are_allowed(self, family):
        tokenizer = TOKENIZERS[family]
        masker = MASKERS[family].masker(Grammar("regex", "a+"))
        masker.advance(tokens_of(tokenizer, "a")[0])
        assert not masker.finished
        assert masker.allowed(width(tokenizer))[list(tokenizer.eos_token_ids)].all()
        masker.advance(min(tokenizer.eos_token_ids))
        assert masker.finished


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each character."""
    found = [tokenizer.id_of(character) for character in text]
    assert None not in found
    return found  # type: ignore[return-value]


def test_what_is_past_the_vocabulary_must_not_come():
    tokenizer = TOKENIZERS["byte_level"]
    masker = MASKERS["byte_level"].masker(Grammar("regex", "ab"))
    allowed = masker.allowed(width(tokenizer))
    assert allowed.dtype == bool and allowed.shape == (width(tokenizer),)
    assert allowed[tokens_of(tokenizer, "a")[0]]
    assert not allowed[tokenizer.n_vocab :].any()


def test_two_answers_do_not_share_where_they_are():
    tokenizer = TOKENIZERS["byte_level"]
    first, second = (MASKERS["byte_level"].masker(Grammar("regex", "ab")) for _ in range(2))
    for token in tokens_of(tokenizer, "ab"):
        first.advance(token)
    assert first.finished and not second.finished
    second.advance(tokens_of(tokenizer, "a")[0])


@pytest.mark.parametrize("text", ["a<|user|>b", "<think>", "other", "</s>", "<|tool|>"])
def test_a_text_that_spells_a_special_token_is_written_in_other_tokens(text):
    tokenizer = with_template("hermes")
    masker = Maskers(tokenizer).masker(Grammar("json_schema", json.dumps({"const": text})))
    tokens = write(tokenizer, masker, likes(tokenizer, ""))
    assert not {tokenizer.id_of("<think>"), 402, 257} & {*tokens}
    assert json.loads(text_of(tokenizer, tokens)) == text


def test_tags_that_a_vocabulary_has_as_text_stay_text():
    backend = Tokenizer.from_dir(FOLDER / "gemma")._backend
    state = json.loads(backend.to_str())
    ids = {token["content"]: token["id"] for token in state["added_tokens"]}
    ids |= {"<h1>": backend.get_vocab_size(), "<think>": backend.get_vocab_size() + 1}
    state["model"]["vocab"] |= ids
    backend = Backend.from_str(json.dumps(state))
    backend.add_tokens(["<h1>", "<think>"])
    tokenizer = Tokenizer(
        backend,
        special_tokens={},
        eos_token_ids=TOKENIZERS["gemma"].eos_token_ids,
        n_vocab=backend.get_vocab_size(),
        chat_template=ChatTemplate("{# <think></think> #}"),
    )
    masker = Maskers(tokenizer).masker(Grammar("regex", ".{2,9}"))
    allowed = allowed_by(masker, tokenizer)
    assert ids["<h1>"] in allowed and ids["<think>"] not in allowed
    assert not set(allowed) & tokenizer.special_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_token_is_no_text_where_the_vocabulary_spells_it_either(family):
    tokenizer = TOKENIZERS[family]
    masker = MASKERS[family].masker(Grammar("json_schema", '{"type": "string", "maxLength": 9}'))
    first = next(t for t in range(tokenizer.n_vocab) if tokenizer.decode([t]) == '"')
    masker.advance(first)
    allowed = masker.allowed(width(tokenizer))
    assert not allowed[[*tokenizer.eos_token_ids, *tokenizer.special_ids]].any()
    assert allowed.sum() > 100


@pytest.mark.parametrize(
    "kind, text",
    [
        ("regex", "(unclosed"),
        ("regex", "(?=look)ahead"),
        ("lark", "start: nowhere"),
        ("lark", "not a grammar {{"),
        ("json_schema", "{"),
        ("json_schema", "[1]"),
        ("json_schema", '{"type": "no such type"}'),
        ("json_schema", '{"$ref": "#/nowhere"}'),
        (
            "json_schema",
            '{"type": "object", "properties": {"a": {}}, "if": {}, "then": {}}',
        ),
        ("json_schema", "[" * 5000),
        ("tools", "{}"),
        ("tools", '{"tools": [{"name": "f", "parameters": {}}]}'),
    ],
)
def test_a_grammar_that_cannot_be_used_is_the_users_error(kind, text):
    with pytest.raises(UsageError):
        MASKERS["byte_level"].masker(Grammar(kind, text))


@pytest.mark.parametrize("reference", ["file:///etc/hosts", "http://127.0.0.1:9/x.json"])
def test_a_schema_refers_to_nothing_outside_of_it(reference):
    with pytest.raises(UsageError, match="not present"):
        MASKERS["byte_level"].masker(Grammar("json_schema", json.dumps({"$ref": reference})))


def test_a_grammar_that_grows_too_complex_is_the_users_error():
    tokenizer = TOKENIZERS["byte_level"]
    masker = MASKERS["byte_level"].masker(Grammar("regex", "(a?){2000}a{2000}"))
    with pytest.raises(UsageError, match="cannot be used") as caught:
        write(tokenizer, masker, likes(tokenizer, "a"))
    assert "<state>" not in str(caught.value)


def test_a_grammar_has_a_kind_and_a_bounded_length():
    with pytest.raises(UsageError, match="must be one of"):
        Grammar("bnf", "x")
    with pytest.raises(UsageError, match="characters"):
        Grammar("regex", "x" * (MAX_TEXT + 1))


def test_a_token_that_must_not_come_is_refused():
    masker = MASKERS["byte_level"].masker(Grammar("regex", "ab"))
    with pytest.raises(UsageError):
        masker.advance(tokens_of(TOKENIZERS["byte_level"], "b")[0])


def test_tokens_are_led_as_far_as_they_may_come_and_on_by_what_is_forced():
    tokenizer = TOKENIZERS["byte_level"]
    masker = MASKERS["byte_level"].masker(Grammar("regex", "a[bc]defgh"))
    of = functools.partial(tokens_of, tokenizer)
    n, forced = masker.led(of("ab"))
    assert n == len(of("ab")) and "defgh".startswith(tokenizer.decode(forced)) and forced
    assert masker.led([*of("a"), *of("d")]) == (len(of("a")), [])  # b or c
    assert masker.led(of("b")) == (0, of("a"))
    masker.advance(of("a")[0])  # where it was
    masker.advance(of("b")[0])
    forced = masker.forced()
    for token in forced:  # which alone may come, and nothing where it must not
        may = np.flatnonzero(masker.allowed(width(tokenizer)))
        assert may.tolist() == [token] == masker.forced()[:1]
        fork = masker.fork()
        fork._is_text = masker._is_text.copy()
        fork._is_text[token] = False
        assert fork.forced() == []
        masker.advance(token)
    assert len(forced) > 1


TEMPLATES = {
    "hermes": "<think></think><tool_call>{}</tool_call>",
    "think": "<think></think>",
    "llama3": '<|start_header_id|> {"name": , "parameters": }',
    "mistral": "[TOOL_CALLS] [",
    "mistral_args": "[TOOL_CALLS]name[ARGS]{}",
    "glm4": "[gMASK]<|observation|>",
    "gemma3": "<start_of_turn>",
    "harmony": "<|channel|><|message|>",
}
MARKERS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "<|channel|>",
    "<|message|>",
    "<|start|>",
)


def with_template(name: str, family: str = "byte_level") -> Tokenizer:
    """A tokenizer whose model writes in a format."""
    backend = Tokenizer.from_dir(FOLDER / family)._backend
    backend.add_tokens(list(MARKERS))
    return Tokenizer(
        backend,
        special_tokens={},
        eos_token_ids=TOKENIZERS[family].eos_token_ids,
        n_vocab=backend.get_vocab_size(),
        chat_template=ChatTemplate("{# " + TEMPLATES[name] + " #}"),
    )


PLACE = {
    "type": "object",
    "properties": {"place": {"$ref": "#/$defs/place"}, "days": {"type": "integer", "maximum": 9}},
    "required": ["place", "days"],
    "additionalProperties": False,
    "$defs": {"place": {"enum": ["Rome", 'a "b"\n']}},
}
TOOLS: list[dict[str, Any]] = [
    {"name": "weather", "parameters": PLACE},
    {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}},
]


def calls_grammar(**changes: Any) -> Grammar:
    return Grammar("tools", json.dumps({"tools": TOOLS, **changes}))


@pytest.mark.parametrize("family", ["byte_level", "metaspace"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral", "mistral_args", "glm4", "gemma3"])
def test_required_calls_are_calls_to_the_familys_parser(name, seed, family):
    tokenizer = with_template(name, family)
    masker = Maskers(tokenizer).masker(calls_grammar(parallel=seed > 0), "<think></think>")
    tokens = write(tokenizer, masker, likes(tokenizer, "", seed))
    tools = [{"type": "function", "function": tool} for tool in TOOLS]
    text, reasoning, calls = read_answer(
        tokenizer, parser_for(tokenizer, prompt="", tools=tools), tokens
    )
    assert (text.strip(), reasoning) == ("", "") and calls
    assert seed > 0 or len(calls) == 1
    for call in calls:
        assert call.error is None and call.name in ("weather", "stop")
        if call.name == "weather":
            assert call.arguments["place"] in ("Rome", 'a "b"\n') and call.arguments["days"] <= 9


@pytest.mark.parametrize("marked", [True, False])
def test_required_calls_of_a_model_whose_template_knows_no_tools_are_those_it_was_told(marked):
    tokenizer = with_template("think")
    if not marked:  # a vocabulary without <tool_call>
        tokenizer = Tokenizer.from_dir(FOLDER / "byte_level")
        tokenizer.chat_template = ChatTemplate("{{ messages[0].content }}")
    assert (tokenizer.id_of("<tool_call>") is not None) is marked
    masker = Maskers(tokenizer).masker(calls_grammar(parallel=False), "<think></think>")
    tokens = write(tokenizer, masker, likes(tokenizer, ""))
    tools = [{"type": "function", "function": tool} for tool in TOOLS]
    text, _, calls = read_answer(tokenizer, parser_for(tokenizer, prompt="", tools=tools), tokens)
    assert text.strip() == "" and len(calls) == 1
    assert calls[0].error is None and calls[0].name in ("weather", "stop")


@pytest.mark.parametrize("name", ["hermes", "llama3", "mistral_args", "glm4", "gemma3"])
def test_arguments_are_an_object_also_where_their_schema_does_not_say_so(name):
    tokenizer = with_template(name)
    for parameters in ({}, {"type": ["object", "null"]}, {"properties": {}}):
        grammar = calls_grammar(tools=[{"name": "f", "parameters": parameters}], parallel=False)
        masker = Maskers(tokenizer).masker(grammar, "<think></think>")
        tokens = write(tokenizer, masker, likes(tokenizer, '}"'))
        known = [{"type": "function", "function": {"name": "f"}}]
        _, _, calls = read_answer(tokenizer, parser_for(tokenizer, prompt="", tools=known), tokens)
        assert [(call.name, call.error) for call in calls] == [("f", None)]
    with pytest.raises(UsageError, match=r"'f' cannot be required of this model: .* no object"):
        tools = [{"name": "f", "parameters": {"type": "array"}}]
        Maskers(tokenizer).masker(calls_grammar(tools=tools))


def test_a_json_answer_may_come_in_place_of_calls():
    tokenizer = with_template("hermes")
    content = {"kind": "json_schema", "text": json.dumps({"enum": ["sunny"]})}
    for opener, expected in (('"', '"sunny"'), ("<tool_call>", "")):
        masker = Maskers(tokenizer).masker(calls_grammar(content=content))
        first = tokenizer.id_of(opener)
        assert first is not None
        masker.advance(first)
        tokens = [first, *write(tokenizer, masker, likes(tokenizer, ""))]
        text, _, calls = read_answer(tokenizer, parser_for(tokenizer, prompt=""), tokens)
        assert text == expected and bool(calls) == (not expected)


def advance_all(masker: Masker, tokenizer: Tokenizer, text: str) -> None:
    for token in tokenizer.encode(text, add_special_tokens=False):
        masker.allowed(tokenizer.n_vocab)
        masker.advance(token)


def allowed_by(masker: Masker, tokenizer: Tokenizer) -> set[int]:
    return set(np.flatnonzero(masker.allowed(tokenizer.n_vocab)).tolist())


@pytest.mark.parametrize(
    "prompt, thought",
    [
        ("user: hi\n<think>\n", "hmm { maybe</think>"),
        ("user: hi\n", "<think>hmm { maybe</think>"),
        ("user: hi\n", ""),
        ("user: hi\n<think>\n\n</think>\n\n", ""),
    ],
)
def test_reasoning_is_free_and_the_answer_behind_it_matches(prompt, thought):
    tokenizer = with_template("hermes")
    masker = Maskers(tokenizer).masker(Grammar("json_object"), prompt)
    advance_all(masker, tokenizer, thought)
    allowed = allowed_by(masker, tokenizer)
    assert tokenizer.id_of("{") in allowed and tokenizer.id_of("a") not in allowed
    advance_all(masker, tokenizer, '{"a": 1}')
    assert masker.finished


def test_a_line_break_before_reasoning_is_no_part_of_the_answer():
    tokenizer = with_template("hermes")
    opens, breaks = tokenizer.id_of("<think>"), tokenizer.encode("\n", add_special_tokens=False)
    masker = Maskers(tokenizer).masker(Grammar("regex", "yes|no"), "hi")
    assert {opens, *breaks} <= allowed_by(masker, tokenizer)
    advance_all(masker, tokenizer, "\n")
    assert allowed_by(masker, tokenizer) == {opens}
    advance_all(masker, tokenizer, "<think>well</think>yes")
    assert masker.finished


def test_a_line_break_that_the_grammar_begins_with_is_the_answers():
    tokenizer = with_template("hermes")
    masker = Maskers(tokenizer).masker(Grammar("regex", "\n(yes|no)"), "hi")
    advance_all(masker, tokenizer, "\n")
    assert tokenizer.id_of("<think>") not in allowed_by(masker, tokenizer)
    advance_all(masker, tokenizer, "yes")
    assert masker.finished


def test_reasoning_cannot_end_the_answer():
    tokenizer = with_template("think")
    masker = Maskers(tokenizer).masker(Grammar("json_object"), "hi<think>")
    advance_all(masker, tokenizer, "well")
    assert not allowed_by(masker, tokenizer) & tokenizer.eos_token_ids
    assert tokenizer.id_of("a") in allowed_by(masker, tokenizer)


def test_reasoning_cannot_begin_twice_or_after_it_was_closed():
    tokenizer, opens = with_template("think"), with_template("think").id_of("<think>")
    masker = Maskers(tokenizer).masker(Grammar("json_object"), "hi")
    assert opens in allowed_by(masker, tokenizer)
    advance_all(masker, tokenizer, "<think></think>")
    assert opens not in allowed_by(masker, tokenizer)
    masker = Maskers(tokenizer).masker(Grammar("json_object"), "hi<think></think>")
    assert opens not in allowed_by(masker, tokenizer)


def test_harmonys_final_message_matches():
    tokenizer = with_template("harmony")
    masker = Maskers(tokenizer).masker(Grammar("json_object"), "<|start|>assistant")
    advance_all(masker, tokenizer, "<|channel|>analysis<|message|>hm<|start|>assistant")
    assert tokenizer.id_of("a") in allowed_by(masker, tokenizer)
    advance_all(masker, tokenizer, "<|channel|>final<|message|>")
    assert tokenizer.id_of("a") not in allowed_by(masker, tokenizer)
    advance_all(masker, tokenizer, "{}")
    assert masker.finished


def test_a_suppressed_token_does_not_come_in_a_grammar_either():
    tokenizer = TOKENIZERS["byte_level"]
    grammar = Grammar("regex", "a|b")
    a, b = (tokenizer.id_of(letter) for letter in "ab")
    assert a is not None and b is not None
    assert {a, b} <= allowed_by(Maskers(tokenizer).masker(grammar), tokenizer)
    masker = Maskers(tokenizer, {a, tokenizer.n_vocab + 9}).masker(grammar)
    assert allowed_by(masker, tokenizer) == {b}
    with pytest.raises(UsageError, match="cannot go on"):
        Maskers(tokenizer, {a, b}).masker(grammar).allowed(tokenizer.n_vocab)
