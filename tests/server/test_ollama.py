"""Ollama's API, driven by Ollama's own client over loopback."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator

import httpx
import ollama
import pytest

import mlxkv
from mlxkv.engine.messages import Busy, Loaded
from mlxkv.errors import CheckpointError, ContextExceeded, DownloadError, KVCacheFull
from mlxkv.generation.outputs import Chunk, Miss
from mlxkv.memory.types import Rung
from mlxkv.parsers.events import ToolCall
from mlxkv.sampling.grammar import Grammar
from mlxkv.sampling.params import SamplingParams
from mlxkv.store import refs, resolve, settings
from mlxkv.store.adapters import own_adapters
from tests.models.test_adapters import mlx_lm
from tests.support.connections import left
from tests.support.fake_engine import MODEL, options_of, says, serving, stats
from tests.support.fake_engine_ollama import (
    STORED,
    LoadingEngine,
    address,
    engine,
    made_model,
    models,
    server,
)
from tests.support.tiny_media import write_gemma3, write_gemma4

__all__ = ["address", "engine", "made_model", "models", "server"]

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = ToolCall("<call>", "weather", {"city": "Bern"}, "abcdefghi")


@pytest.fixture
def client(address) -> Iterator[ollama.Client]:
    with ollama.Client(address, timeout=10) as found:
        yield found


def post(address: str, path: str, body: object, method: str = "POST") -> httpx.Response:
    return httpx.request(method, f"{address}{path}", json=body, timeout=10)


def refused(address: str, path: str, **body: object) -> str:
    """The message of a request that gets status 400."""
    response = post(address, path, body)
    assert response.status_code == 400, response.text
    assert response.json().keys() == {"error"}
    return response.json()["error"]


def lines(response: httpx.Response) -> list[dict]:
    return [json.loads(each) for each in response.text.splitlines()]


# Answers


def test_a_chat_is_answered_with_its_figures(client, engine):
    answer = client.chat(MODEL, HELLO)
    assert (answer.message.role, answer.message.content) == ("assistant", "Hello world")
    assert (answer.done, answer.done_reason, answer.model) == (True, "stop", MODEL)
    # Clients tell from it how full the context is: of the 10 tokens 6 were restored.
    assert (answer.prompt_eval_count, answer.prompt_eval_duration) == (10, 250_000_000)
    assert (answer.eval_count, answer.eval_duration) == (2, 500_000_000)
    assert answer.total_duration > 0
    assert answer.load_duration == 0
    assert engine.last.request.prompt == HELLO
    assert options_of(engine.last) == {}


def test_the_last_line_says_where_the_prompt_came_from(address, engine):
    miss = Miss("diverged", 6, "a|b", "a|c", 3, 0.1)
    engine.script = says("Hi", stats=stats(miss=miss, generated_tokens=1))
    body = post(address, "/api/chat", {"model": MODEL, "messages": HELLO, "stream": False}).json()
    assert (body["prompt_eval_count"], body["prompt_eval_cached_count"]) == (10, 6)
    assert body["prompt_cache"] == {
        "prompt_tokens": 10,
        "restored_ram_tokens": 4,
        "restored_ssd_tokens": 2,
        "computed_tokens": 4,
        "shifted_tokens": 0,
        "diverged_at": None,
        "miss": {
            "reason": "diverged", "token": 6, "held": "a|b", "prompt": "a|c",
            "n_tokens": 3, "cost_s": 0.1,
        },
    }  # fmt: skip


def test_the_last_line_says_what_gave_way_where_memory_was_short(address, engine):
    rung = Rung("packed", 512, 1 << 20, "q8")
    error = KVCacheFull(512, 768, 600)
    engine.script = says("Hi", reason="memory", error=error, stats=stats(rungs=(rung,)))
    body = post(address, "/api/chat", {"model": MODEL, "messages": HELLO, "stream": False}).json()
    assert body["memory"] == {
        "kv_bytes": 500,
        "gave_way": [{"kind": "packed", "n_tokens": 512, "amount": 1 << 20, "kv_type": "q8"}],
        "message": str(error),
    }


def test_a_chat_streams_by_default_one_line_a_step(address, client):
    response = post(address, "/api/chat", {"model": MODEL, "messages": HELLO})
    assert response.headers["content-type"] == "application/x-ndjson"
    *parts, last = lines(response)
    assert [part["message"]["content"] for part in parts] == ["Hello", " world"]
    assert all(part["done"] is False and "created_at" in part for part in parts)
    assert (last["message"]["content"], last["done"], last["done_reason"]) == ("", True, "stop")
    streamed = list(client.chat(MODEL, HELLO, stream=True))
    assert "".join(part.message.content for part in streamed) == "Hello world"
    assert streamed[-1].eval_count == 2


def test_generate_renders_a_prompt_with_its_system_prompt(client, engine):
    answer = client.generate(MODEL, "Hi", system="Be brief")
    assert answer.response == "Hello world"
    assert engine.last.request.prompt == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
    ]
    parts = list(client.generate(MODEL, "Hi", stream=True))
    assert "".join(part.response for part in parts) == "Hello world"


def test_a_raw_prompt_goes_to_the_model_as_it_is(client, address, engine):
    client.generate(MODEL, "Once upon", raw=True)
    assert engine.last.request.prompt == "Once upon"
    assert "not allowed with raw" in refused(
        address, "/api/generate", model=MODEL, prompt="x", raw=True, system="y"
    )


def test_options_become_the_engines(client, engine):
    client.chat(
        MODEL,
        HELLO,
        options={
            "num_ctx": 2048, "num_keep": 4, "num_predict": 7, "seed": 3, "temperature": 0.5,
            "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.1, "repeat_last_n": 64,
            "stop": ["END"], "num_gpu": 1, "num_thread": 8, "mirostat": 0, "presence_penalty": -1,
            "frequency_penalty": 0.5,
        },
    )  # fmt: skip
    assert options_of(engine.last) == {
        "context": 2048, "keep": 4, "max_tokens": 7, "seed": 3, "temperature": 0.5,
        "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repeat_penalty": 1.1, "repeat_last_n": 64,
        "stop": ["END"], "presence_penalty": -1, "frequency_penalty": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_predict": -1}, {}),
        ({"num_predict": -2}, {"overflow": "stop"}),
        ({"seed": -1}, {}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"repeat_last_n": -1}, {"repeat_last_n": 2**31 - 1}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"temperature": 0}, {"temperature": 0}),
    ],
)
def test_values_that_mean_none_or_all_are_translated(client, engine, options, expected):
    client.chat(MODEL, HELLO, options=options)
    assert options_of(engine.last) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mirostat": 2}, "options.mirostat: not supported"),
        ({"tfs_z": 0.5}, "options.tfs_z: not supported"),
        ({"presence_penalty": 2.5}, "options.presence_penalty"),
        ({"num_predict": 0}, "num_predict must be 1 or more"),
        ({"num_ctx": 0}, "options.num_ctx"),
        ({"temperature": -1}, "options.temperature"),
        ({"temperature": "hot"}, "options.temperature"),
        ({"stop": [1]}, "options.stop"),
        ({"vocab_only": True}, "options.vocab_only"),
    ],
)
def test_options_that_cannot_be_kept_to_are_refused(address, options, words):
    said = refused(address, "/api/chat", model=MODEL, messages=HELLO, options=options)
    assert words in said


@pytest.mark.parametrize("field", ["template", "suffix", "context"])
def test_fields_that_are_not_supported_are_refused_by_name(address, field):
    value = [1] if field == "context" else "x"
    said = refused(address, "/api/generate", **{"model": MODEL, "prompt": "x", field: value})
    assert f"{field}: not supported" in said


def test_images_are_refused_where_the_model_sees_none(address):
    message = {"role": "user", "content": "What is this?", "images": ["aGVsbG8="]}
    assert "images" in refused(address, "/api/chat", model=MODEL, messages=[message])


@pytest.mark.parametrize("think", [True, False, "low", "high"])
def test_thinking_is_asked_for_and_comes_in_its_own_field(client, engine, think):
    engine.script = lambda ask: [
        Chunk("", 1, reasoning="Hm."),
        Chunk("Yes", 2),
        Chunk("", None, "stop", stats()),
    ]
    message = client.chat(MODEL, HELLO, think=think).message
    assert (message.thinking, message.content) == ("Hm.", "Yes")
    assert options_of(engine.last) == {"think": think}
    streamed = list(client.generate(MODEL, "Hi", think=think, stream=True))
    assert [(part.thinking, part.response) for part in streamed[:2]] == [("Hm.", ""), (None, "Yes")]


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ("json", Grammar("json_object")),
        ({"type": "object"}, Grammar("json_schema", '{"type": "object"}')),
        ({}, Grammar("json_schema", "{}")),
        ("", None),
        (None, None),
    ],
)
def test_a_format_becomes_a_grammar(client, engine, given, grammar):
    client.chat(MODEL, HELLO, format=given)
    assert engine.last.request.format == grammar
    client.generate(MODEL, "Hi", format=given)
    assert engine.last.request.format == grammar


def test_truncate_and_shift_are_as_asked(address, engine):
    body = {"model": MODEL, "messages": HELLO, "stream": False, "truncate": True, "shift": True}
    post(address, "/api/chat", body)
    assert options_of(engine.last) == {"truncate": True, "overflow": "shift"}
    post(address, "/api/chat", {**body, "truncate": False, "shift": False, "draft": "off"})
    assert options_of(engine.last) == {"overflow": "stop", "draft": "off"}
    post(address, "/api/chat", {**body, "shift": None, "draft": MODEL})
    assert options_of(engine.last) == {"truncate": True, "draft": MODEL}


def test_log_probabilities_come_with_their_tokens(client, address, engine):
    answer = client.chat(MODEL, HELLO, logprobs=True, top_logprobs=2)
    assert [(each.token, each.logprob) for each in answer.logprobs] == [
        ("Hello", -0.5),
        (" world", -0.5),
    ]
    assert [each.token for each in answer.logprobs[0].top_logprobs] == ["t0", "t1"]
    assert engine.last.request.logprobs == 2
    parts = list(client.generate(MODEL, "Hi", logprobs=True, stream=True))
    assert [len(part.logprobs or ()) for part in parts] == [1, 1, 0]
    assert "logprobs" in refused(address, "/api/chat", model=MODEL, messages=HELLO, top_logprobs=2)


@pytest.mark.parametrize("reason", ["length", "memory"])
def test_an_answer_that_was_cut_says_why(client, engine, reason):
    error = KVCacheFull(1, 2, 3) if reason == "memory" else None
    engine.script = says("Hel", reason=reason, error=error)
    answer = client.chat(MODEL, HELLO)
    assert (answer.message.content, answer.done_reason) == ("Hel", reason)


# Tools


def test_tool_calls_come_in_their_own_field(client, engine):
    engine.script = lambda ask: [Chunk("", 1, tool_calls=(CALL,)), Chunk("", 2, "stop", stats())]
    message = client.chat(MODEL, HELLO, tools=[WEATHER]).message
    assert message.content == ""
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [
        ("weather", {"city": "Bern"})
    ]
    assert options_of(engine.last) == {"tools": [WEATHER]}
    streamed = list(client.chat(MODEL, HELLO, tools=[WEATHER], stream=True))
    assert streamed[0].message.tool_calls[0].function.name == "weather"


def test_several_calls_are_numbered_over_the_whole_answer(address, engine):
    other = ToolCall("", "weather", {"city": "Rome"}, "bbbbbbbbb")
    engine.script = lambda ask: [
        Chunk("", 1, tool_calls=(CALL,)),
        Chunk("", 2, "stop", stats(), tool_calls=(other,)),
    ]
    body = {"model": MODEL, "messages": HELLO, "tools": [WEATHER]}
    calls = [
        (call["id"], call["function"]["index"])
        for part in lines(post(address, "/api/chat", body))
        for call in part["message"].get("tool_calls", ())
    ]
    assert calls == [("abcdefghi", 0), ("bbbbbbbbb", 1)]


def test_a_call_that_cannot_be_read_is_shown_as_text(client, engine):
    broken = ToolCall("<call>{", "weather", {}, "abcdefghi", "not JSON")
    engine.script = lambda ask: [Chunk("", 1, "length", stats(), tool_calls=(broken,))]
    message = client.chat(MODEL, HELLO, tools=[WEATHER]).message
    assert (message.content, message.tool_calls) == ("<call>{", None)


@pytest.mark.parametrize(
    "choice, allowed",
    [
        ("auto", None),
        ("none", ()),
        ("required", None),
        ({"type": "function", "function": {"name": "weather"}}, ("weather",)),
    ],
)
def test_a_choice_among_tools_is_followed(address, engine, choice, allowed):
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
    body = {"model": MODEL, "messages": HELLO, "tools": [WEATHER, other], "tool_choice": choice}
    response = httpx.post(f"{address}/api/chat", json={**body, "stream": False})
    assert response.status_code == 200, response.text
    assert "mlxkv-ignored" not in response.headers
    request = engine.last.request
    assert [tool["function"]["name"] for tool in request.tools] == ["weather", "other"]
    assert request.callable == allowed
    must_call = choice not in ("auto", "none")
    assert (request.format is not None and request.format.kind == "tools") == must_call


def test_a_call_of_a_client_without_tools_is_shown_as_text(client, engine):
    call = ToolCall("<call>{}</call>", "weather", {}, "abcdefghi")
    engine.script = lambda ask: [Chunk("So: ", 1, "stop", stats(), tool_calls=(call,))]
    message = client.chat(MODEL, HELLO).message
    assert (message.content, message.tool_calls) == ("So: <call>{}</call>", None)


def test_a_python_function_is_a_tool_and_its_result_goes_back(client, engine):
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
          a: one number
          b: another
        """
        return a + b

    call = ToolCall("", "add", {"a": 1, "b": 2})
    engine.script = lambda ask: [Chunk("", 1, "stop", stats(), tool_calls=(call,))]
    message = client.chat(MODEL, HELLO, tools=[add]).message
    result = {"role": "tool", "tool_name": "add", "content": "3"}
    client.chat(MODEL, [*HELLO, message, result], tools=[add])
    arguments = {"name": "add", "arguments": {"a": 1, "b": 2}}
    assert engine.last.request.prompt[1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call00000", "type": "function", "function": arguments}],
        },
        {"role": "tool", "tool_call_id": "call00000", "name": "add", "content": "3"},
    ]


