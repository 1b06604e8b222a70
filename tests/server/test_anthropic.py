"""Anthropic's Messages API, driven by Anthropic's own client over loopback."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pydantic
import pytest

from mlxkv.engine.messages import Busy
from mlxkv.errors import CheckpointError, ContextExceeded, KVCacheFull, OutOfMemory, TemplateError
from mlxkv.generation.outputs import Chunk, Miss
from mlxkv.parsers.events import ToolCall
from tests.support.connections import left
from tests.support.fake_engine import MODEL, FakeEngine, options_of, says, serving, stats
from tests.support.fake_engine_ollama import STORED, address, engine, made_model, models, server

__all__ = ["address", "engine", "made_model", "models", "server"]

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"name": "weather", "description": "Of a city", "input_schema": SCHEMA}
TIME: Any = {"name": "time", "input_schema": {"type": "object", "properties": {}}}
CALL = ToolCall("<call>", "weather", {"city": "Bern"}, "abcdefghi")
AS_FUNCTION = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city", "parameters": SCHEMA},
}


@pytest.fixture
def client(address) -> Iterator[anthropic.Anthropic]:
    options: dict[str, Any] = {"base_url": address, "api_key": "none", "max_retries": 0}
    with anthropic.Anthropic(**options, timeout=10) as found:
        yield found


def create(client: anthropic.Anthropic, **fields: Any) -> anthropic.types.Message:
    given = {"model": MODEL, "max_tokens": 100, "messages": HELLO, **fields}
    return client.messages.create(**given)


def post(address: str, path: str = "", **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": HELLO, **({} if path else {"max_tokens": 100}), **fields}
    return httpx.post(f"{address}/v1/messages{path}", json=body, timeout=10)


def refused(address: str, **fields: Any) -> str:
    """The message of a request that gets status 400."""
    response = post(address, **fields)
    assert response.status_code == 400, response.text
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    return body["error"]["message"]


def events(address: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; each has its type twice."""
    response = post(address, stream=True, **fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for each in response.text.split("\n\n")[:-1]:
        name, data = each.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def prompt_of(address: str, engine: FakeEngine, *messages: Any, **fields: Any) -> Any:
    """What the engine was asked."""
    response = post(address, messages=list(messages), **fields)
    assert response.status_code == 200, response.text
    return engine.last.request.prompt


# Answers


def test_a_message_is_answered(client, engine):
    message = create(client)
    assert (message.role, message.model, message.type) == ("assistant", MODEL, "message")
    assert [(block.type, block.text) for block in message.content] == [("text", "Hello world")]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id.startswith("msg-")
    assert engine.last.request.prompt == HELLO
    assert options_of(engine.last) == {"max_tokens": 100}


def test_usage_tells_computed_tokens_from_restored_ones(client, engine):
    engine.script = says("Hi", stats=stats(miss=Miss("diverged", 6, "a|b", "a|c", 3, 0.1)))
    usage = create(client).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (4, 6)
    assert (usage.cache_creation_input_tokens, usage.output_tokens) == (0, 3)
    assert usage.prompt_cache["restored_ssd_tokens"] == 2
    assert usage.prompt_cache["miss"]["reason"] == "diverged"


def test_a_stream_has_its_events_in_order(address):
    found = events(address)
    assert [each["type"] for each in found] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start, delta = found[0]["message"], found[-2]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"] == {"input_tokens": 10, "output_tokens": 0}
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert (delta["usage"]["input_tokens"], delta["usage"]["cache_read_input_tokens"]) == (4, 6)


def test_a_stream_has_its_prompt_encoded_once(address, engine, monkeypatch):
    monkeypatch.setattr(engine, "tokenize", lambda ask: pytest.fail("encoded again"))
    assert events(address)[0]["message"]["usage"]["input_tokens"] == 10


def test_a_stream_builds_the_same_message(client):
    given: Any = {"model": MODEL, "max_tokens": 100, "messages": HELLO}
    with client.messages.stream(**given) as stream:
        assert list(stream.text_stream) == ["Hello", " world"]
        message = stream.get_final_message()
    whole = create(client)
    assert message.content[0].text == whole.content[0].text
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == whole.usage.output_tokens == 2
    assert message.usage.input_tokens == whole.usage.input_tokens == 4
    assert message.usage.cache_read_input_tokens == 6


def test_sampling_becomes_the_engines(client, engine):
    # Newer models of Anthropic's take none; the client has no name for these any more.
    more = {"temperature": 0.5, "top_p": 0.9, "top_k": 40}
    create(client, extra_body=more, stop_sequences=["END"], metadata={"user_id": "u"})
    assert options_of(engine.last) == {"max_tokens": 100, "stop": ["END"], **more}


def test_the_stop_sequence_that_ended_the_answer_is_named(client, engine, address):
    engine.script = says("Hi", stopped_by="END")
    message = create(client, stop_sequences=["X", "END"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")
    delta = events(address, stop_sequences=["END"])[-2]["delta"]
    assert delta == {"stop_reason": "stop_sequence", "stop_sequence": "END"}


@pytest.mark.parametrize(
    ("reason", "n", "expected"),
    [
        ("length", 100, "max_tokens"),
        ("length", 60, "model_context_window_exceeded"),
        ("memory", 60, "model_context_window_exceeded"),
    ],
)
def test_an_answer_that_was_cut_says_why(client, engine, reason, n, expected):
    error = KVCacheFull(1, 2, 3) if reason == "memory" else None
    engine.script = says("Hi", reason=reason, error=error, stats=stats(generated_tokens=n))
    message = create(client)
    assert message.stop_reason == expected
    assert (message.stop_details is not None) == (reason == "memory")


def test_a_silent_answer_has_no_blocks(client, address, engine):
    engine.script = says()
    assert create(client).content == []
    assert [each["type"] for each in events(address)] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]


# Thinking


def thinks(ask: Any) -> list[Any]:
    return [
        Chunk("", 1, reasoning="Hm"),
        Chunk("", 2, reasoning="."),
        Chunk("Yes", 3),
        Chunk("", None, "stop", stats()),
    ]


def test_thinking_is_a_block_of_its_own(client, engine):
    engine.script = thinks
    how: Any = {"type": "enabled", "budget_tokens": 1024}
    message = create(client, thinking=how, max_tokens=2000)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[0].thinking, message.content[1].text) == ("Hm.", "Yes")
    assert options_of(engine.last)["think"] is True
    given: Any = {"model": MODEL, "max_tokens": 2000, "messages": HELLO, "thinking": how}
    with client.messages.stream(**given) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text"]
    assert streamed.content[0].thinking == "Hm."


@pytest.mark.parametrize(
    ("fields", "think"),
    [
        ({}, None),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "low"),
        ({"output_config": {"effort": "high"}}, "high"),
    ],
)
def test_how_much_to_think_is_as_asked(client, engine, fields, think):
    create(client, **fields)
    assert options_of(engine.last).get("think") == think


