"""`mlxkv serve` as its users meet it: a process, real clients, requests that want to kill it."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

from tests.support.command_line import chat_model, environment, mlxkv
from tests.support.server_process import Server

MODEL = "tiny"
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
LONG = "".join(chr(97 + (i * i + 3 * i) % 23) for i in range(600))


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    chat_model(home / "models" / MODEL, max_position_embeddings=2048)
    return environment(home, MLXKV_KV=str(home / "kv"), MLXKV_KV_DISK="1GiB")


@pytest.fixture(scope="module")
def server(env) -> Iterator[Server]:
    made = Server(env)
    yield made
    assert made.stop() == 0, "".join(made.lines)


def client_of(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


def say(client: openai.OpenAI, messages: list[Any] = HELLO, n: int = 12, **options: Any) -> str:
    made = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=n, temperature=0, **options
    )
    return made.choices[0].message.content or ""


def test_three_clients_get_the_same_answer(server, client):
    expected = say(client)
    assert expected
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=12, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == expected
    with ollama.Client(host=server.url) as theirs:
        chat = theirs.chat(
            model=MODEL, messages=HELLO, options={"num_predict": 12, "temperature": 0}
        )
    assert chat.message.content == expected
    with anthropic.Anthropic(base_url=server.url, api_key="none") as other:
        made = other.messages.create(model=MODEL, max_tokens=12, messages=HELLO)
    assert "".join(block.text for block in made.content if block.type == "text") == expected


def test_answers_at_a_time_are_those_alone(client):
    prompts = [[{"role": "user", "content": LONG[: 40 * i]}] for i in range(1, 9)]
    alone = [say(client, prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: say(client, prompt), prompts))
    assert together == alone


def test_a_schema_holds(client):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    text = say(
        client,
        n=900,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )
    made = json.loads(text)
    assert made.keys() == {"ok", "n"} and made["n"] in (1, 2)


def test_ps_and_stop(server, client):
    say(client)
    done = mlxkv("ps", "--server", server.url, env=server.env)
    assert done.returncode == 0, done.stderr
    assert MODEL in done.stdout and "KV USED" in done.stdout
    assert mlxkv("stop", MODEL, "--server", server.url, env=server.env).returncode == 0
    assert MODEL not in mlxkv("ps", "--server", server.url, env=server.env).stdout
    assert say(client)


def test_a_model_has_one_digest_in_the_list_and_in_memory(server, client):
    say(client)
    with ollama.Client(host=server.url) as theirs:
        stored = {model.model: model.digest for model in theirs.list().models}
        (loaded,) = theirs.ps().models
    assert loaded.digest == stored[MODEL]


def post(server: Server, path: str, body: bytes, **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json", **headers}
    return httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=30)


def chat_body(**changes: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 4, **changes}).encode()


def never_reads(server: Server) -> None:
    """Asks for a long stream and leaves it unread."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        body = chat_body(stream=True, max_tokens=1500)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + body)


def hangs_up(server: Server) -> None:
    """Reads a little of a stream and goes."""
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        content=chat_body(stream=True, max_tokens=1500),
        timeout=30,
    ) as answer:
        for _ in answer.iter_bytes():
            return