def test_results_find_their_calls_by_name_and_order(address, engine):
    def call(name: str) -> dict:
        return {"function": {"name": name, "arguments": {}}}

    messages = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call("a"), call("b"), call("a")]},
        {"role": "tool", "tool_name": "b", "content": "1"},
        {"role": "tool", "tool_name": "a", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "tool_calls": [call("a")]},
    ]
    post(address, "/api/chat", {"model": MODEL, "messages": messages, "stream": False})
    results = [m for m in engine.last.request.prompt if m["role"] == "tool"]
    assert [(r["tool_call_id"], r["name"], r["content"]) for r in results] == [
        ("call00001", "b", "1"),
        ("call00000", "a", "2"),
        ("call00002", "a", "3"),
    ]
    assert engine.last.request.prompt[-1]["tool_calls"][0]["id"] == "call00003"


def test_a_format_beside_tools_holds_for_answers_without_calls(client, engine):
    client.chat(MODEL, HELLO, tools=[WEATHER], format="json")
    assert engine.last.request.format.kind == "tools"
    assert json.loads(engine.last.request.format.text)["content"]["kind"] == "json_object"


# Loading


def test_an_empty_prompt_loads_the_model(client, engine, models):
    answer = client.generate(STORED, keep_alive="10m")
    assert (answer.response, answer.done, answer.done_reason) == ("", True, "load")
    assert engine.loads == [(STORED, 600.0)]
    chat = client.chat(STORED, [], keep_alive=-1)
    assert (chat.message.content, chat.done_reason) == ("", "load")
    assert engine.loads[1:] == [(STORED, -1.0)]


