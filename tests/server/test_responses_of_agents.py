"""What coding agents send to /v1/responses: tools in namespaces, custom tools, items of an hour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mlxkv.errors import UsageError
from mlxkv.generation.outputs import Chunk
from mlxkv.parsers.events import ToolCall
from mlxkv.server.openai.response_items import MessageItem
from mlxkv.server.openai.response_store import KEEP_S, ResponseStore
from tests.support.fake_engine import MODEL, FakeEngine, says, serving, stats
from tests.support.openai_server import OpenAIServer

EMPTY: Any = {"type": "object", "properties": {}}
SHELL: Any = {"type": "function", "name": "exec_command", "description": "x", "parameters": EMPTY}
PATCH: Any = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edit files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'},
}
AGENTS: Any = {
    "type": "namespace",
    "name": "agents",
    "description": "x",
    "tools": [{"type": "function", "name": "close", "parameters": EMPTY}, PATCH],
}
SEARCH: Any = {"type": "web_search", "external_web_access": False}
KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer.running() as made:
        yield made


def post(server: OpenAIServer, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/responses", json={"model": MODEL, "input": "hi", **body})


def calls(*made: ToolCall) -> Any:
    return lambda ask: [Chunk("", None, "stop", stats(), tool_calls=made)]


def test_each_tool_is_a_function_and_what_a_server_runs_is_named(server):
    response = post(server, tools=[SHELL, PATCH, AGENTS, SEARCH, {"type": "local_shell"}])
    assert response.status_code == 200, response.text
    assert response.headers["mlxkv-ignored"] == "tools.web_search, tools.local_shell"
    told = {tool["function"]["name"]: tool["function"] for tool in server.engine.last.request.tools}
    assert list(told) == ["exec_command", "apply_patch", "agents__close", "agents__apply_patch"]
    assert told["apply_patch"]["parameters"]["required"] == ["input"]
    assert 'start: "a"' in told["apply_patch"]["description"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_comes_out_under_the_apis_names(server, stream):
    server.engine.script = calls(
        ToolCall("", "agents__close", {"a": 1}, "c1"),
        ToolCall("", "apply_patch", {"input": "*** Begin"}, "c2"),
        ToolCall("", "unknown", {}, "c3"),
    )
    made = server.client.responses.create(
        model=MODEL, input="hi", tools=[AGENTS, PATCH], stream=stream
    )
    events: list[Any] = list(made) if stream else []
    output = [item.model_dump() for item in (events[-1].response if stream else made).output]
    found = [(item["type"], item["name"], item.get("namespace")) for item in output]
    assert found == [
        ("function_call", "close", "agents"),
        ("custom_tool_call", "apply_patch", None),
        ("function_call", "unknown", None),
    ]
    assert output[1]["input"] == "*** Begin"
    if stream:
        kinds = [event.type for event in events]
        assert "response.custom_tool_call_input.delta" in kinds
        assert "response.custom_tool_call_input.done" in kinds


def test_the_history_of_an_agent_comes_back_as_calls_and_results(server):
    server.engine.script = says("ok")
    picture = {"type": "input_image", "image_url": "data:image/png;base64,aGk="}
    named = {"name": "close", "namespace": "agents"}
    items = [
        {"role": "user", "content": "go"},
        {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "1", **named, "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": [picture]},
        {"type": "custom_tool_call", "call_id": "2", "name": "apply_patch", "input": "p"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "done"},
        {"type": "local_shell_call", "call_id": "3", "action": {"command": ["ls"]}},
        {"type": "local_shell_call_output", "call_id": "3", "output": "a.py"},
        {"type": "web_search_call", "id": "ws", "status": "completed"},
        {"type": "compaction", "encrypted_content": "x"},
        {"role": "user", "content": "on"},
    ]  # fmt: skip
    response = post(server, input=items)
    assert response.status_code == 200, response.text
    assert response.headers["mlxkv-ignored"] == (
        "input.web_search_call, input.compaction, input.output.input_image"
    )
    prompt = server.engine.last.request.prompt
    made = [call["function"] for m in prompt for call in m.get("tool_calls", ())]
    assert [(call["name"], call["arguments"]) for call in made] == [
        ("agents__close", {}),
        ("apply_patch", {"input": "p"}),
        ("local_shell", {"command": ["ls"]}),
    ]
    results = [(m["name"], m["content"]) for m in prompt if m["role"] == "tool"]
    assert results[1:] == [("apply_patch", "done"), ("local_shell", "a.py")]
    assert "reads text only" in results[0][1]


def test_wishes_of_codex_are_taken(server):
    response = post(
        server,
        text={"verbosity": "low"},
        reasoning={"effort": "medium", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        client_metadata={"x": "0"},
        store=False,
    )
    assert response.status_code == 200, response.text
    assert response.json()["store"] is False


def test_a_conversation_goes_on_from_a_stored_response(server):
    server.engine.script = says("Hello")
    first = post(server, input="one", instructions="be brief").json()
    second = post(server, input="two", previous_response_id=first["id"]).json()
    assert second["previous_response_id"] == first["id"]
    assert server.engine.last.request.prompt == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "two"},
    ]
    post(server, input="three", previous_response_id=second["id"])
    assert [m["content"] for m in server.engine.last.request.prompt] == [
        "one", "Hello", "two", "Hello", "three",
    ]  # fmt: skip


def test_a_reference_stands_for_its_item(server):
    server.engine.script = says("Hello")
    first = post(server, input="one").json()
    items = [
        {"role": "user", "content": "one"},
        {"type": "item_reference", "id": first["output"][0]["id"]},
        {"id": first["output"][0]["id"]},
        {"role": "user", "content": "two"},
    ]
    assert post(server, input=items).status_code == 200
    contents = [m["content"] for m in server.engine.last.request.prompt]
    assert contents == ["one", "Hello", "Hello", "two"]


def test_a_begun_answer_is_kept_with_what_followed_and_named_without_it(server):
    begun = {"role": "assistant", "content": "The sum "}
    server.engine.script = says("is 4.")
    made = post(server, input=[{"role": "user", "content": "2 + 2?"}, begun]).json()
    assert server.engine.last.request.go_on
    post(server, previous_response_id=made["id"], input="Sure?")
    texts = [message["content"] for message in server.engine.last.request.prompt]
    assert texts == ["2 + 2?", "The sum is 4.", "Sure?"]
    named = {"type": "item_reference", "id": made["output"][0]["id"]}
    post(server, input=[named, {"role": "user", "content": "Sure?"}])
    assert server.engine.last.request.prompt[0]["content"] == "is 4."


def test_begun_reasoning_is_kept_with_what_followed(server):
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "two and "}]}
    server.engine.script = lambda ask: [
        Chunk("", 1, reasoning="two"), Chunk("4", 2), Chunk("", None, "stop", stats())
    ]  # fmt: skip
    made = post(server, input=[{"role": "user", "content": "2 + 2?"}, thought]).json()
    assert server.engine.last.request.go_on
    post(server, previous_response_id=made["id"], input="Sure?")
    turn = server.engine.last.request.prompt[1]
    assert (turn["reasoning_content"], turn["content"]) == ("two and two", "4")


def test_a_call_at_the_end_is_not_gone_on_from(server):
    call = {"type": "function_call", "call_id": "call00001", "name": "weather", "arguments": "{}"}
    answer = {"role": "assistant", "content": "I look."}
    post(server, input=[{"role": "user", "content": "hi"}, answer, call])
    assert not server.engine.last.request.go_on


def test_a_stored_response_can_be_read_and_forgotten(server):
    made = server.client.responses.create(model=MODEL, input="hi")
    assert server.client.responses.retrieve(made.id).output_text == made.output_text
    server.client.responses.delete(made.id)
    assert httpx.get(f"{server.url}/v1/responses/{made.id}").status_code == 404
    assert httpx.delete(f"{server.url}/v1/responses/{made.id}").status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {"previous_response_id": "resp_none"},
        {"input": [{"type": "item_reference", "id": "msg_none"}, {"role": "user", "content": "x"}]},
    ],
)
def test_what_is_not_stored_is_refused(server, body):
    response = post(server, **body)
    assert response.status_code == 400 and "not known" in response.json()["error"]["message"]


def test_what_is_not_to_be_stored_is_not(server):
    made = post(server, store=False).json()
    assert post(server, previous_response_id=made["id"]).status_code == 400


def test_a_response_is_its_owners_alone():
    with serving(FakeEngine(), api_keys=KEYS) as url:
        first, second = ({"x-api-key": key} for key in KEYS)
        body = {"model": MODEL, "input": "hi"}
        made = httpx.post(f"{url}/v1/responses", json=body, headers=first).json()
        assert httpx.get(f"{url}/v1/responses/{made['id']}", headers=first).status_code == 200
        assert httpx.get(f"{url}/v1/responses/{made['id']}", headers=second).status_code == 404
        again = {**body, "previous_response_id": made["id"]}
        told = httpx.post(f"{url}/v1/responses", json=again, headers=second)
        assert told.status_code == 400


def item(text: str) -> MessageItem:
    return MessageItem(role="user", content=text)


def response(name: str) -> dict[str, Any]:
    return {"id": name, "output": []}


def test_a_response_is_forgotten_after_an_hour():
    now = [0.0]
    store = ResponseStore(clock=lambda: now[0])
    store.put("", [item("a")], response("r1"))
    now[0] = KEEP_S - 1
    assert store.get("", "r1") is not None
    now[0] = KEEP_S
    assert store.get("", "r1") is None
    with pytest.raises(UsageError, match="not known"):
        store.conversation("", "r1", "x")


def test_no_owner_makes_responses_of_another_go():
    store = ResponseStore(max_bytes=2500)
    store.put("a", [item("x" * 900)], response("first"))
    for i in range(3):
        store.put("b", [item("x" * 600)], response(f"r{i}"))
    assert store.get("a", "first") is not None
    assert [store.get("b", f"r{i}") is not None for i in range(3)] == [False, True, True]


def test_the_oldest_responses_go_where_there_is_no_room():
    store = ResponseStore(max_bytes=2500)
    for i in range(5):
        store.put("", [item("x" * 900)], response(f"r{i}"))
    assert [store.get("", f"r{i}") is not None for i in range(5)] == [False] * 3 + [True] * 2
    store.put("", [item("x" * 9000)], response("large"))
    assert store.get("", "large") is None
