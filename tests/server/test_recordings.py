"""First requests and second turns of real programs (`support/recordings`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mlxkv.engine.engine import ThreadedEngine
from tests.support import recordings
from tests.support.command_line import chat_model
from tests.support.fake_engine import MODEL, FakeEngine, serving
from tests.support.paths import ROOT
from tests.support.recordings import Recording

IGNORED = {
    "claude_code": {
        "context_management", "messages.content.cache_control", "system.cache_control", "metadata",
        "system.x-anthropic-billing-header",
    },
    "codex": {"tools.web_search", "prompt_cache_key", "client_metadata", "reasoning.summary"},
    "codex_oss": {"tools.web_search", "prompt_cache_key", "client_metadata", "reasoning.summary"},
    "open_webui_ollama": {"messages.tool_calls.index"},
    "pi": {"store"},
    "vercel_anthropic": {"tools.eager_input_streaming"},
    "vercel_ollama": {"max_output_tokens"},
}  # fmt: skip
NO_TEXT_BESIDE_CALLS = {"open_webui_ollama"}
"""Programs that send an answer with calls back without its text."""
ENDS = {
    "/v1/messages": '"type":"message_stop"',
    "/v1/responses": '"type":"response.completed"',
    "/v1/chat/completions": "data: [DONE]",
    "/api/chat": '"done":true',
}
ROLES = {
    "claude_code": "system user system assistant tool assistant user assistant tool",
    "codex": "system system user user assistant tool assistant user assistant tool",
}


@pytest.fixture(scope="module")
def fake() -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine()
    with serving(engine) as url:
        yield engine, url


@pytest.fixture(params=recordings.names())
def recording(request) -> Recording:
    return recordings.read(request.param)


def test_each_request_is_answered_and_what_changes_nothing_is_named(fake, recording):
    _, url = fake
    named: set[str] = set()
    for body in recording.requests:
        response = httpx.post(url + recording.path, json=body, headers=recording.headers)
        assert response.status_code == 200, response.text
        named |= set(filter(None, response.headers.get("mlxkv-ignored", "").split(", ")))
        end = ENDS[recording.path.partition("?")[0]]
        if body.get("stream"):
            assert end in response.text.replace('": ', '":')
        else:
            assert "Hello world" in response.text
    assert named == IGNORED.get(recording.name, set())


def test_no_text_of_a_request_is_lost_or_moved(fake, recording):
    engine, url = fake
    for body in recording.requests:
        httpx.post(url + recording.path, json=body).raise_for_status()
        sent = recordings.marks(recordings.conversation(body))
        assert recordings.marks(engine.last.request.prompt) == sent


def test_calls_of_two_turns_and_their_results_reach_the_template(fake, recording):
    engine, url = fake
    httpx.post(url + recording.path, json=recording.requests[-1]).raise_for_status()
    messages: Any = engine.last.request.prompt
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    results = [message for message in messages if message["role"] == "tool"]
    assert len(calls) == len(results) == 2
    for call, result in zip(calls, results, strict=True):
        assert (result["tool_call_id"], result["name"]) == (call["id"], call["function"]["name"])
        assert isinstance(call["function"]["arguments"], dict)
        assert result["content"]
    told = {tool["function"]["name"] for tool in engine.last.request.tools or ()}
    assert {call["function"]["name"] for call in calls} <= told
    answers = [each["content"] for each in messages if each["role"] == "assistant"]
    beside = "" if recording.name in NO_TEXT_BESIDE_CALLS else "I will look."
    assert answers[-3:] == [beside, "All done: the tool said hello.", beside]


@pytest.mark.parametrize("name", ROLES)
def test_roles_are_those_that_were_sent(fake, name):
    engine, url = fake
    recording = recordings.read(name)
    httpx.post(url + recording.path, json=recording.requests[-1]).raise_for_status()
    assert " ".join(each["role"] for each in engine.last.request.prompt) == ROLES[name]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[str]:
    """A server with a tiny model whose template knows tools."""
    folder = tmp_path_factory.mktemp("models")
    template = (ROOT / "tests" / "support" / "chat_templates" / "tools.jinja").read_text()
    chat_model(folder / MODEL, template=template, max_position_embeddings=1 << 16)
    engine = ThreadedEngine(dtype="float32")
    engine.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXKV_MODELS", str(folder))
        with serving(engine) as url:
            yield url
    engine.close()


@pytest.mark.parametrize("name", ["claude_code", "codex", "opencode", "vercel_ollama"])
def test_a_result_costs_no_prefix_of_a_real_model(real, name):
    recording = recordings.read(name)
    found = []
    for body in recording.shrunk(100)[:2]:
        body = {key: value for key, value in body.items() if key != "stream_options"}
        short = {"options": {"num_predict": 4}} if name == "vercel_ollama" else {}
        limit = "max_output_tokens" if recording.is_responses else "max_tokens"
        body |= {"stream": False, **(short or {limit: 4})}
        response = httpx.post(real + recording.path, json=body, timeout=120)
        assert response.status_code == 200, response.text
        found.append(tokens(response.json()))
    (n_first, _), (n_second, n_restored) = found
    assert n_second > n_first > 400 and n_restored > n_first - 256


def tokens(answer: dict[str, Any]) -> tuple[int, int]:
    """An answer's tokens of the prompt, and those that were restored."""
    usage = answer.get("usage", answer)
    if "cache_read_input_tokens" in usage:
        restored = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + restored, restored
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
    if "prompt_tokens" in usage:
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    cache = answer["prompt_cache"]
    return cache["prompt_tokens"], cache["prompt_tokens"] - cache["computed_tokens"]


def test_recordings_hold_no_text_of_the_programs():
    allowed = {"Run a command.", "Run it.", "I will look.", "All done: the tool said hello."}
    for name in recordings.names():
        text = (recordings.FOLDER / f"{name}.json").read_text()
        found = {
            each
            for each in recordings.strings(json.loads(text)["requests"])
            if each.count(" ") > 1 and "{{words" not in each
        }
        known = {each for each in found if each.startswith(("x-anthropic-billing-header:", "{"))}
        assert found - known <= allowed, name
