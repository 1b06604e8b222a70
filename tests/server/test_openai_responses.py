"""OpenAI's responses, through OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from mlxkv.errors import KVCacheFull, UsageError
from mlxkv.generation.outputs import Chunk
from mlxkv.parsers.events import ToolCall
from tests.support.fake_engine import MODEL, Script, logprobs, options_of, says, stats
from tests.support.openai_server import OpenAIServer

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "of a place",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": True,
}
ROME = ToolCall("<call>", "weather", {"place": "Rome"}, "call00001")
OSLO = ToolCall("", "weather", {"place": "Oslo"}, "call00002")
BROKEN = ToolCall("<call>{", "weather", {}, "call00003", "no closing brace")


def thinks_and_calls(ask: Any) -> list[Any]:
    return [
        Chunk("", 1, reasoning="let me "),
        Chunk("", 2, reasoning="see"),
        Chunk("I will", 3),
        Chunk(" look", 4),
        Chunk("", None, "stop", stats(), tool_calls=(ROME, OSLO)),
    ]


class Server(OpenAIServer):
    """With the requests of these tests."""

    def respond(self, script: Script | None = None, **options: Any) -> Any:
        self.engine.script = script or says("Hello", " world")
        return self.client.responses.create(**{"model": MODEL, "input": "hi", **options})

    def post(self, **body: Any) -> httpx.Response:
        self.engine.script = says("ok")
        return httpx.post(f"{self.url}/v1/responses", json={"model": MODEL, "input": "hi", **body})


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server.running() as made:
        yield made


def test_a_response_is_a_message_with_its_usage(server):
    answer = server.respond(instructions="be brief", max_output_tokens=9)
    assert (answer.status, answer.output_text, answer.store) == ("completed", "Hello world", True)
    assert answer.output[0].type == "message" and answer.output[0].status == "completed"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (10, 2)
    assert answer.usage.input_tokens_details.cached_tokens == 6
    assert answer.usage.input_tokens_details.restored_ssd_tokens == 2
    assert options_of(server.engine.last) == {"max_tokens": 9}
    assert server.engine.last.request.prompt == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]


def test_items_come_in_the_order_in_which_they_were_written(server):
    answer = server.respond(thinks_and_calls, tools=[TOOL])
    kinds = [item.type for item in answer.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert answer.output[0].content[0].text == "let me see"
    assert answer.output_text == "I will look"
    assert json.loads(answer.output[2].arguments) == {"place": "Rome"}
    assert answer.output[2].call_id == "call00001"
    assert answer.usage.output_tokens_details.reasoning_tokens == 2


def test_events_come_in_their_documented_order(server):
    events = list(server.respond(thinks_and_calls, tools=[TOOL], stream=True))
    part = ["content_part.added", "{}.delta", "{}.delta", "{}.done", "content_part.done"]
    call = ["output_item.added", "{0}.delta", "{0}.done", "output_item.done"]

    def item(name: str) -> list[str]:
        return ["output_item.added", *(p.format(name) for p in part), "output_item.done"]

    expected = [
        "created",
        "in_progress",
        *item("reasoning_text"),
        *item("output_text"),
        *(c.format("function_call_arguments") for c in call * 2),
        "completed",
    ]
    assert [event.type for event in events] == [f"response.{name}" for name in expected]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    assert [item.type for item in final.output][:2] == ["reasoning", "message"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in final.output]
    assert [e.output_index for e in events if e.type == "response.output_item.added"] == [
        0,
        1,
        2,
        3,
    ]


def test_the_clients_own_stream_helper_follows_them(server):
    server.engine.script = thinks_and_calls
    with server.client.responses.stream(model=MODEL, input="hi", tools=[TOOL]) as stream:
        final = stream.get_final_response()
    assert final.output_text == "I will look"


def test_what_came_can_be_sent_back(server):
    answer = server.respond(thinks_and_calls, tools=[TOOL])
    items = [item.model_dump(exclude_none=True) for item in answer.output]
    outputs = [
        {"type": "function_call_output", "call_id": ROME.id, "output": "sunny"},
        {
            "type": "function_call_output",
            "call_id": OSLO.id,
            "output": [{"type": "input_text", "text": "rain"}],
        },
    ]
    server.respond(input=[{"role": "user", "content": "hi"}, *items, *outputs])
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in (ROME, OSLO)
    ]
    assert server.engine.last.request.prompt == [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "I will look",
            "reasoning_content": "let me see",
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": ROME.id, "name": "weather", "content": "sunny"},
        {"role": "tool", "tool_call_id": OSLO.id, "name": "weather", "content": "rain"},
    ]


def test_two_turns_of_the_assistant_stay_two(server):
    turns = [{"role": "assistant", "content": t} for t in ("a", "b")]
    server.respond(input=[*turns, {"type": "message", "role": "developer", "content": "c"}])
    assert [m["content"] for m in server.engine.last.request.prompt] == ["a", "b", "c"]
    assert server.engine.last.request.prompt[2]["role"] == "system"


@pytest.mark.parametrize("reason, details", [("length", None), ("memory", "memory")])
def test_an_answer_that_was_cut_off_is_incomplete(server, reason, details):
    error = KVCacheFull(256, 512, 300) if details else None
    script = says("part", reason=reason, error=error)
    answer = server.respond(script)
    assert answer.status == "incomplete" and answer.output[0].status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert getattr(answer.incomplete_details, "type", None) == details
    assert list(server.respond(script, stream=True))[-1].type == "response.incomplete"


def test_an_error_in_the_middle_ends_the_stream_as_failed(server):
    events = list(server.respond(lambda ask: [Chunk("a", 1), UsageError("no more")], stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "no more"
    assert events[-1].sequence_number == len(events) - 1


def test_an_error_before_the_answer_has_its_status(server):
    with pytest.raises(openai.BadRequestError, match="not now"):
        server.respond(lambda ask: [UsageError("not now")], stream=True)


def test_a_call_that_cannot_be_read_is_shown_and_not_made(server):
    script = lambda ask: [Chunk("", None, "stop", stats(), tool_calls=(BROKEN,))]  # noqa: E731
    answer = server.respond(script, tools=[TOOL])
    assert [item.type for item in answer.output] == ["message"]
    assert answer.output_text == "<call>{"


def test_formats_are_grammars(server):
    class Person(BaseModel):
        name: str

    server.engine.script = says('{"name":', ' "Ada"}')
    answer = server.client.responses.parse(model=MODEL, input="hi", text_format=Person)
    assert answer.output_parsed == Person(name="Ada")
    assert json.loads(server.engine.last.request.format.text)["required"] == ["name"]
    for given, kind in (
        ({"type": "json_object"}, "json_object"),
        ({"type": "regex", "regex": "a"}, "regex"),
        ({"type": "grammar", "grammar": "start: x"}, "lark"),
    ):
        assert server.post(text={"format": given}).status_code == 200
        assert server.engine.last.request.format.kind == kind


@pytest.mark.parametrize(
    "choice, names, kind",
    [
        ("auto", None, None),
        ("none", (), None),
        ("required", None, "tools"),
        ({"type": "function", "name": "clock"}, ("clock",), "tools"),
        (
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "weather"}],
            },
            ("weather",),
            None,
        ),
    ],
)
def test_the_prompt_lists_all_tools_and_the_choice_says_which_may_be_called(
    server, choice, names, kind
):
    clock = {"type": "function", "name": "clock", "parameters": None, "strict": None}
    answer = server.respond(tools=[TOOL, clock], tool_choice=choice)
    ask = server.engine.last
    assert [t["function"]["name"] for t in options_of(ask)["tools"]] == ["weather", "clock"]
    assert ask.request.callable == names
    assert (ask.request.format and ask.request.format.kind) == kind
    assert [tool.name for tool in answer.tools] == ["weather", "clock"]


def test_log_probabilities_come_where_they_are_asked_for(server):
    def script(ask: Any) -> list[Any]:
        tokens = [logprobs(text, ask.request.logprobs) for text in ("a", "b")]
        chunks = [Chunk(token.text, 1, logprobs=token) for token in tokens]
        return [*chunks, Chunk("", None, "stop", stats())]

    answer = server.respond(script, include=["message.output_text.logprobs"], top_logprobs=1)
    found = answer.output[0].content[0].logprobs
    assert [token.token for token in found] == ["a", "b"]
    assert found[0].top_logprobs[0].logprob == -0.5
    events = list(server.respond(script, top_logprobs=1, stream=True))
    deltas = [e.logprobs for e in events if e.type == "response.output_text.delta"]
    assert [[token.token for token in each] for each in deltas] == [["a"], ["b"]]


def test_options_reach_the_engine(server):
    server.respond(
        temperature=0.5,
        top_p=0.9,
        truncation="auto",
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        store=False,
        metadata={"a": "b"},
        extra_body={"top_k": 5, "seed": 3},
    )
    assert options_of(server.engine.last) == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 3,
        "truncate": True,
        "think": "low",
    }


@pytest.mark.parametrize(
    "body, said",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True, "store": False}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"role": "system", "content": "x"}]}, "no message to answer"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": "huge"}}, "effort"),
        ({"text": {"format": {"type": "json_schema"}}}, "name"),
        ({"tool_choice": "required"}, "there are no tools"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(server, body, said):
    answer = server.post(**body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_stored_responses_are_not_found(server):
    with pytest.raises(openai.NotFoundError):
        server.client.responses.retrieve("resp_1")


def test_an_empty_text_is_a_message(server):
    answer = server.post(input="", max_output_tokens=1)
    assert answer.status_code == 200, answer.text
    assert server.engine.last.request.prompt == [{"role": "user", "content": ""}]