def test_an_empty_prompt_without_keep_alive_lets_the_model_go(client, engine):
    assert client.generate(MODEL, keep_alive=0).done_reason == "unload"
    assert engine.unloads == [MODEL]
    assert engine.loads == []


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("5m", 300.0), ("1h30m", 5400.0), ("-1m", -60.0), ("-1", -1.0), ("0", 0.0), (-1, -1.0),
     (2.5, 2.5)],
)  # fmt: skip
def test_keep_alive_is_a_duration(client, engine, given, seconds):
    client.chat(MODEL, HELLO, keep_alive=given)
    assert engine.last.keep_alive_s == seconds


@pytest.mark.parametrize("given", ["soon", "99999999999", 1e10])
def test_a_keep_alive_that_is_no_duration_is_refused(address, given):
    said = refused(address, "/api/chat", model=MODEL, messages=HELLO, keep_alive=given)
    assert "keep_alive" in said


def test_the_wait_for_a_model_is_its_load_duration(client, engine, models):
    answer = client.chat(STORED, HELLO)
    assert engine.loads == [(STORED, None)]
    assert 0 < answer.load_duration < answer.total_duration
    assert client.chat(STORED, HELLO).load_duration == 0
    assert engine.loads == [(STORED, None)]


# Names


@pytest.mark.parametrize("spelling", [MODEL, f"{MODEL}:latest"])
def test_latest_may_be_there_or_not(client, engine, spelling):
    assert client.chat(spelling, HELLO).model == spelling
    assert engine.last.model == MODEL