def test_thinking_is_left_out_where_nobody_wants_to_see_it(client, engine):
    engine.script = thinks
    message = create(client, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in message.content] == ["text"]


def test_thinking_must_leave_room_for_an_answer(address):
    how = {"type": "enabled", "budget_tokens": 4000}
    assert "max_tokens must be more" in refused(address, thinking=how)
    assert "budget_tokens" in refused(address, thinking={"type": "enabled", "budget_tokens": 10})


# Tools


def calls(*made: ToolCall) -> Any:
    return lambda ask: [
        Chunk("Let me look.", 1),
        *(Chunk("", 2, tool_calls=(call,)) for call in made),
        Chunk("", 3, "stop", stats()),
    ]


def test_a_call_is_a_block_and_the_reason_to_stop(client, engine):
    engine.script = calls(CALL)
    message = create(client, tools=[WEATHER])
    text, use = message.content
    assert (text.text, use.type, use.name, use.input) == (
        "Let me look.", "tool_use", "weather", {"city": "Bern"},
    )  # fmt: skip
    assert message.stop_reason == "tool_use"
    assert options_of(engine.last)["tools"] == [AS_FUNCTION]
    assert engine.last.request.format is None


def test_a_streamed_call_has_its_arguments_in_deltas(client, address, engine):
    engine.script = calls(CALL, ToolCall("", "weather", {"city": "Rom"}, "bbbbbbbbb"))
    found = events(address, tools=[WEATHER])
    assert [(each["type"], each.get("index")) for each in found[1:-2]] == [
        ("content_block_start", 0), ("content_block_delta", 0), ("content_block_stop", 0),
        ("content_block_start", 1), ("content_block_delta", 1), ("content_block_stop", 1),
        ("content_block_start", 2), ("content_block_delta", 2), ("content_block_stop", 2),
    ]  # fmt: skip
    assert found[4]["content_block"]["input"] == {}
    assert found[5]["delta"] == {"type": "input_json_delta", "partial_json": '{"city": "Bern"}'}
    given: Any = {"model": MODEL, "max_tokens": 100, "messages": HELLO, "tools": [WEATHER]}
    with client.messages.stream(**given) as stream:
        message = stream.get_final_message()
    assert [block.input for block in message.content[1:]] == [{"city": "Bern"}, {"city": "Rom"}]
    assert message.stop_reason == "tool_use"


