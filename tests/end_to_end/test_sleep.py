"""Answers go on after their server was stopped, or killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.command_line import chat_model, environment
from tests.support.server_process import Server

MODEL = "tiny"
MESSAGES = [{"role": "user", "content": "hello there"}]
SAMPLING = {"temperature": 0, "ignore_eos": True}
"""Each token of this model leads by 0.001 and more: batches and chunks do not change it."""
CHAT = {"model": MODEL, "messages": MESSAGES, "max_tokens": 320, "stream": True, **SAMPLING}
RESPONSE = {"model": MODEL, "input": "hello", "max_output_tokens": 320, "stream": True, **SAMPLING}
RESPONSE["background"] = True


@pytest.fixture
def env(tmp_path) -> dict[str, str]:
    chat_model(tmp_path / "models" / MODEL, max_position_embeddings=2048, ascii=True)
    return environment(tmp_path, MLXKV_KV=str(tmp_path / "kv"), MLXKV_KV_DISK="1GiB")


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def post(server: Server, path: str, body: Any, n: int | None = None) -> list[dict[str, Any]]:
    """The events of a stream, or its first `n`."""
    found: list[dict[str, Any]] = []
    with httpx.stream("POST", server.url + path, json=body, timeout=60) as response:
        for event in events(response):
            found.append(event)
            if len(found) == n:
                break
    return found


def text_of(chunks: list[dict[str, Any]]) -> str:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk.get("choices")]
    return "".join(delta.get("content") or "" for delta in deltas)


def stopped_in(server: Server, path: str, body: Any, n: int, number: int) -> list[dict[str, Any]]:
    """The events of a stream whose server gets a signal behind the n-th of them."""
    found: list[dict[str, Any]] = []
    with httpx.stream("POST", server.url + path, json=body, timeout=60) as response:
        try:
            for event in events(response):
                found.append(event)
                if len(found) == n:
                    server.process.send_signal(number)
        except httpx.HTTPError:
            assert number == signal.SIGKILL
    server.wait()
    return found


def plain(event: Any) -> Any:
    """An event without what differs from one response to another."""
    if isinstance(event, dict):
        differs = ("id", "item_id", "created_at", "usage")
        return {k: plain(v) for k, v in event.items() if k not in differs}
    return [plain(each) for each in event] if isinstance(event, list) else event


def test_a_stopped_and_a_killed_server_lose_nothing_that_was_kept(env):
    env = {**env, "MLXKV_DRAFT": "off"}  # with drafts the response may have ended before the stop
    first = Server(env)
    whole = text_of(post(first, "/v1/chat/completions", {**CHAT, "user": "another request"}))
    whole_events = post(first, "/v1/responses", RESPONSE)
    response = post(first, "/v1/responses", RESPONSE, 20)  # its client goes, and it goes on
    *begun, last = stopped_in(first, "/v1/chat/completions", CHAT, 40, signal.SIGTERM)
    assert "send the same request again" in last["error"]["message"]
    assert whole.startswith(text_of(begun)) and len(text_of(begun)) < len(whole)

    second = Server(env)  # the response goes on by itself
    assert httpx.get(f"{second.url}/stats.json").json()["asleep"][MODEL] >= 1
    response_id, n = response[0]["response"]["id"], response[-1]["sequence_number"]
    url = f"{second.url}/v1/responses/{response_id}"
    with httpx.stream("GET", url, params={"stream": True, "starting_after": n}, timeout=60) as got:
        rest = list(events(got))
    found = response + rest
    assert [event["sequence_number"] for event in found] == list(range(len(whole_events)))
    assert plain(found) == plain(whole_events)
    assert {x["item_id"] for x in found if "item_id" in x} == {response[2]["item"]["id"]}
    assert httpx.get(url).json() == rest[-1]["response"]
    begun = stopped_in(second, "/v1/chat/completions", CHAT, 280, signal.SIGKILL)
    assert whole.startswith(text_of(begun))
    (file,) = Path(env["MLXKV_KV"]).glob("asleep/*/*.jsonl")
    assert file.stat().st_mode & 0o777 == 0o600

    third = Server(env)
    assert text_of(post(third, "/v1/chat/completions", CHAT)) == whole
    assert not list(Path(env["MLXKV_KV"]).glob("asleep/*/*.jsonl"))
    assert third.stop() == 0