@pytest.mark.parametrize(
    "name",
    [
        "../models/tiny-1k", "/etc", "~/x", "./x", "a/../b", "x.gguf", "models/tiny-1k",
        "a/b/c", "smollm3:nope", "org/repo", "a" * 300, "tiny 1k", "..", "tiny-1k\n", "\x00",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["chat", "show", "delete", "copy", "create", "embed"])
def test_a_name_is_no_path_and_nothing_is_fetched_for_it(
    address, engine, models, monkeypatch, name, path
):
    monkeypatch.chdir(models.parent)
    (models.parent / "x.gguf").write_bytes(b"GGUF")
    bodies = {
        "chat": {"model": name, "messages": HELLO},
        "embed": {"model": name, "input": "x"},
        "copy": {"source": name, "destination": "new"},
        "create": {"model": "new", "from": name},
    }
    method = "DELETE" if path == "delete" else "POST"
    response = post(address, f"/api/{path}", bodies.get(path, {"model": name}), method)
    assert response.status_code == 404, response.text
    assert "not found" in response.json()["error"]
    assert (engine.asks, engine.loads) == ([], [])
    assert (models / "tiny-1k" / "config.json").is_file()


def test_a_name_is_needed(address):
    assert refused(address, "/api/chat", messages=HELLO) == "model is required"
    assert refused(address, "/api/show", model="") == "model is required"


def test_a_path_of_the_operators_may_be_named(models):
    engine, path = LoadingEngine(), "/srv/models/own"
    with serving(engine, models=(path,)) as address, ollama.Client(address) as client:
        client.chat(path, HELLO)
    assert engine.loads == [(path, None)]


def test_a_server_bounds_the_length_of_answers(models):
    engine = LoadingEngine()
    with serving(engine, max_tokens=50) as address, ollama.Client(address) as client:
        client.chat(MODEL, HELLO)
        assert options_of(engine.last) == {"max_tokens": 50}
        body = {"model": MODEL, "messages": HELLO, "options": {"num_predict": 51}}
        assert "50 tokens" in refused(address, "/api/chat", **body)


# Errors


def test_a_model_that_is_not_here_is_404(client):
    with pytest.raises(ollama.ResponseError, match="not found: pull it") as caught:
        client.chat("smollm3", HELLO)
    assert caught.value.status_code == 404


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_the_first_token_has_its_own_status(client, engine, stream):
    engine.script = lambda ask: [ContextExceeded(5000, 4096)]
    with pytest.raises(ollama.ResponseError, match="exceeds the context length") as caught:
        list(client.chat(MODEL, HELLO, stream=stream))
    assert caught.value.status_code == 400


def test_an_error_after_that_is_the_last_line(address, client, engine):
    engine.script = lambda ask: [Chunk("Hel", 1), CheckpointError("weights are damaged")]
    response = post(address, "/api/chat", {"model": MODEL, "messages": HELLO})
    assert response.status_code == 200
    first, last = lines(response)
    assert first["message"]["content"] == "Hel"
    assert last == {"error": "weights are damaged", "status": 422}
    with pytest.raises(ollama.ResponseError, match="weights are damaged"):
        list(client.generate(MODEL, "Hi", stream=True))


def test_a_full_queue_is_503_and_says_when_to_come_back(address, engine):
    engine.busy = Busy(2.5)
    response = post(address, "/api/generate", {"model": MODEL, "prompt": "x"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")


def test_a_model_that_cannot_be_loaded_says_why(address, engine, models):
    engine.load_error = CheckpointError("model.safetensors is cut off")
    response = post(address, "/api/chat", {"model": STORED, "messages": HELLO})
    assert (response.status_code, response.json()) == (
        422,
        {"error": "model.safetensors is cut off"},
    )


def test_what_is_no_request_is_an_error_in_the_same_shape(address):
    bad = httpx.post(f"{address}/api/chat", content=b'{"model": ', timeout=10)
    assert bad.status_code == 400
    assert "not JSON" in bad.json()["error"]
    assert httpx.post(f"{address}/api/push", json={"model": MODEL}).json().keys() == {"error"}
    assert httpx.get(f"{address}/api/nothing").status_code == 404
    assert httpx.get(f"{address}/api/chat").status_code == 405


def test_a_body_without_a_content_type_is_json(address):
    body = json.dumps({"model": MODEL, "messages": HELLO, "stream": False})
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert httpx.post(f"{address}/api/chat", content=body, headers=form).status_code == 200


# Clients that go


@pytest.mark.parametrize("path", ["chat", "generate"])
def test_a_client_that_leaves_a_stream_cancels_its_answer(address, engine, path):
    engine.script = lambda ask: [Chunk("Hel", 1), 30.0, Chunk("lo", 2, "stop", stats())]
    body = (
        {"model": MODEL, "messages": HELLO} if path == "chat" else {"model": MODEL, "prompt": "x"}
    )
    with httpx.stream("POST", f"{address}/api/{path}", json=body) as response:
        next(response.iter_lines())
    assert engine.answers[0].cancelled.wait(10)


def test_a_client_that_leaves_before_the_answer_cancels_it(address, engine):
    engine.script = lambda ask: [30.0, Chunk("lo", 2, "stop", stats())]
    for stream in (True, False):
        body = {"model": MODEL, "messages": HELLO, "stream": stream}
        assert left(engine, address, "/api/chat", body).cancelled.wait(10)


# Models


def test_tags_lists_what_is_stored(client, models):
    (model,) = client.list().models
    assert (model.model, model.details.family) == (STORED, "llama")
    assert model.size > 1000
    assert model.details.parameter_size.endswith("K")
    assert model.details.quantization_level == "float32"
    assert len(model.digest) == 64
    assert model.modified_at is not None


def test_the_engine_gets_the_directory_that_a_name_was_resolved_to(client, engine, models):
    client.chat(STORED, HELLO)  # in a folder of its own name, and not in memory
    assert engine.last.path == models / "tiny-1k"


def test_the_models_in_memory_are_described_off_the_event_loop(client, engine, monkeypatch):
    on_loop, loaded = [], engine.loaded

    def watched(owner: str | None = None) -> list[Loaded]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            on_loop.append(False)
        else:
            on_loop.append(True)
        return loaded(owner)

    monkeypatch.setattr(engine, "loaded", watched)
    assert client.ps().models
    assert on_loop == [False]


def test_the_digest_changes_with_the_files(client, models):
    before = client.list().models[0].digest
    assert client.list().models[0].digest == before
    (models / "tiny-1k" / "more.txt").write_text("x")
    assert client.list().models[0].digest != before


def test_show_names_the_senses_of_a_model(client, models):
    writers = {"seeing": write_gemma3, "hearing": write_gemma4}
    senses = []
    for name, write in writers.items():
        write(models / name)
        senses.append([c for c in client.show(name).capabilities if c in ("vision", "audio")])
        shutil.rmtree(models / name)
    assert senses == [["vision"], ["vision", "audio"]]


def test_show_tells_what_a_model_is(client, models):
    shown = client.show(STORED)
    assert shown.details.family == "llama"
    assert shown.license == "MIT"
    assert shown.template
    assert shown.capabilities[0] == "completion"
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] > 0
    assert shown.modelinfo["mlxkv.kv_bytes_per_token"] > 0
    assert shown.modelinfo["mlxkv.kv_state_bytes"] == 0
    assert shown.parameters == f"num_ctx {shown.modelinfo['llama.context_length']}"


def test_show_takes_the_older_spelling(address, models):
    assert post(address, "/api/show", {"name": STORED, "verbose": True}).status_code == 200
    assert "give one" in refused(address, "/api/show", name=STORED, model="other")


def test_ps_tells_what_is_loaded(client, address):
    (model,) = client.ps().models
    assert (model.model, model.size, model.size_vram, model.context_length) == (
        MODEL,
        5000,
        0,
        4096,
    )
    assert model.expires_at.year == 2030
    assert httpx.get(f"{address}/api/ps").json()["models"][0]["memory"]["kv_used"] == 1


def test_version_is_one_that_clients_of_ollama_take_and_our_own_beside_it(address):
    told = httpx.get(f"{address}/api/version").json()
    assert told.keys() == {"version", "mlxkv"} and told["mlxkv"] == mlxkv.__version__
    assert tuple(map(int, told["version"].split("."))) >= (0, 13, 4)


def test_vectors_come_from_the_engine_or_are_refused(client):
    assert client.embed(MODEL, ["a", "abc"]).embeddings == [[1.0, 0.5], [3.0, 0.5]]
    assert client.embed(MODEL, "a", truncate=False, dimensions=1).embeddings == [[1.0]]
    assert client.embeddings(MODEL, "abc").embedding == [3.0, 0.5]
    with pytest.raises(ollama.ResponseError, match="no meaningful embeddings") as caught:
        client.embed(MODEL, "refuse")
    assert caught.value.status_code == 400


@pytest.mark.parametrize("body", [{"input": ""}, {"input": []}, {"input": None}, {}])
def test_a_request_for_vectors_of_nothing_loads_the_model(address, body):
    answer = httpx.post(f"{address}/api/embed", json={"model": MODEL, **body})
    assert answer.status_code == 200 and answer.json()["embeddings"] == []
    answer = httpx.post(f"{address}/api/embeddings", json={"model": MODEL, "prompt": ""})
    assert answer.status_code == 200 and answer.json() == {"embedding": []}
    assert httpx.post(f"{address}/api/embed", json={"model": "no", **body}).status_code == 404


# The library


def test_a_copy_is_a_model_of_its_own(client, models):
    client.copy(STORED, "second:latest")
    assert {model.model for model in client.list().models} == {STORED, "second"}
    assert refs.locate("second") == refs.StoredRef("second", models / "second")
    assert resolve.read_record(models / "second").origin == "tiny.gguf"
    client.delete(STORED)
    assert [model.model for model in client.list().models] == ["second"]
    assert client.show("second:latest").details.family == "llama"


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "smollm2", STORED, "TINY:1K", "", "x.gguf", "/tmp/x"]
)
def test_a_copy_needs_a_free_name(address, models, name):
    refused(address, "/api/copy", source=STORED, destination=name)
    assert sorted(path.name for path in models.iterdir()) == ["tiny-1k"]