def test_a_result_goes_back_with_its_call(client, engine):
    engine.script = calls(CALL)
    message = create(client, tools=[WEATHER])
    use: Any = message.content[1]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Rain"}
    said = {"type": "text", "text": "And now?"}
    turns = [*HELLO, {"role": "assistant", "content": message.content}]
    create(client, tools=[WEATHER], messages=[*turns, {"role": "user", "content": [result, said]}])
    function = {"name": "weather", "arguments": {"city": "Bern"}}
    assert engine.last.request.prompt == [
        *HELLO,
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "Rain"},
        {"role": "user", "content": "And now?"},
    ]


def test_a_failed_call_says_so_to_the_model(address, engine):
    use = {"type": "tool_use", "id": "x", "name": "weather", "input": {}}
    text = [{"type": "text", "text": "no"}, {"type": "text", "text": "network"}]
    result = {"type": "tool_result", "tool_use_id": "x", "is_error": True, "content": text}
    answered = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    assert prompt_of(address, engine, *HELLO, *answered)[-1] == {
        "role": "tool", "tool_call_id": "x", "name": "weather", "content": "Error: no\n\nnetwork",
    }  # fmt: skip


def test_a_result_of_no_call_is_refused(address):
    result = {"type": "tool_result", "tool_use_id": "nobody", "content": "x"}
    said = refused(address, messages=[{"role": "user", "content": [result]}])
    assert "messages.0.content.0: no earlier tool_use block has the id 'nobody'" in said


def test_without_parallel_calls_the_first_one_is_all(client, engine):
    engine.script = calls(CALL, CALL)
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    message = create(client, tools=[WEATHER], tool_choice=choice)
    assert [block.type for block in message.content] == ["text", "tool_use"]


def test_where_no_tool_may_be_called_the_prompt_lists_them_all_the_same(client, engine):
    create(client, tools=[WEATHER], tool_choice={"type": "none"})
    assert len(options_of(engine.last)["tools"]) == 1
    assert engine.last.request.callable == ()


def test_a_drafter_is_as_asked_and_one_of_those_there_are(address, engine):
    assert post(address, draft="off").status_code == 200
    assert engine.last.request.draft == "off"
    assert post(address, draft="/etc").status_code == 404  # a name, never a path