def sends_half(server: Server) -> None:
    """Promises a body that never comes."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", "1000")
    connection.endheaders()
    connection.send(b"{")
    connection.close()


REFUSED: list[tuple[str, bytes]] = [
    ("/v1/chat/completions", b""),
    ("/v1/chat/completions", b"{"),
    ("/v1/chat/completions", b"[]"),
    ("/v1/chat/completions", b"[" * 100_000),
    ("/v1/chat/completions", b"\xff\xfe"),
    ("/v1/chat/completions", chat_body(messages=[])),
    ("/v1/chat/completions", chat_body(messages="hi")),
    ("/v1/chat/completions", chat_body(messages=[{"role": "user", "content": 5}])),
    ("/v1/chat/completions", chat_body(messages=[{"role": "nobody", "content": "x"}])),
    ("/v1/chat/completions", chat_body(messages=[{"role": "user", "content": 9000 * "x"}])),
    ("/v1/chat/completions", chat_body(stop=5)),
    ("/v1/chat/completions", chat_body(top_k=-7)),
    ("/v1/chat/completions", chat_body(temperature=-1)),
    ("/v1/chat/completions", chat_body(max_tokens=0)),
    ("/v1/chat/completions", chat_body(logit_bias={"99999999": 5})),
    ("/v1/chat/completions", chat_body(logit_bias={"-1": 5})),
    ("/v1/chat/completions", chat_body(logit_bias={"a": 5})),
    ("/v1/chat/completions", chat_body(model="../../etc/passwd")),
    ("/v1/chat/completions", chat_body(model="/etc")),
    ("/v1/chat/completions", chat_body(model="")),
    ("/v1/chat/completions", chat_body(functions=[{"name": "f"}])),
    ("/v1/chat/completions", chat_body(n=10_000)),
    ("/v1/chat/completions", chat_body(response_format={"type": "json_schema"})),
    ("/v1/completions", json.dumps({"model": MODEL, "prompt": ""}).encode()),
    ("/v1/completions", json.dumps({"model": MODEL, "prompt": [10**9]}).encode()),
    ("/v1/completions", json.dumps({"model": MODEL, "prompt": []}).encode()),
    ("/v1/embeddings", json.dumps({"model": MODEL, "input": "x"}).encode()),
    ("/api/chat", json.dumps({"model": "nope", "messages": HELLO}).encode()),
    ("/api/generate", json.dumps({"model": "../x", "prompt": "x"}).encode()),
    ("/api/copy", json.dumps({"source": MODEL, "destination": "../../x"}).encode()),
    ("/v1/messages", json.dumps({"model": MODEL, "messages": HELLO}).encode()),
]
ODD_BUT_ANSWERED: list[tuple[str, bytes]] = [
    ("/v1/chat/completions", chat_body(top_k=10**6, temperature=1)),
    ("/v1/chat/completions", chat_body(top_p=1e-9, temperature=2)),
    ("/v1/chat/completions", chat_body(seed=2**63 - 1, temperature=1)),
    ("/v1/chat/completions", chat_body(logit_bias={"5": 100, "6": -100})),
    ("/v1/chat/completions", chat_body(stop=["e", "a"], logprobs=True, top_logprobs=3)),
    (
        "/v1/completions",
        json.dumps({"model": MODEL, "prompt": ["a", "b"], "max_tokens": 3}).encode(),
    ),
]


def test_nothing_kills_it(server, client):
    expected = say(client)
    rng = random.Random(7)
    acts: list[Callable[[], None]] = []

    def refused(path: str, body: bytes) -> None:
        answer = post(server, path, body)
        assert 400 <= answer.status_code < 500, (path, body[:80], answer.status_code, answer.text)
        assert "error" in answer.json()

    def answered(path: str, body: bytes) -> None:
        answer = post(server, path, body)
        assert answer.status_code == 200, (path, body[:80], answer.text)

    def exact_hit() -> None:
        whole = [*HELLO, {"role": "assistant", "content": expected}]
        say(client, whole)
        say(client, whole)

    acts += [lambda p=path, b=body: refused(p, b) for path, body in REFUSED]
    acts += [lambda p=path, b=body: answered(p, b) for path, body in ODD_BUT_ANSWERED]
    acts += [lambda f=f: f(server) for f in (never_reads, hangs_up, sends_half)] * 2
    acts += [exact_hit] * 2
    rng.shuffle(acts)
    for i, act in enumerate(acts):
        act()
        if i % 4 == 0:
            assert say(client) == expected
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_under_half_requests_and_streams_and_its_prefixes_are_kept(env, number):
    env = {**env, "MLXKV_KV": f"{env['MLXKV_KV']}-{number}"}
    server = Server(env)
    url = httpx.URL(server.url)
    half = socket.create_connection((url.host, url.port))
    half.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
    with half, client_of(server) as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": LONG}],
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        assert server.stop(number) == 0
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
    assert list(Path(env["MLXKV_KV"]).rglob("*.safetensors"))
    assert not any("Traceback" in line for line in server.lines), "".join(server.lines)


def test_killed_and_started_again_it_goes_on_from_pages(env):
    conversation: list[Any] = [{"role": "user", "content": LONG}]
    first = Server(env)
    with client_of(first) as client:
        expected = say(client, conversation)
        say(client, conversation)  # a second use is what goes to disk at once
        say(client, [*conversation, {"role": "assistant", "content": "x"}, *HELLO])
    pages = Path(env["MLXKV_KV"])
    for _ in range(100):
        if list(pages.rglob("*.safetensors")):
            break
        threading.Event().wait(0.1)
    first.stop(signal.SIGKILL)
    second = Server(env)
    try:
        with client_of(second) as client:
            made = client.chat.completions.create(
                model=MODEL, messages=conversation, max_tokens=12, temperature=0
            )
        assert made.choices[0].message.content == expected
        assert made.usage is not None and made.usage.prompt_tokens_details is not None
        assert (made.usage.prompt_tokens_details.cached_tokens or 0) >= 256
    finally:
        assert second.stop() == 0


def test_other_machines_need_a_key(env):
    done = mlxkv("serve", "--host", "0.0.0.0", "--port", "0", env=env)
    assert done.returncode == 2 and "--api-key" in done.stderr


def test_a_key_is_asked_for(env):
    server = Server(env, "--api-key", "secret")
    try:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        with client_of(server, "secret") as client:
            assert say(client)
    finally:
        assert server.stop() == 0


def test_a_port_in_use_is_one_line(server):
    port = server.url.rpartition(":")[2]
    done = mlxkv("serve", "--port", port, env=server.env)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr and port in done.stderr


def test_no_server_is_one_line(env):
    done = mlxkv("ps", "--server", "127.0.0.1:9", env=env)
    assert done.returncode == 2 and "mlxkv serve" in done.stderr
    assert os.environ.get("MLXKV_SERVER") is None