def test_delete_lets_the_model_go_first(client, engine, models):
    client.delete(f"{STORED}")
    assert engine.unloads == [STORED]
    assert not (models / "tiny-1k").exists()
    with pytest.raises(ollama.ResponseError) as caught:
        client.delete(STORED)
    assert caught.value.status_code == 404


def test_create_makes_a_model_with_parameters(client, models):
    said = client.create("brief", from_=STORED, parameters={"num_ctx": 64, "temperature": 0.25})
    assert said.status == "success"
    made = models / "brief"
    assert settings.effective(made).context.value == 64
    raw = json.loads((made / "generation_config.json").read_text())
    assert SamplingParams.from_generation_config(raw, "x").temperature == 0.25
    shown = client.show("brief")
    assert shown.parameters == "num_ctx 64\ntemperature 0.25"
    assert "PARAMETER temperature 0.25\n" in shown.modelfile


def test_create_packs_weights(client, models):
    said = [
        part.status
        for part in client.create("small", from_=STORED, quantize="affine4", stream=True)
    ]
    assert said[0] == "converting small"
    assert said[-1] == "success"
    assert "affine4" in client.show("small").details.quantization_level


def test_create_keeps_adapters_of_the_cache_with_the_model(address, models, tmp_path, monkeypatch):
    raw = json.loads((models / "tiny-1k" / "config.json").read_text())
    size, name = raw["hidden_size"], "model.layers.0.self_attn.o_proj"
    adapter = mlx_lm(tmp_path / "adapter", {name: (size, size)})
    monkeypatch.setattr("mlxkv.store.adapters._cached", lambda ref: adapter)
    body = {"model": "tuned", "from": STORED, "adapters": {"org/a": 0.5}, "stream": False}
    assert post(address, "/api/create", body).status_code == 200
    (ref,) = own_adapters(models / "tuned")
    assert (ref.weight, ref.path.name) == (0.5, "000=0.5")