def test_chat_template_kwargs_are_variables_of_the_template(address, engine):
    assert post(address, chat_template_kwargs={"enable_thinking": False}).status_code == 200
    assert engine.last.request.template_options == {"enable_thinking": False}
    said = refused(address, chat_template_kwargs={"messages": []})
    assert "chat_template_kwargs cannot set messages" in said


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [({"type": "any"}, ["weather", "time"]), ({"type": "tool", "name": "time"}, ["time"])],
)
def test_a_call_that_has_to_come_is_a_grammar(client, engine, choice, allowed):
    create(client, tools=[WEATHER, TIME], tool_choice=choice)
    grammar = engine.last.request.format
    said = json.loads(grammar.text)
    is_any = choice["type"] == "any"  # a tool that is named is called once
    assert (grammar.kind, said["parallel"], said["content"]) == ("tools", is_any, None)
    assert [tool["name"] for tool in said["tools"]] == allowed
    # The prompt has all tools, whatever the choice, so that its prefix stays.
    assert [tool["function"]["name"] for tool in options_of(engine.last)["tools"]] == [
        "weather",
        "time",
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "names 'x'"),
        ({"tools": [WEATHER, WEATHER]}, "same name"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0"),
    ],
)
def test_choices_that_cannot_be_kept_to_are_refused(address, fields, words):
    assert words in refused(address, **fields)


def test_a_call_that_cannot_be_read_is_shown_as_text(client, engine):
    broken = ToolCall("<call>{", "weather", {}, "abcdefghi", "not JSON")
    engine.script = lambda ask: [Chunk("", 1, "length", stats(), tool_calls=(broken,))]
    (block,) = create(client, tools=[WEATHER]).content
    assert (block.type, block.text) == ("text", "<call>{")


# Formats


def test_an_answer_is_parsed_by_its_schema(client, engine):
    class City(pydantic.BaseModel):
        name: str

    engine.script = says('{"name": ', '"Bern"}')
    given: Any = {"model": MODEL, "max_tokens": 100, "messages": HELLO, "output_format": City}
    parsed = client.messages.parse(**given).parsed_output
    assert parsed == City(name="Bern")
    assert engine.last.request.format.kind == "json_schema"
    assert json.loads(engine.last.request.format.text)["required"] == ["name"]


# Conversations


def test_system_prompts_are_texts_or_blocks(address, engine):
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    blocks = [{"type": "text", "text": "Be brief", **mark}, {"type": "text", "text": "Be kind"}]
    for system, text in (("Be brief", "Be brief"), (blocks, "Be brief\n\nBe kind")):
        prompt = prompt_of(address, engine, *HELLO, system=system)
        assert prompt == [{"role": "system", "content": text}, *HELLO]


def test_messages_of_one_role_that_follow_each_other_are_one(address, engine):
    prompt = prompt_of(
        address,
        engine,
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}]},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    )
    assert prompt == [
        {"role": "user", "content": "a\n\nb\n\nc"},
        {"role": "assistant", "content": "d", "reasoning_content": "t"},
        {"role": "user", "content": "e"},
    ]


def test_a_begun_answer_is_gone_on_from(address, engine):
    begun = {"role": "assistant", "content": "The answer is "}
    assert prompt_of(address, engine, *HELLO, begun) == [*HELLO, begun]
    assert engine.last.request.go_on


def test_calls_without_results_are_refused(address):
    use = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
    calls = [*HELLO, {"role": "assistant", "content": [use]}]
    assert "tool_result" in refused(address, messages=calls)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("image", "messages.0.content.0.image: model 'fake' takes no pictures"),
        ("document", "messages.0.content.0.document.source: "),
    ],
)
def test_what_is_no_text_is_refused_by_name(address, kind, words):
    block = {"type": kind, "source": {"type": "base64", "data": "aGk="}}
    said = refused(address, messages=[{"role": "user", "content": [block]}])
    assert said.startswith(words)


def test_texts_in_documents_and_search_results_are_read(address, engine):
    document = {"source": {"type": "text", "media_type": "text/plain", "data": "It rains."}}
    found = {"source": "a.example", "content": [{"type": "text", "text": "It snows."}]}
    blocks = [
        {"type": "document", "title": "News", **document},
        {"type": "search_result", "title": "Other news", **found},
        {"type": "text", "text": "Well?"},
    ]
    assert post(address, messages=[{"role": "user", "content": blocks}]).status_code == 200
    content = "News\nIt rains.\n\nOther news\na.example\nIt snows.\n\nWell?"
    assert engine.last.request.prompt == [{"role": "user", "content": content}]


