"""Calls drawn at random through a mask, and a check of schemas that shares nothing with ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from mlxkv.chat.chat_template import ChatTemplate
from mlxkv.errors import UsageError
from mlxkv.generation.reader import read_answer
from mlxkv.parsers.events import ToolCall
from mlxkv.parsers.formats import format_of, parser_for
from mlxkv.sampling.grammar import Grammar, Masker, Maskers
from mlxkv.text.tokenizer import Tokenizer
from tests.sampling.test_grammar import FOLDER, TOKENIZERS, advance_all, allowed_by

TEMPLATES = {
    "glm": "<tool_call><arg_key>",
    "qwen_xml": "<tool_call><function=<parameter=",
    "gemma4": "<|tool_call><tool_call|>",
    "functiongemma": "<start_function_call>",
    "harmony": "<|channel|><|message|>",
}
NO_THOUGHT = {
    "glm": "<think></think>",
    "qwen_xml": "<think>\n\n</think>\n\n",
    "gemma4": "<|channel>thought\n<channel|>",
}
MARKERS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>',
    "<start_function_call>", "<end_function_call>", "<escape>", "<|start|>", "<|channel|>",
    "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>",
)  # fmt: skip
OPENERS = ("<think>", "<tool_call>", "<arg_key>", "<|channel>", "<|tool_call>", "<|channel|>")
ENDS_TEXT = {"qwen_xml": "\n</parameter>\n"}
"""What ends a value that is text, where no token does."""
BRACKETS = ('"', "}", "]", "<0x22>", "<0x7D>", "<0x5D>")

STRING = {"type": "string"}
NASTY = [
    'a"b}', '{"x":1}', "", "5", "null", '<|"|>q', "<escape>z", "a<|tool_call>b", "</arg_key>",
    "x</arg_value>y", "é😀\n", "<tool_call|>", "</tool_call>", "<|call|>", " true ", "\\",
]  # fmt: skip


def an_object(*required: str, **properties: Any) -> dict[str, Any]:
    closed = {"properties": properties, "additionalProperties": False}
    return {"type": "object", "required": list(required), **closed}


SCHEMAS: dict[str, Any] = {
    "nothing": an_object(),
    "anything": {},
    "any object": {"type": "object"},
    "strings": an_object(
        "a", "é 温", a=STRING, b={"type": "string", "maxLength": 5},
        **{"é 温": {"type": "string", "minLength": 2, "maxLength": 6}},
    ),
    "enums": an_object(
        "e", "f", e={"enum": NASTY}, f={"enum": [1, 2.5, True, None, [1, "a"], {"k": ["v", {}]}]}
    ),
    "several kinds": an_object(
        "n", "m", "i", "x",
        n={"type": ["string", "null"]},
        m={"anyOf": [STRING, {"type": "null"}]},
        i={"type": ["integer", "string"], "minimum": 3},
        x={"anyOf": [{"type": "array", "items": STRING}, STRING, {"type": "boolean"}]},
    ),
    "numbers": an_object(
        "i", "r", "s", "t", "b", "z", "u",
        i={"type": "integer"}, r={"type": "number", "minimum": 0.5},
        s={"type": "integer", "exclusiveMinimum": -3, "maximum": 12},
        t={"type": "integer", "multipleOf": 7}, u={"type": "number", "exclusiveMaximum": -2},
        b={"type": "boolean"}, z={"type": "null"},
    ),
    "nested": an_object(
        o={
            "type": "object",
            "properties": {
                "p": STRING,
                "q": {
                    "type": "array",
                    "items": an_object("r", r={"type": "string", "maxLength": 3}),
                    "minItems": 1, "maxItems": 3,
                },
            },
            "required": ["q"],
        },
        i={"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}},
        t={"type": "array", "prefixItems": [STRING, {"type": "null"}], "items": False,
           "minItems": 1},
        u={"type": "array", "prefixItems": [{"type": "null"}], "items": STRING, "maxItems": 3},
        w={"type": "array", "items": STRING, "maxItems": 0},
    ),
    "references": {
        **an_object(
            "tree", tree={"$ref": "#/$defs/node"}, p={"$ref": "#/properties/q"},
            q={"allOf": [{"$ref": "#/$defs/s"}], "description": "x", "maxLength": 4},
        ),
        "$defs": {
            "node": an_object(
                "v", v={"type": "integer", "maximum": 9},
                kids={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            ),
            "s": STRING,
        },
    },
    "patterns": an_object(
        "p", "q", "d",
        p={"type": "string", "pattern": r"^[a-z]{2}-\d+$"},
        q={"type": "string", "pattern": "^a|b$", "maxLength": 6},
        d={"type": "string", "format": "date"},
    ),
    "maps": {
        **an_object(
            "m", m={"type": "object", "additionalProperties": STRING}, a={},
            k={
                "type": "object",
                "properties": {"x": {"type": "null"}},
                "additionalProperties": {"type": "boolean"},
            },
        ),
        "additionalProperties": STRING,
    },
    "one of two": {
        "type": "object",
        "oneOf": [
            an_object("kind", "v", kind={"const": "a"}, v={"type": "boolean"}),
            {
                "properties": {"kind": {"const": "b"}, "v": STRING},
                "required": ["kind", "v"],
                "additionalProperties": STRING,
            },
        ],
    },
    "names": an_object(
        "a b", "{", "日", 'q"', **{"a b": STRING, "x-y": {"type": "null"}, "{": {"type": "boolean"},
        "A": STRING, "日": STRING, 'q"': STRING},
    ),
}  # fmt: skip
TYPES: dict[str, Any] = {
    "null": type(None), "boolean": bool, "string": str, "array": list, "object": dict,
}  # fmt: skip


def is_of(value: Any, kind: str) -> bool:
    if kind in TYPES:
        return isinstance(value, TYPES[kind])
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (kind == "number" and isinstance(value, float))


def flaw(value: Any, schema: Any, root: Any) -> str | None:
    """The first rule that a value breaks."""
    if isinstance(schema, bool):
        return None if schema else "false"
    if "$ref" in schema:
        target = root
        for name in schema["$ref"].split("/")[1:]:
            target = target[name]
        return flaw(value, target, root)
    kinds = schema.get("type", [])
    if kinds and not any(is_of(value, kind) for kind in np.atleast_1d(kinds)):
        return f"{value!r} is no {kinds}"
    for key in ("allOf", "anyOf", "oneOf"):
        found = [flaw(value, part, root) for part in schema.get(key, [])]
        n_good = found.count(None)
        if found and not {"allOf": n_good == len(found), "anyOf": n_good > 0}.get(key, n_good == 1):
            return f"{key} of {value!r}: {found}"
    same = json.dumps(value, sort_keys=True)
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None and same not in [json.dumps(each, sort_keys=True) for each in values]:
        return f"{value!r} is none of the values"
    return broken_rule(value, schema, root)


def broken_rule(value: Any, schema: Mapping[str, Any], root: Any) -> str | None:
    size = len(value) if isinstance(value, str | list) else None
    number = value if is_of(value, "number") else None
    rules = {
        "minLength": lambda n: not isinstance(value, str) or size >= n,
        "maxLength": lambda n: not isinstance(value, str) or size <= n,
        "minItems": lambda n: not isinstance(value, list) or size >= n,
        "maxItems": lambda n: not isinstance(value, list) or size <= n,
        "pattern": lambda p: not isinstance(value, str) or re.search(p, value, re.ASCII),
        "format": lambda f: f != "date" or re.fullmatch(r"\d{4}-\d\d-\d\d", str(value)),
        "minimum": lambda n: number is None or number >= n,
        "maximum": lambda n: number is None or number <= n,
        "exclusiveMinimum": lambda n: number is None or number > n,
        "exclusiveMaximum": lambda n: number is None or number < n,
        "multipleOf": lambda n: number is None or number % n == 0,
        "required": lambda names: not isinstance(value, dict) or {*names} <= value.keys(),
    }
    for key, good in rules.items():
        if key in schema and not good(schema[key]):
            return f"{key} {schema[key]} of {value!r}"
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        named, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        inner = [(each, named.get(name, rest)) for name, each in value.items()]
    elif isinstance(value, list):
        first = schema.get("prefixItems", [])
        kinds = [*first, *[schema.get("items", True)] * len(value)]
        inner = list(zip(value, kinds, strict=False))
    return next((said for each, kind in inner if (said := flaw(each, kind, root))), None)


@cache
def tokenizer_of(name: str, family: str = "byte_level", how: str = "added") -> Tokenizer:
    """A tokenizer with the markers of all formats; `how` they are in it differs among families."""
    backend = Tokenizer.from_dir(FOLDER / family)._backend
    if how == "in the vocabulary":  # as Gemma has them
        state = json.loads(backend.to_str())
        ids = {each["content"]: each["id"] for each in state["added_tokens"]}
        for marker in MARKERS:
            ids.setdefault(marker, backend.get_vocab_size() - len(state["added_tokens"]) + len(ids))
        state["model"]["vocab"] |= ids
        backend = Backend.from_str(json.dumps(state))
    special = how != "added"
    backend.add_tokens([AddedToken(m, special=special, normalized=False) for m in MARKERS])
    ends = TOKENIZERS[family].eos_token_ids
    if name == "harmony":
        ends = frozenset(backend.get_vocab()[end] for end in ("<|call|>", "<|return|>"))
    tokenizer = Tokenizer(
        backend,
        special_tokens={},
        eos_token_ids=ends,
        n_vocab=backend.get_vocab_size(),
        chat_template=ChatTemplate("{# " + TEMPLATES[name] + " #}"),
    )
    assert format_of(tokenizer) == name
    return tokenizer


def grammar_of(tools: Sequence[Mapping[str, Any]], **changes: Any) -> Grammar:
    return Grammar("tools", json.dumps({"tools": tools, **changes}))


def tool(schema: Any, name: str = "f_1") -> dict[str, Any]:
    return {"name": name, "parameters": schema}


def masker_of(tokenizer: Tokenizer, grammar: Grammar) -> Masker:
    return Maskers(tokenizer).masker(grammar, NO_THOUGHT.get(format_of(tokenizer), ""))


def wander(tokenizer: Tokenizer, masker: Masker, seed: int, limit: int = 3000) -> list[int]:
    """An answer of a model that likes all tokens alike, and more and more those that close."""
    random = np.random.default_rng(seed)
    closing = [tokenizer.id_of(t) for t in (*MARKERS, *BRACKETS) if t not in OPENERS]
    wish, tokens = random.uniform(0.1, 0.6), []
    ends = ENDS_TEXT.get(format_of(tokenizer), "")
    spelled = tokenizer.encode(ends, add_special_tokens=False) if ends else []
    coming: list[int] = []
    while not masker.finished:
        assert len(tokens) < limit, f"no end: {tokenizer.decode(tokens)[-80:]!r}"
        allowed = np.flatnonzero(masker.allowed(tokenizer.n_vocab))
        if coming and coming[0] in allowed:
            tokens.append(coming.pop(0))
            masker.advance(tokens[-1])
            continue
        wishes_text_end = spelled and random.random() < min(wish / 4 + len(tokens) / 800, 0.85)
        coming = [*spelled] if wishes_text_end else []
        closers = allowed[np.isin(allowed, [token for token in closing if token is not None])]
        wishes_end = len(closers) and random.random() < min(wish + len(tokens) / 800, 0.85)
        tokens.append(int(random.choice(closers if wishes_end else allowed)))
        masker.advance(tokens[-1])
    return tokens


def read(
    tokenizer: Tokenizer, tokens: Sequence[int], tools: Sequence[Mapping[str, Any]]
) -> tuple[str, Sequence[ToolCall]]:
    """The content and the calls that the family's parser finds."""
    known = [{"type": "function", "function": each} for each in tools]
    text, _, calls = read_answer(tokenizer, parser_for(tokenizer, prompt="", tools=known), tokens)
    return text.strip(), calls


def drawn(name: str, schema: Any, *seeds: int, **changes: Any) -> list[dict[str, Any]]:
    """Arguments of calls drawn at random."""
    tokenizer, tools = tokenizer_of(name), [tool(schema)]
    found = []
    for seed in seeds:
        tokens = wander(tokenizer, masker_of(tokenizer, grammar_of(tools, **changes)), seed)
        found += [dict(call.arguments) for call in read(tokenizer, tokens, tools)[1]]
    return found


def takes(name: str, schema: Any, *texts: str, **changes: Any) -> bool:
    """Whether an answer may be these texts; every second one is spelled, its markers too."""
    tokenizer = tokenizer_of(name)
    masker = masker_of(tokenizer, grammar_of([tool(schema)], **changes))
    try:
        for i, text in enumerate(texts):
            advance_all(masker, TOKENIZERS["byte_level"] if i % 2 else tokenizer, text)
    except UsageError:
        return False
    return masker.finished or bool(allowed_by(masker, tokenizer) & tokenizer.eos_token_ids)
