"""Fields that change nothing are taken and named; a strict server refuses what it does not know."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.fake_engine import MODEL, FakeEngine, serving

HI = [{"role": "user", "content": "hi"}]
CHAT, MESSAGES, OLLAMA = "/v1/chat/completions", "/v1/messages", "/api/chat"
RESPONSES = "/v1/responses"
NEEDED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    MESSAGES: {"messages": HI, "max_tokens": 8},
    OLLAMA: {"messages": HI, "stream": False},
    RESPONSES: {"input": "hi"},
}
NESTED = [{"role": "user", "content": [{"type": "text", "text": "hi", "mark": 1}], "weight": 2}]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(FakeEngine()) as url:
        yield url


@pytest.fixture(scope="module")
def strict() -> Iterator[str]:
    with serving(FakeEngine(), strict=True) as url:
        yield url


def post(address: str, path: str, client: str = "test", **fields: Any) -> httpx.Response:
    body = {"model": MODEL, **NEEDED[path], **fields}
    return httpx.post(address + path, json=body, headers={"user-agent": client})


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        (CHAT, {"context_management": {}, "metadata2": {"a": 1}}, "context_management, metadata2"),
        (CHAT, {"messages": NESTED}, "messages.content.mark, messages.weight"),
        (CHAT, {"user": "me"}, "user"),
        (CHAT, {"stream": True, "unheard_of": 1}, "unheard_of"),
        (MESSAGES, {"context_management": {"edits": [{"type": "x"}]}}, "context_management"),
        (MESSAGES, {"messages": NESTED}, "messages.content.mark, messages.weight"),
        (RESPONSES, {"client_metadata": {"a": 1}}, "client_metadata"),
        (OLLAMA, {"options": {"num_gpu": 1, "top_q": 1}}, "options.top_q, options.num_gpu"),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_taken_and_named(address, path, fields, named):
    response = post(address, path, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["mlxkv-ignored"] == named


@pytest.mark.parametrize("path", NEEDED)
def test_a_request_without_such_fields_has_no_header(address, path):
    assert "mlxkv-ignored" not in post(address, path, unset=None).headers


def test_a_name_cannot_write_a_header_of_its_own(address):
    named = post(address, CHAT, **{"a\r\nset-cookie: x=1": 1, "ä": 2}).headers
    assert named["mlxkv-ignored"] == "a__set-cookie__x_1, _"
    assert "set-cookie" not in named


def test_many_names_are_counted_and_not_shown(address):
    named = post(address, CHAT, **{f"field{i}": i for i in range(40)}).headers["mlxkv-ignored"]
    assert named.endswith("field31, and_8_more")


def test_the_log_names_a_field_once_a_client(address, caplog):
    with caplog.at_level(logging.WARNING, "mlxkv.server.ignored"):
        for client in ("one", "one", "other"):
            post(address, CHAT, client=client, never_seen=1)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in said] == ["'one'", "'other'"]
    assert all("never_seen" in line for line in said)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"unheard_of": 1}, "unheard_of"),
        (MESSAGES, {"messages": NESTED}, "messages.content.mark"),
        (RESPONSES, {"client_metadata": {}}, "client_metadata"),
        (OLLAMA, {"options": {"top_q": 1}}, "options.top_q"),
    ],
)
def test_a_strict_server_refuses_them(strict, path, fields, param):
    response = post(strict, path, **fields)
    assert response.status_code == 400
    assert f"{param}: not supported" in response.text


def test_a_strict_server_meets_no_wish_in_part():
    requests = []
    for strictly in (False, True):
        engine = FakeEngine()
        with serving(engine, strict=strictly) as url:
            post(url, CHAT, reasoning_effort="high")
        requests.append(engine.last.request)
    assert [request.best_effort for request in requests] == [True, False]