def test_tools_and_blocks_of_another_server_are_left_out_and_named(address, engine):
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    used = {"type": "server_tool_use", "id": "x", "name": "web_search", "input": {}}
    given = {"type": "web_search_tool_result", "tool_use_id": "x", "content": []}
    hidden = {"type": "redacted_thinking", "data": "abc"}
    answer = {
        "role": "assistant",
        "content": [hidden, used, given, {"type": "text", "text": "It is 5."}],
    }
    response = post(address, messages=[*HELLO, answer, *HELLO], tools=[search, WEATHER])
    assert response.status_code == 200, response.text
    assert response.headers["mlxkv-ignored"] == (
        "messages.content.redacted_thinking, messages.content.server_tool_use, "
        "messages.content.web_search_tool_result, tools.web_search_20250305"
    )
    request = engine.last.request
    assert [tool["function"]["name"] for tool in request.tools] == ["weather"]
    assert request.prompt[1] == {"role": "assistant", "content": "It is 5."}


def test_a_note_stands_for_a_picture_that_a_tool_gave(address, engine):
    picture = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": "x"},
    }
    use = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [picture]}
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    response = post(address, messages=[*HELLO, *turns])
    assert response.headers["mlxkv-ignored"] == "messages.content.content.image"
    assert "reads text only" in engine.last.request.prompt[-1]["content"]


@pytest.mark.parametrize(
    ("effort", "think"), [("low", "low"), ("high", "high"), ("xhigh", "high"), ("max", "high")]
)
def test_effort_is_how_much_the_model_thinks(address, engine, effort, think):
    assert post(address, output_config={"effort": effort}).status_code == 200
    assert engine.last.request.think == think


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_client_may_see_whether_the_server_is_there(address, method):
    assert httpx.request(method, f"{address}/api/hello").status_code == 200


def test_a_block_has_its_place(address):
    use = {"type": "tool_use", "id": "x", "name": "weather", "input": {}}
    said = refused(address, messages=[{"role": "user", "content": [use]}])
    assert "messages.0.content.0: tool_use is not allowed in a user message" in said


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"cache_control": {"type": "eternal"}}, "cache_control"),
    ],
)
def test_requests_that_cannot_be_kept_to_are_refused(address, fields, words):
    assert words in refused(address, **fields)


# Counting


def test_tokens_are_counted_by_the_engine(client, engine, monkeypatch):
    asked = []

    async def tokenize(ask):
        asked.append(ask)
        return [1, 2, 3]

    monkeypatch.setattr(engine, "tokenize", tokenize)
    counted = client.messages.count_tokens(
        model=MODEL, messages=HELLO, system="Be brief", tools=[WEATHER]
    )
    assert counted.input_tokens == 3
    assert asked[0].request.prompt == [{"role": "system", "content": "Be brief"}, *HELLO]
    assert options_of(asked[0]) == {"tools": [AS_FUNCTION]}


def test_what_cannot_be_asked_cannot_be_counted(address):
    assert post(address, "/count_tokens", tools=1).status_code == 400
    assert post(address, "/count_tokens", model="nobody").status_code == 404


# Names and errors


def test_a_stored_model_is_found_with_latest_or_without(client, engine):
    engine.models.add(STORED)
    assert create(client, model=STORED).model == STORED
    assert create(client, model=f"{MODEL}:latest").model == f"{MODEL}:latest"
    assert [ask.model for ask in engine.asks] == [STORED, MODEL]


@pytest.mark.parametrize("name", ["claude-opus", "../models/tiny-1k", "/etc", "x.gguf", "org/x"])
def test_a_model_that_is_not_here_is_not_found(client, engine, models, monkeypatch, name):
    monkeypatch.chdir(models.parent)
    with pytest.raises(anthropic.NotFoundError, match="not found") as caught:
        create(client, model=name)
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert engine.asks == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ContextExceeded(5000, 4096), 400, "invalid_request_error"),
        (TemplateError("no template"), 422, "invalid_request_error"),
        (OutOfMemory("too little"), 503, "overloaded_error"),
        (RuntimeError("secret"), 500, "api_error"),
    ],
)
def test_an_error_before_the_first_token_has_its_own_status(
    client, engine, stream, error, status, kind
):
    engine.script = lambda ask: [error]
    with pytest.raises(anthropic.APIStatusError) as caught:
        create(client, stream=stream)
    assert caught.value.status_code == status
    assert caught.value.body["error"]["type"] == kind
    assert "secret" not in str(caught.value)