def test_create_makes_a_model_of_adapters_that_clients_send(client, address, models, tmp_path):
    size = json.loads((models / "tiny-1k" / "config.json").read_text())["hidden_size"]
    adapter = mlx_lm(tmp_path / "adapter", {"model.layers.0.self_attn.o_proj": (size, size)})
    files = {f"here/{file.name}": client.create_blob(file) for file in adapter.iterdir()}
    first, *_ = (f"{address}/api/blobs/{digest}" for digest in files.values())
    assert httpx.head(first).status_code == 200
    assert httpx.head(first[:-1] + "g").status_code == 400
    unknown = f"{address}/api/blobs/sha256:{'0' * 64}"
    assert "digest is" in httpx.post(unknown, content=b"other").json()["error"]
    assert httpx.head(unknown).status_code == 404
    assert client.create("tuned", from_=STORED, adapters=files).status == "success"
    (ref,) = own_adapters(models / "tuned")
    for file in adapter.iterdir():
        assert (ref.path / file.name).read_bytes() == file.read_bytes()
    # What does not fit is told without the server's paths; a file that is not needed stays out.
    wide = mlx_lm(tmp_path / "wide", {"model.layers.0.self_attn.o_proj": (size + 1, size)})
    files = {file.name: client.create_blob(file) for file in wide.iterdir()}
    answer = post(address, "/api/create", {"model": "a", "from": STORED, "adapters": files})
    assert "o_proj.lora_a is" in answer.text and str(models) not in answer.text
    del files["adapters.safetensors"]
    assert "must have adapter_config.json with" in refused(
        address, "/api/create", **{"model": "a", "from": STORED, "adapters": files, "stream": False}
    )
    folder = models / ".uploads"
    assert {len(path.name) for path in folder.iterdir()} == {64}
    old = folder / files["adapter_config.json"].removeprefix("sha256:")
    os.utime(old, (0, 0))
    client.create_blob(adapter / "adapters.safetensors")
    assert not old.exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "from is required"),
        ({"from": STORED, "adapters": {"a.gguf": "sha256:0"}}, "adapters"),
        ({"from": STORED, "adapters": {"a": f"sha256:{'0' * 64}"}}, "send the file to /api/blobs"),
        ({"from": STORED, "quantize": "q4_K_M"}, "affine4"),
        ({"from": STORED, "quantize": "auto"}, "use `mlxkv convert`"),
        ({"from": STORED, "system": "Be brief"}, "system: not supported"),
        ({"from": STORED, "template": "x"}, "template: not supported"),
        ({"files": {"a": "sha256:0"}}, "files: not supported"),
        ({"from": STORED, "parameters": {"num_ctx": 10**9}}, "context"),
        ({"from": STORED, "parameters": {"seed": 1}}, "parameters.seed: not supported"),
    ],
)
def test_create_refuses_what_a_model_does_not_keep(address, models, body, words):
    assert words in refused(address, "/api/create", model="new", **body)
    assert [path.name for path in models.iterdir() if not path.name.startswith(".")] == ["tiny-1k"]


