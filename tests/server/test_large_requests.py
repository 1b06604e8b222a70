"""Large requests and invalid ones: bounded before they are read, and few errors about them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from mlxkv.server.fields import MAX_ITEMS
from mlxkv.server.json_route import MAX_CONTAINERS, MAX_STRINGS, parse_json
from tests.support.fake_engine import MODEL, FakeEngine, serving

N = 50_000
SAID: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
KEPT: dict[str, Any] = {**SAID, "max_tokens": 3}


def part(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


INVALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [1] * N}),
    ("/v1/chat/completions", part([1] * N)),
    ("/v1/chat/completions", {**SAID, "tools": [1] * N}),
    ("/v1/chat/completions", {**SAID, "stop": [1] * N}),
    ("/v1/chat/completions", {**SAID, "logit_bias": {f"x{i}": "y" for i in range(N)}}),
    ("/v1/chat/completions", {**SAID, "logit_bias": {str(i): "y" for i in range(N)}}),
    ("/v1/completions", {"prompt": ["a", 1] * N}),
    ("/v1/responses", {"input": [1] * N}),
    ("/v1/responses", {"input": [{"role": "user", "content": [1] * N}]}),
    ("/v1/messages", {"max_tokens": 3, "messages": [1] * N}),
    ("/v1/messages", {"max_tokens": 3, **part([1] * N)}),
    ("/v1/messages", {**KEPT, "system": [1] * N}),
    ("/api/chat", {"messages": [1] * N}),
    ("/api/chat", {**SAID, "options": {"stop": [1] * N}}),
    ("/api/embed", {"input": [1] * N}),
    ("/v1/embeddings", {"input": ["a", {}] * 9000}),
    ("/api/copy", {f"k{i}": 1 for i in range(N)}),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(FakeEngine(), strict=True) as made:
        yield made


@pytest.mark.parametrize("path, fields", INVALID)
def test_of_many_invalid_items_the_first_are_told(url, path, fields):
    answer = httpx.post(url + path, json={"model": MODEL, **fields}, timeout=20)
    error = answer.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert answer.status_code == 400
    assert len(message) < 2000 and message.count(";") < 5


def test_unknown_fields_are_told_in_part(url):
    fields = {f"k{i}": 1 for i in range(N)}
    answer = httpx.post(url + "/v1/chat/completions", json={"model": MODEL, **SAID, **fields})
    assert answer.status_code == 400 and len(answer.content) < 1000


def subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for each in model.__subclasses__():
        yield each
        yield from subclasses(each)


def lists_in(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield schema
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for each in schema:
            yield from lists_in(each)


def test_all_lists_of_all_requests_end_at_their_first_invalid_item(url):
    models = {each for each in subclasses(BaseModel) if each.__module__.startswith("mlxkv.server")}
    found = [each for model in models for each in lists_in(model.__pydantic_core_schema__)]
    assert len(found) > 30 and all(each.get("fail_fast") for each in found)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"{}," * MAX_CONTAINERS + b"1]",
        b"[" + b"[]," * MAX_CONTAINERS + b"1]",
        b"[" + b'"",' * (MAX_STRINGS + 1) + b"1]",
        b"[" + b"1," * (1 << 21) + b"1]",
        b'{"a":' * (MAX_CONTAINERS + 1),
    ],
)
def test_more_values_than_any_request_needs_are_refused_before_they_are_parsed(url, body):
    answer = httpx.post(url + "/v1/chat/completions", content=body, timeout=20)
    assert answer.status_code == 413 and "more than" in answer.json()["error"]["message"]


def test_what_is_within_a_text_is_not_counted():
    text = '{"[,\\' * (MAX_CONTAINERS + 1)
    assert parse_json(json.dumps([text, "b"]).encode()) == [text, "b"]


def test_a_conversation_has_a_bound_of_messages(url):
    messages = SAID["messages"] * (MAX_ITEMS + 1)
    answer = httpx.post(url + "/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert answer.status_code == 400 and "at most 10000" in answer.json()["error"]["message"]


def test_a_long_list_of_token_ids_is_a_prompt(url):
    body = {"model": MODEL, "prompt": [7] * 300_000}
    assert httpx.post(url + "/v1/completions", json=body, timeout=20).status_code == 200