def test_an_error_after_that_is_the_last_event(client, address, engine):
    engine.script = lambda ask: [Chunk("Hel", 1), CheckpointError("weights are damaged")]
    assert events(address)[-1] == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "weights are damaged"},
    }
    with pytest.raises(anthropic.APIStatusError, match="weights are damaged"):
        list(create(client, stream=True))


def test_a_full_queue_is_an_overload_that_says_when_to_come_back(client, engine):
    engine.busy = Busy(2.5)
    with pytest.raises(anthropic.InternalServerError) as caught:
        create(client)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "3"


def test_a_key_is_asked_for_where_there_are_keys(models):
    with serving(FakeEngine(), api_keys=("right",)) as address:
        for key, works in (("right", True), ("wrong", False)):
            options: dict[str, Any] = {"base_url": address, "api_key": key, "max_retries": 0}
            with anthropic.Anthropic(**options) as client:
                if works:
                    create(client)
                    continue
                with pytest.raises(anthropic.AuthenticationError) as caught:
                    create(client)
                assert caught.value.body["error"]["type"] == "authentication_error"


def test_what_is_no_request_is_an_error_in_the_same_shape(address):
    bad = httpx.post(f"{address}/v1/messages", content=b'{"model": ')
    assert (bad.status_code, bad.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.get(f"{address}/v1/messages").json()["type"] == "error"
    assert httpx.get(f"{address}/v1/messages/nothing").json()["type"] == "error"


def test_a_server_bounds_the_length_of_answers(models):
    with serving(FakeEngine(), max_tokens=50) as address:
        assert "50 tokens" in refused(address)
        assert post(address, max_tokens=50).status_code == 200


# Clients that go


def test_a_client_that_leaves_a_stream_cancels_its_answer(client, engine):
    engine.script = lambda ask: [Chunk("Hel", 1), 30.0, Chunk("lo", 2, "stop", stats())]
    given: Any = {"model": MODEL, "max_tokens": 100, "messages": HELLO}
    with client.messages.stream(**given) as stream:
        assert next(iter(stream.text_stream)) == "Hel"
    assert engine.answers[0].cancelled.wait(10)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_before_the_answer_cancels_it(address, engine, stream):
    engine.script = lambda ask: [30.0, Chunk("lo", 2, "stop", stats())]
    body = {"model": MODEL, "max_tokens": 5, "messages": HELLO, "stream": stream}
    assert left(engine, address, "/v1/messages", body).cancelled.wait(10)


def test_a_silent_stream_shows_that_it_lives(models):
    engine = FakeEngine(lambda ask: [0.4, *says("Hi")(ask)])
    with serving(engine, first_s=0.05, ping_s=0.1) as address:
        started = time.monotonic()
        found = [each["type"] for each in events(address)]
        assert found[0] == "ping"
        assert found[found.index("message_start") :] == [
            "message_start", "content_block_start", "content_block_delta", "content_block_stop",
            "message_delta", "message_stop",
        ]  # fmt: skip
        options: dict[str, Any] = {"base_url": address, "api_key": "none"}
        with anthropic.Anthropic(**options) as client:
            kinds = [each.type for each in create(client, stream=True)]
        assert kinds[0] == "message_start"
        assert time.monotonic() - started < 5


def test_a_thread_that_goes_on_is_not_found_and_a_new_one_is_named(address):
    made = post(address, thread={"type": "create"})
    assert made.status_code == 200 and made.headers["mlxkv-ignored"] == "thread"
    gone = post(address, thread={"type": "continue", "previous_message_id": made.json()["id"]})
    assert gone.status_code == 404, gone.text
    error = gone.json()["error"]
    assert (error["type"], error["details"]) == (
        "not_found_error",
        {"error_code": "thread_not_found"},
    )