def test_pull_reports_its_progress(client, monkeypatch):
    def pull(name, *, report):
        assert name == "smollm2"
        for done in (0, 50, 100):
            report("downloading", done, 100)
        report("converting smollm2:135m", 0, 0)

    monkeypatch.setattr(resolve, "pull", pull)
    parts = list(client.pull("smollm2", stream=True))
    assert [part.status for part in parts] == [
        "downloading", "downloading", "converting smollm2:135m", "success",
    ]  # fmt: skip
    assert (parts[0].completed, parts[1].completed, parts[1].total) == (0, 100, 100)
    assert client.pull("smollm2").status == "success"


def test_a_pull_that_fails_says_why(client, monkeypatch):
    def pull(name, *, report):
        raise DownloadError("no network")

    monkeypatch.setattr(resolve, "pull", pull)
    for stream in (True, False):
        with pytest.raises(ollama.ResponseError, match="no network") as caught:
            list(client.pull("org/model", stream=stream))
        assert caught.value.status_code == 502


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "x.gguf", "./x", "nothing-like-it"])
def test_pull_takes_no_path(address, models, monkeypatch, name):
    monkeypatch.setattr(resolve, "pull", lambda *_, **__: pytest.fail("pulled"))
    assert post(address, "/api/pull", {"model": name}).status_code == 404


def test_a_pull_blocks_nobody_and_ends_with_its_client(address, client, monkeypatch):
    ended = threading.Event()

    def pull(name, *, report):
        try:
            for i in range(1000):
                report(f"step {i}", 0, 0)
                time.sleep(0.01)
        finally:
            ended.set()

    monkeypatch.setattr(resolve, "pull", pull)
    with httpx.stream("POST", f"{address}/api/pull", json={"model": "smollm2"}) as response:
        reports = response.iter_lines()
        assert json.loads(next(reports)) == {"status": "step 0"}
        assert client.chat(MODEL, HELLO).message.content == "Hello world"
        assert not ended.is_set()
    assert ended.wait(10)
