"""OpenAI's chat completions, completions, models and embeddings, through OpenAI's own client."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from mlxkv.errors import KVCacheFull, UsageError
from mlxkv.generation.embed_request import EmbedRequest
from mlxkv.generation.outputs import Chunk, Miss, TokenLogprobs
from mlxkv.parsers.events import ToolCall
from mlxkv.server.fields import seconds
from tests.support.connections import left, until
from tests.support.fake_engine import (
    MODEL,
    FakeEngine,
    Script,
    logprobs,
    options_of,
    says,
    serving,
    stats,
)
from tests.support.openai_server import OpenAIServer

HI: list[Any] = [{"role": "user", "content": "hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        "strict": True,
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}


class Server(OpenAIServer):
    """With the requests of these tests."""

    def chat(self, script: Script | None = None, **options: Any) -> Any:
        self.engine.script = script or says("Hello", " world")
        return self.client.chat.completions.create(**{"model": MODEL, "messages": HI, **options})

    def complete(self, script: Script | None = None, **options: Any) -> Any:
        self.engine.script = script or says("Hello", " world")
        return self.client.completions.create(**{"model": MODEL, "prompt": "hi", **options})

    def post(self, path: str, body: Any) -> httpx.Response:
        self.engine.script = says("ok")
        return httpx.post(f"{self.url}/v1/{path}", json=body)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server.running(max_choices=4) as made:
        yield made


def calls(*made: ToolCall, text: str = "", reason: str = "stop") -> Script:
    """An answer that calls."""
    return lambda ask: [Chunk(text, 1), Chunk("", None, reason, stats(), tool_calls=made)]


ROME = ToolCall("<call>", "weather", {"place": "Rome é"}, "call00001")
OSLO = ToolCall("", "weather", {"place": "Oslo"}, "call00002")
BROKEN = ToolCall("<call>{broken", "weather", {}, "call00003", "no closing brace")


class TestChat:
    def test_an_answer_comes_whole_with_its_usage(self, server):
        answer = server.chat()
        assert answer.object == "chat.completion" and answer.model == MODEL
        choice = answer.choices[0]
        assert (choice.message.content, choice.message.role) == ("Hello world", "assistant")
        assert (choice.finish_reason, choice.index, choice.message.tool_calls) == ("stop", 0, None)
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 2, 12)

    def test_usage_says_what_was_restored_from_where_and_why_not_more(self, server):
        miss = Miss("diverged", 6, "a|b", "a|c", 3, 0.1)
        answer = server.chat(says("x", stats=stats(miss=miss)))
        details = answer.usage.prompt_tokens_details.model_dump()
        assert details["cached_tokens"] == 6
        assert (details["restored_ram_tokens"], details["restored_ssd_tokens"]) == (4, 2)
        assert details["computed_tokens"] == 4 and details["miss"] == dataclasses.asdict(miss)

    def test_a_stream_gives_the_role_the_text_and_the_reason(self, server):
        events = list(server.chat(stream=True))
        deltas = [event.choices[0].delta for event in events]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == "Hello world"
        assert [e.choices[0].finish_reason for e in events] == [None, None, None, "stop"]
        assert len({event.id for event in events}) == 1
        assert all(event.usage is None for event in events)

    @pytest.mark.parametrize("options", [{}, None, {"include_usage": False}])
    def test_every_stream_ends_with_done(self, server, options):
        body = {"model": MODEL, "messages": HI, "stream": True, "stream_options": options}
        answer = server.post("chat/completions", body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith("data: [DONE]\n\n") and answer.text.count("[DONE]") == 1

    def test_a_stream_ends_with_usage_where_it_is_asked_for(self, server):
        events = list(server.chat(stream=True, stream_options={"include_usage": True}))
        assert all(event.usage is None for event in events[:-1])
        assert events[-1].choices == [] and events[-1].usage.completion_tokens == 2

    @pytest.mark.parametrize("ask", ["chat", "complete"])
    def test_each_event_has_the_usage_so_far_where_it_is_asked_for(self, server, ask):
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = list(getattr(server, ask)(stream=True, stream_options=options))
        assert all(event.usage.prompt_tokens == 10 for event in events)
        counts = [event.usage.completion_tokens for event in events]
        assert counts == ([1, 1, 2, 2, 2] if ask == "chat" else [1, 2, 2, 2])
        assert events[-1].choices == [] and events[-1].usage.total_tokens == 12

    def test_reasoning_has_a_field_of_its_own(self, server):
        def script(ask):
            return [Chunk("", 1, reasoning="hm"), Chunk("ok", 2), Chunk("", None, "stop", stats())]

        answer = server.chat(script)
        assert answer.choices[0].message.reasoning_content == "hm"
        assert answer.choices[0].message.content == "ok"
        assert answer.usage.completion_tokens_details.reasoning_tokens == 1
        deltas = [event.choices[0].delta for event in server.chat(script, stream=True)]
        assert [getattr(d, "reasoning_content", None) for d in deltas] == [None, "hm", None, None]

    def test_memory_ends_an_answer_as_its_length_does_and_says_so(self, server):
        script = says("part", reason="memory", error=KVCacheFull(256, 512, 300))
        for choice in (
            server.chat(script).choices[0],
            list(server.chat(script, stream=True))[-1].choices[0],
            server.complete(script).choices[0],
        ):
            assert choice.finish_reason == "length"
            assert choice.finish_details["type"] == "memory"
            assert "KV cache cannot grow" in choice.finish_details["message"]

    def test_several_answers_have_indices_seeds_and_one_prompt(self, server):
        answer = server.chat(lambda ask: says(str(options_of(ask)["seed"]))(ask), n=3, seed=5)
        assert [choice.message.content for choice in answer.choices] == ["5", "6", "7"]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 3)
        texts = {0: "", 1: "", 2: ""}
        for event in server.chat(n=3, stream=True):
            texts[event.choices[0].index] += event.choices[0].delta.content or ""
        assert set(texts.values()) == {"Hello world"}

    def test_one_request_cannot_ask_for_any_number_of_answers(self, server):
        with pytest.raises(openai.BadRequestError, match="may have 4 answers"):
            server.chat(n=5)

    def test_log_probabilities_come_for_each_token(self, server):
        content = server.chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
        assert [token.token for token in content] == ["Hello", " world"]
        assert content[0].logprob == -0.5 and content[0].bytes == list(b"Hello")
        assert [top.logprob for top in content[0].top_logprobs] == [-0.5, -1.5]
        assert server.engine.last.request.logprobs == 2
        events = list(server.chat(logprobs=True, stream=True))
        found = [e.choices[0].logprobs.content[0] for e in events if e.choices[0].logprobs]
        assert [token.token for token in found] == ["Hello", " world"]
        assert found[0].top_logprobs == [] and server.engine.last.request.logprobs == 0

    def test_what_cannot_come_has_a_log_probability_that_json_can_hold(self, server):
        never = dataclasses.replace(logprobs("a", 0), logprob=-math.inf)
        script = lambda ask: [Chunk("a", 1, logprobs=never), Chunk("", None, "stop", stats())]  # noqa: E731
        answer = server.chat(script, logprobs=True)
        assert answer.choices[0].logprobs.content[0].logprob == -9999.0

    def test_options_reach_the_engine_under_its_names(self, server):
        extra = {
            "top_k": 40,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "repeat_last_n": 8,
            "min_tokens": 3,
            "ignore_eos": True,
            "context": 2048,
            "overflow": "shift",
            "keep": 4,
            "draft": "off",
            "keep_alive": "1h30m",
            "think": False,
        }
        server.chat(
            temperature=0.5,
            top_p=0.9,
            seed=7,
            presence_penalty=-1,
            frequency_penalty=0.5,
            logit_bias={"5": -100},
            stop=["a", "b"],
            max_completion_tokens=9,
            extra_body=extra,
        )
        assert options_of(server.engine.last) == {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.1,
            "repeat_penalty": 1.1,
            "repeat_last_n": 8,
            "seed": 7,
            "presence_penalty": -1,
            "frequency_penalty": 0.5,
            "min_tokens": 3,
            "ignore_eos": True,
            "logit_bias": {5: -100.0},
            "stop": ["a", "b"],
            "max_tokens": 9,
            "context": 2048,
            "overflow": "shift",
            "keep": 4,
            "draft": "off",
            "think": False,
        }
        assert server.engine.last.keep_alive_s == 5400

    def test_a_draft_model_is_found_as_the_models_of_requests_are(self, server):
        server.chat(extra_body={"draft": f"{MODEL}:latest"})
        assert options_of(server.engine.last) == {"draft": MODEL}
        for name in ("/etc", "../models", "nowhere"):
            with pytest.raises(openai.NotFoundError, match="not found: pull it"):
                server.chat(extra_body={"draft": name})

    def test_what_is_left_out_or_null_is_left_to_the_model(self, server):
        server.chat()
        assert options_of(server.engine.last) == {}
        body = {"model": MODEL, "messages": HI, "temperature": None, "tools": None, "stop": None}
        assert server.post("chat/completions", body).status_code == 200
        assert options_of(server.engine.last) == {}
        assert (server.engine.last.keep_alive_s, server.engine.last.request.logprobs) == (
            None,
            None,
        )

    @pytest.mark.parametrize(
        "effort, think",
        [("none", False), ("minimal", "low"), ("medium", "medium"), ("xhigh", "high")],
    )
    def test_reasoning_effort_is_how_much_the_model_thinks(self, server, effort, think):
        server.chat(reasoning_effort=effort)
        assert options_of(server.engine.last)["think"] == think

    @pytest.mark.parametrize(
        "off, expected",
        [
            ({"top_k": -1}, {"top_k": 0}),
            ({"seed": -1}, {}),
            ({"max_tokens": -1}, {}),
            ({"max_completion_tokens": -1}, {}),
            ({"max_tokens": -1, "max_completion_tokens": 4}, {"max_tokens": 4}),
            ({"repeat_last_n": -1}, {"repeat_last_n": 2**31 - 1}),
        ],
    )
    def test_minus_one_is_how_clients_spell_off(self, server, off, expected):
        body = {"model": MODEL, "messages": HI, **off}
        assert server.post("chat/completions", body).status_code == 200
        assert options_of(server.engine.last) == expected

    def test_fields_that_mean_nothing_here_are_taken(self, server):
        server.chat(
            user="me",
            metadata={"a": "b"},
            service_tier="auto",
            store=False,
            modalities=["text"],
        )
        assert options_of(server.engine.last) == {}

    @pytest.mark.parametrize(
        "body, said",
        [
            ({"messages": []}, "messages"),
            ({"messages": "hi"}, "messages"),
            ({"messages": [{"role": "user"}]}, "content"),
            ({"messages": [{"role": "nobody", "content": "x"}]}, "role|nobody"),
            ({"messages": [{"content": "x"}]}, "messages"),
            ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "text"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
            ({"model": 5}, "model"),
            ({"functions": [{"name": "f"}]}, "functions: not supported"),
            ({"guided_json": {"type": "object"}}, "guided_json: not supported"),
            ({"mirostat": 2}, "mirostat: not supported; only 0"),
            ({"stop": [1]}, "stop"),
            ({"stop": 1}, "stop"),
            ({"stop": [""]}, "stop"),
            ({"stop": "x" * 2000}, "stop"),
            ({"stream": "yes"}, "stream"),
            ({"stream_options": {"include_usage": True}}, "needs stream"),
            ({"temperature": "0.5"}, "temperature"),
            ({"temperature": -1}, "temperature"),
            ({"temperature": True}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"top_p": 1.5}, "top_p"),
            ({"top_k": -2}, "top_k"),
            ({"max_tokens": -2}, "max_tokens"),
            ({"min_tokens": -1}, "min_tokens"),
            ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be 0 to max_tokens"),
            ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "a format says"),
            ({"top_k": 1.5}, "top_k"),
            ({"min_p": 2}, "min_p"),
            ({"seed": -2}, "seed"),
            ({"seed": 2**64}, "seed"),
            ({"frequency_penalty": 2.5}, "frequency_penalty"),
            ({"presence_penalty": -2.1}, "presence_penalty"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"-1": 1}}, "logit_bias"),
            ({"logit_bias": {"5": "1"}}, "logit_bias"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": 1, "max_completion_tokens": 2}, "give one"),
            ({"repeat_penalty": 1.1, "repetition_penalty": 1.1}, "give one"),
            ({"think": True, "reasoning_effort": "low"}, "give one"),
            ({"n": 0}, "n: "),
            ({"top_logprobs": 2}, "needs logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"keep_alive": "soon"}, "keep_alive"),
            ({"keep_alive": 1e300}, "keep_alive"),
            ({"keep_alive": "999999999h"}, "keep_alive"),
            ({"tools": [CLOCK, CLOCK]}, "same name"),
            ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
            ({"tool_choice": "required"}, "there are no tools"),
            ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "names 'x'"),
            ({"response_format": {"type": "xml"}}, "response_format"),
            ({"response_format": {"type": "json_schema"}}, "json_schema"),
            ({"response_format": {"type": "regex", "regex": ""}}, "regex"),
            (
                {"response_format": {"type": "regex", "regex": "a"}, "tools": [CLOCK]},
                "with tools, response_format",
            ),
        ],
    )
    def test_a_field_that_cannot_be_served_is_refused_by_name(self, server, body, said):
        n_asks = len(server.engine.asks)
        answer = server.post("chat/completions", {"model": MODEL, "messages": HI, **body})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["type"] == "invalid_request_error"
        assert any(part in error["message"] for part in said.split("|"))
        assert len(server.engine.asks) == n_asks

    @pytest.mark.parametrize(
        "name",
        ["", "nobody", "/etc/passwd", "../x", "./fake", "~", "a/../b", "tests", "a\0b", "x" * 999],
    )
    def test_a_model_that_is_not_known_or_is_a_path_is_not_found(self, server, name):
        for path, body in (
            ("chat/completions", {"messages": HI}),
            ("completions", {"prompt": "x"}),
            ("embeddings", {"input": "x"}),
        ):
            if path == "embeddings" and name == "nobody":
                continue
            answer = server.post(path, {"model": name, **body})
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "model_not_found"


class TestMessages:
    def test_messages_reach_the_template_as_it_takes_them(self, server):
        messages: Any = [
            {"role": "developer", "content": "be brief", "name": "dev"},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm",
                "refusal": None,
                "annotations": [],
                "tool_call_errors": [{"name": "f", "error": "not JSON"}],
                "audio": None,
                "function_call": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"place": "Rome"}'},
                    },
                    {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{"}},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        ]
        server.chat(messages=messages)
        function = {"name": "weather", "arguments": {"place": "Rome"}}
        assert server.engine.last.request.prompt == [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "a\nb"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "hm",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": function},
                    {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{"}},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "sunny"},
        ]

    def test_an_answer_can_be_sent_back_as_the_client_has_it(self, server):
        answer = server.chat(calls(ROME, text="look")).choices[0].message
        server.chat(messages=[*HI, answer.model_dump(), {"role": "user", "content": "go on"}])
        assert server.engine.last.request.prompt[1]["content"] == "look"


class TestTools:
    def test_calls_come_as_json_and_end_the_answer(self, server):
        answer = server.chat(calls(ROME, OSLO), tools=[WEATHER]).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        made = answer.message.tool_calls
        assert [call.id for call in made] == ["call00001", "call00002"]
        assert json.loads(made[0].function.arguments) == {"place": "Rome é"}
        assert options_of(server.engine.last)["tools"] == [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "of a place",
                    "parameters": WEATHER["function"]["parameters"],
                },
            }
        ]
        assert server.engine.last.request.format is None

    def test_a_stream_gives_index_id_and_name_first_and_then_the_arguments(self, server):
        events = list(server.chat(calls(ROME, OSLO), tools=[WEATHER], stream=True))
        parts = [c for e in events for c in e.choices[0].delta.tool_calls or []]
        assert [part.index for part in parts] == [0, 0, 1, 1]
        assert [part.id for part in parts] == ["call00001", None, "call00002", None]
        assert [part.function.name for part in parts] == ["weather", None, "weather", None]
        assert [part.function.arguments for part in parts][::2] == ["", ""]
        assert json.loads(parts[3].function.arguments) == {"place": "Oslo"}
        assert events[-1].choices[0].finish_reason == "tool_calls"

    def test_the_clients_own_stream_helper_puts_them_together(self, server):
        server.engine.script = calls(ROME, OSLO)
        with server.client.chat.completions.stream(
            model=MODEL, messages=HI, tools=[WEATHER]
        ) as stream:
            final = stream.get_final_completion().choices[0].message
        assert [c.function.parsed_arguments["place"] for c in final.tool_calls] == [
            "Rome é",
            "Oslo",
        ]

    def test_a_call_that_cannot_be_read_is_shown_and_not_made(self, server):
        answer = server.chat(calls(BROKEN), tools=[WEATHER]).choices[0]
        assert (answer.finish_reason, answer.message.tool_calls) == ("stop", None)
        assert answer.message.content == "<call>{broken"
        expected = [{"name": "weather", "error": "no closing brace"}]
        assert answer.message.tool_call_errors == expected
        events = list(server.chat(calls(BROKEN), tools=[WEATHER], stream=True))
        assert any(
            getattr(e.choices[0].delta, "tool_call_errors", None) == expected for e in events
        )

    def test_only_the_first_call_comes_where_calls_must_not_be_parallel(self, server):
        options = {"tools": [WEATHER], "parallel_tool_calls": False}
        assert len(server.chat(calls(ROME, OSLO), **options).choices[0].message.tool_calls) == 1
        events = list(server.chat(calls(ROME, OSLO), **options, stream=True))
        parts = [c for e in events for c in e.choices[0].delta.tool_calls or []]
        assert {part.index for part in parts} == {0}

    def test_an_answer_that_was_cut_off_says_so_whatever_it_called(self, server):
        answer = server.chat(calls(ROME, reason="length"), tools=[WEATHER]).choices[0]
        assert answer.finish_reason == "length"

    def test_the_prompt_lists_all_tools_whatever_the_choice(self, server):
        server.chat(tools=[WEATHER], tool_choice="none")
        assert len(options_of(server.engine.last)["tools"]) == 1
        assert server.engine.last.request.callable == ()
        allowed = {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "auto",
                "tools": [{"type": "function", "function": {"name": "clock"}}],
            },
        }
        server.chat(tools=[WEATHER, CLOCK], tool_choice=allowed)
        listed = [t["function"]["name"] for t in options_of(server.engine.last)["tools"]]
        assert listed == ["weather", "clock"]
        assert server.engine.last.request.callable == ("clock",)

    @pytest.mark.parametrize("format", ["json_object", "regex"])
    @pytest.mark.parametrize(
        "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
    )
    def test_a_call_that_has_to_come_wins_over_a_format(self, server, format, choice):
        form = {"type": format} | ({"regex": "a"} if format == "regex" else {})
        server.chat(tools=[WEATHER], tool_choice=choice, response_format=form)
        grammar = server.engine.last.request.format
        assert grammar.kind == "tools" and json.loads(grammar.text)["content"] is None

    def test_a_tool_that_is_named_is_called_once(self, server):
        choice = {"type": "function", "function": {"name": "weather"}}
        answer = server.chat(
            calls(ROME, OSLO), tools=[WEATHER], tool_choice=choice, parallel_tool_calls=True
        )
        assert len(answer.choices[0].message.tool_calls) == 1
        assert json.loads(server.engine.last.request.format.text)["parallel"] is False
        server.chat(tools=[WEATHER], tool_choice="required")
        assert json.loads(server.engine.last.request.format.text)["parallel"] is True

    @pytest.mark.parametrize(
        "choice, names",
        [
            ("required", ["weather", "clock"]),
            ({"type": "function", "function": {"name": "clock"}}, ["clock"]),
        ],
    )
    def test_a_required_call_is_a_grammar(self, server, choice, names):
        server.chat(tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False)
        grammar = server.engine.last.request.format
        said = json.loads(grammar.text)
        assert grammar.kind == "tools" and not said["parallel"] and said["content"] is None
        assert [tool["name"] for tool in said["tools"]] == names


class TestTemplate:
    def test_chat_template_kwargs_are_variables_of_the_template(self, server):
        given = {"enable_thinking": False, "words": ["a"]}
        for make in (server.chat, lambda **fields: server.client.responses.create(
            model=MODEL, input="hi", **fields
        )):  # fmt: skip
            make(extra_body={"chat_template_kwargs": given})
            assert server.engine.last.request.template_options == given
        server.chat(extra_body={"chat_template_kwargs": {}})
        assert server.engine.last.request.template_options is None

    @pytest.mark.parametrize("value", [{"messages": []}, {"bos_token": "x"}, [1], "x"])
    def test_what_they_cannot_set_is_refused_by_name(self, server, value):
        body = {"model": MODEL, "messages": HI, "chat_template_kwargs": value}
        answer = server.post("chat/completions", body)
        assert answer.status_code == 400
        assert "chat_template_kwargs" in answer.json()["error"]["message"]


class TestFormats:
    @pytest.mark.parametrize(
        "given, kind, text",
        [
            ({"type": "json_object"}, "json_object", ""),
            (
                {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["é"]}}},
                "json_schema",
                '{"enum": ["\\u00e9"]}',
            ),
            ({"type": "regex", "regex": "a+"}, "regex", "a+"),
            ({"type": "grammar", "grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ],
    )
    def test_a_response_format_is_a_grammar(self, server, given, kind, text):
        for make in (server.chat, server.complete):
            make(extra_body={"response_format": given})
            grammar = server.engine.last.request.format
            assert (grammar.kind, grammar.text) == (kind, text)

    def test_text_is_no_grammar(self, server):
        server.chat(response_format={"type": "text"})
        assert server.engine.last.request.format is None

    def test_the_clients_own_models_are_schemas(self, server):
        class Person(BaseModel):
            name: str

        server.engine.script = says('{"name":', ' "Ada"}')
        answer = server.client.chat.completions.parse(
            model=MODEL, messages=HI, response_format=Person
        )
        assert answer.choices[0].message.parsed == Person(name="Ada")
        assert json.loads(server.engine.last.request.format.text)["required"] == ["name"]

    def test_a_json_answer_beside_tools_is_one_of_both(self, server):
        server.chat(tools=[CLOCK], response_format={"type": "json_object"})
        said = json.loads(server.engine.last.request.format.text)
        assert said["content"] == {"kind": "json_object", "text": ""}


class TestCompletions:
    def test_a_text_is_gone_on_from_as_it_is(self, server):
        answer = server.complete(prompt="once", max_tokens=5)
        assert (answer.object, answer.choices[0].text) == ("text_completion", "Hello world")
        assert server.engine.last.request.prompt == "once"
        assert options_of(server.engine.last) == {"max_tokens": 5}

    def test_token_ids_are_a_prompt(self, server):
        server.complete(prompt=[1, 2, 3])
        assert server.engine.last.request.prompt == [1, 2, 3]

    @pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2, 3]]])
    def test_a_list_of_prompts_gets_n_answers_each_in_order(self, server, prompt):
        n_asks = len(server.engine.asks)
        answer = server.complete(prompt=prompt, n=2, seed=1)
        asks = server.engine.asks[n_asks:]
        assert [ask.request.prompt for ask in asks] == [prompt[0], prompt[0], prompt[1], prompt[1]]
        assert [options_of(ask)["seed"] for ask in asks] == [1, 2, 1, 2]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (20, 8)
        assert answer.usage.prompt_tokens_details.cached_tokens == 12

    def test_log_probabilities_have_the_shape_of_completions(self, server):
        found = server.complete(logprobs=2).choices[0].logprobs
        assert found.tokens == ["Hello", " world"] and found.text_offset == [0, 5]
        assert found.token_logprobs == [-0.5, -0.5]
        assert found.top_logprobs[0] == {"t0": -0.5, "t1": -1.5}
        events = [e for e in server.complete(logprobs=0, stream=True) if e.choices[0].logprobs]
        assert [e.choices[0].logprobs.text_offset for e in events] == [[0], [5]]

    def test_a_stream_ends_with_its_reason_and_usage(self, server):
        events = list(server.complete(stream=True, stream_options={"include_usage": True}))
        assert "".join(e.choices[0].text for e in events[:-1]) == "Hello world"
        assert events[-2].choices[0].finish_reason == "stop" and events[-1].usage.total_tokens == 12

    @pytest.mark.parametrize(
        "body",
        [
            {"prompt": ""},
            {"prompt": []},
            {"prompt": [""]},
            {"prompt": [[]]},
            {"prompt": ["a", [1]]},
            {"prompt": [-1]},
            {"prompt": [1.5]},
            {"prompt": None},
            {"max_tokens": 0},
            {"max_tokens": 0, "echo": False},
            {"echo": "yes"},
            {"suffix": "end"},
            {"best_of": 2},
            {"logprobs": True},
            {"logprobs": 21},
            {"prompt": ["x"] * 5},
        ],
    )
    def test_what_cannot_be_served_is_refused(self, server, body):
        answer = server.post("completions", {"model": MODEL, "prompt": "x", **body})
        assert answer.status_code == 400 and answer.json()["error"]["message"]

    def test_fields_that_ask_for_nothing_are_taken(self, server):
        server.complete(echo=False, suffix=None, best_of=1)


class TestModelsAndEmbeddings:
    def test_loaded_models_are_listed_and_found(self, server):
        assert MODEL in [model.id for model in server.client.models.list()]
        assert server.client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError):
            server.client.models.retrieve("org/none")

    def test_vectors_come_as_floats_and_as_the_client_packs_them(self, server):
        for options in ({}, {"encoding_format": "float"}):
            answer = server.client.embeddings.create(model=MODEL, input=["a", "bc"], **options)
            assert [row.embedding for row in answer.data] == [[1.0, 0.5], [2.0, 0.5]]
            assert answer.usage.prompt_tokens == 3
        assert len(server.client.embeddings.create(model=MODEL, input="a").data) == 1

    def test_a_model_without_meaningful_vectors_says_so(self, server):
        with pytest.raises(openai.BadRequestError, match="no meaningful embeddings"):
            server.client.embeddings.create(model=MODEL, input="refuse")
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            server.client.embeddings.create(model=MODEL, input="a", dimensions=0)

    def test_what_is_asked_of_vectors_reaches_the_engine(self, server):
        more = {"prompt": "query", "truncate": True, "keep_alive": "5m"}
        answer = server.client.embeddings.create(
            model=MODEL, input=["a", "bc"], dimensions=1, extra_body=more
        )
        assert [row.embedding for row in answer.data] == [[1.0], [2.0]]
        asked = server.engine.embedded[-1]
        assert asked.request == EmbedRequest(["a", "bc"], "query", 1, truncate=True)
        assert asked.keep_alive_s == 300


class TestRerank:
    """In the shape of Cohere's and Jina's APIs."""

    def rerank(self, server, **options: Any) -> httpx.Response:
        def verdict(ask):
            no = -float(len(ask.request.rank.document))
            told = tuple(TokenLogprobs(i, "", b"", x) for i, x in enumerate((-1.0, no)))
            first = Chunk("y", 1, logprobs=TokenLogprobs(1, "y", b"y", -1.0, told))
            return [first, Chunk("", None, "length", stats=stats(prompt_tokens=10))]

        server.engine.script = verdict
        body = {"model": MODEL, "query": "q", "documents": ["a", {"text": "abc"}, "ab"]}
        return httpx.post(f"{server.url}/v1/rerank", json=body | options)

    def test_documents_come_in_order_with_their_scores(self, server):
        answer = self.rerank(server, top_n=2, return_documents=True).json()
        assert [row["index"] for row in answer["results"]] == [1, 2]
        assert answer["results"][0]["document"] == {"text": "abc"}
        assert answer["results"][0]["relevance_score"] == pytest.approx(1 / (1 + math.exp(-2)))
        assert answer["usage"]["prompt_tokens"] == 30
        assert "document" not in self.rerank(server).json()["results"][0]

    def test_what_is_asked_of_a_ranking_reaches_the_engine(self, server):
        self.rerank(server, instruction="Judge.", max_tokens_per_doc=7, keep_alive=60)
        ask = server.engine.asks[-1]
        assert ask.request.rank.instruction == "Judge." and ask.request.rank.most == 7
        assert (ask.request.max_tokens, ask.request.logprobs, ask.keep_alive_s) == (1, 0, 60)

    @pytest.mark.parametrize("options", [{"documents": []}, {"query": ""}, {"top_n": 0}])
    def test_what_cannot_be_ranked_is_refused(self, server, options):
        assert self.rerank(server, **options).status_code == 400


def endless(ask: Any) -> Iterator[Any]:
    while True:
        yield Chunk("x" * 1000, 1)


def slow(ask: Any) -> list[Any]:
    return [60.0]


class TestGoneClients:
    @pytest.mark.parametrize("n", [1, 3])
    def test_an_answer_is_cancelled_when_its_stream_is_closed(self, server, n):
        stream = server.chat(endless, stream=True, n=n)
        next(iter(stream))
        stream.close()
        until(lambda: all(a.cancelled.is_set() for a in server.engine.answers[-n:]))

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("script", [slow, endless])
    def test_an_answer_is_cancelled_when_nobody_waits_for_it(self, server, stream, script):
        server.engine.script = script
        body = {"model": MODEL, "messages": HI, "stream": stream}
        answer = left(server.engine, server.url, "/v1/chat/completions", body)
        assert answer.cancelled.wait(10)

    def test_a_stream_that_nobody_reads_stands_still_and_is_cancelled(self):
        engine = FakeEngine(endless)
        with serving(engine, stall_s=0.5) as url:
            body = {"model": MODEL, "messages": HI, "stream": True}
            with httpx.stream("POST", url + "/v1/chat/completions", json=body):
                until(lambda: engine.answers and engine.answers[-1].n_read > 10)
                until(engine.answers[-1].cancelled.is_set)
                # Sockets hold some MB; the server holds one event.
                assert engine.answers[-1].n_read < 20_000
            engine.script = says("next")
            assert httpx.post(
                url + "/v1/chat/completions", json={**body, "stream": False}
            ).is_success

    def test_all_answers_are_cancelled_when_one_cannot_be_begun(self, server):
        def script(ask: Any) -> Any:
            if len(server.engine.asks) % 2 == 0:
                raise UsageError("not this one")
            return [60.0]

        server.engine.asks.clear()
        with pytest.raises(openai.BadRequestError, match="not this one"):
            server.chat(script, n=2)
        assert server.engine.answers[-1].cancelled.is_set()

    def test_all_answers_are_cancelled_when_one_fails(self, server):
        def script(ask: Any) -> Any:
            return [UsageError("broken")] if options_of(ask)["seed"] == 2 else slow(ask)

        with pytest.raises(openai.BadRequestError, match="broken"):
            server.chat(script, n=2, seed=1)
        assert all(answer.cancelled.is_set() for answer in server.engine.answers[-2:])


def test_the_server_may_bound_the_length_of_answers():
    engine = FakeEngine()
    with serving(engine, max_tokens=100) as url:
        for path, prompt in (
            ("chat/completions", {"messages": HI}),
            ("completions", {"prompt": "x"}),
            ("responses", {"input": "x"}),
        ):
            length = "max_output_tokens" if path == "responses" else "max_tokens"
            for given, expected in (({}, 100), ({length: 50}, 50), ({length: 101}, None)):
                body = {"model": MODEL, **prompt, **given}
                answer = httpx.post(f"{url}/v1/{path}", json=body)
                assert answer.status_code == (400 if expected is None else 200)
                assert expected in (None, options_of(engine.last)["max_tokens"])


class TestStreams:
    def test_an_error_in_the_middle_is_the_last_event(self, server):
        def script(ask: Any) -> Any:
            return [Chunk("a", 1), KVCacheFull(1, 2, 1)]

        seen = []
        with pytest.raises(openai.APIError, match="KV cache cannot grow"):
            for event in server.chat(script, stream=True):
                seen.append(event)
        assert len(seen) == 2
        server.engine.script = script
        body = {"model": MODEL, "messages": HI, "stream": True}
        text = httpx.post(server.url + "/v1/chat/completions", json=body).text
        assert text.endswith("data: [DONE]\n\n") and '"error"' in text

    def test_a_long_wait_is_bridged_by_comments_and_its_error_is_an_event(self):
        engine = FakeEngine(lambda ask: [0.5, UsageError("too late")])
        with serving(engine, first_s=0.1, ping_s=0.1) as url:
            body = {"model": MODEL, "messages": HI, "stream": True}
            answer = httpx.post(url + "/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert answer.text.startswith(": ping\n\n") and "too late" in answer.text

    def test_events_are_not_held_back(self, server):
        script = lambda ask: [Chunk("a", 1), 60.0]  # noqa: E731
        stream = server.chat(script, stream=True)
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "a"]
        stream.close()


@pytest.mark.parametrize(
    "given, expected",
    [(None, None), (5, 5), (-1.0, -1.0), ("5m", 300), ("1h30m", 5400), ("-1s", -1), ("500ms", 0.5)],
)
def test_keep_alive_is_seconds_or_a_duration(given, expected):
    assert seconds(given) == expected
