"""What a request meets before any API does: who may ask, from where, and how much."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mlxkv.engine.messages import Busy
from mlxkv.errors import ContextExceeded, KVCacheFull, UsageError
from mlxkv.server.config import ServerConfig, is_loopback
from mlxkv.server.edge.api_keys import owner_of
from mlxkv.server.json_route import MAX_DEPTH
from tests.support.fake_engine import MODEL, FakeEngine, serving

CHAT = "/v1/chat/completions"
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine()
    with serving(engine, max_body_bytes=10_000) as url:
        yield engine, url


@pytest.fixture(scope="module")
def locked() -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine()
    with serving(engine, api_keys=KEYS, origins=("https://app.example",)) as url:
        yield engine, url


def post(url: str, body: Any = HELLO, **options: Any) -> httpx.Response:
    return httpx.post(url + CHAT, json=body, **options)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_an_address_that_others_can_reach_needs_a_key(host):
    with pytest.raises(UsageError, match="an API key is required"):
        ServerConfig(host=host)
    assert ServerConfig(host=host, api_keys=("secret",)).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8", "[::1]"])
def test_loopback_needs_none(host):
    assert is_loopback(host)
    assert ServerConfig(host=host).api_keys == ()


@pytest.mark.parametrize("key", ["", " ", "two words", "schlüssel", "a\n"])
def test_a_key_is_printable_and_not_empty(key):
    with pytest.raises(UsageError):
        ServerConfig(api_keys=(key,))


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:80", "127.0.0.1:11434", "[::1]:8", "a.localhost", "192.168.1.5"],
)
def test_addresses_and_local_names_are_hosts_of_the_server(server, host):
    assert post(server[1], headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "local host", "a:b"],
)
def test_another_host_is_refused(server, host):
    engine, url = server
    n_asks = len(engine.asks)
    answer = post(url, headers={"host": host})
    assert answer.status_code == 403 and "Host" in answer.json()["error"]["message"]
    assert len(engine.asks) == n_asks


def test_a_configured_host_is_the_servers():
    with serving(FakeEngine(), hosts=("Mini.local",)) as url:
        assert post(url, headers={"host": "mini.local:5"}).status_code == 200


def test_a_request_without_a_host_or_with_two_is_refused(server):
    for hosts in ("", "Host: localhost\r\nHost: evil.example\r\n"):
        answer = raw(
            server[1], f"GET /health HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n".encode()
        )
        assert answer.split(b" ")[1] in (b"400", b"403")


def raw(url: str, request: bytes) -> bytes:
    """What the server answers to these bytes."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


def test_the_engine_hears_of_a_request_before_its_body_comes(locked):
    engine, url = locked
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
    engine.expected.clear()
    for key in ("wrong", KEYS[1]):
        more = f"Authorization: Bearer {key}\r\nUser-Agent: claude-cli/2.0 (x)\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall((head + more).encode())
            if key == "wrong":
                assert b" 401 " in connection.recv(65536)
            until = time.monotonic() + 10
            while key != "wrong" and not engine.expected and time.monotonic() < until:
                time.sleep(0.001)
    assert engine.expected == [(owner_of(KEYS[1]), "claude-cli")]


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost.evil.example", "http://x@localhost:1"],
)
def test_a_web_page_of_another_origin_is_refused(server, origin):
    answer = post(server[1], headers={"origin": origin})
    assert answer.status_code == 403 and "origin" in answer.json()["error"]["message"]
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost:3000",
        "https://127.0.0.1",
        "http://[::1]:8080",
        "app://obsidian.md",
        "vscode-webview://0abc-def",
        "file://",
        "tauri://localhost",
    ],
)
def test_pages_of_this_machine_and_its_programs_may_ask_and_read(server, origin):
    answer = post(server[1], headers={"origin": origin})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("host", ["host.docker.internal", "mac-mini.local", "app.localhost"])
def test_names_that_no_public_server_gives_out_are_the_servers(server, host):
    assert post(server[1], headers={"host": f"{host}:11434"}).status_code == 200


def test_a_page_of_the_server_itself_may_ask(server):
    assert post(server[1], headers={"origin": server[1]}).status_code == 200


def test_a_configured_origin_may_ask_and_others_may_not(locked):
    url, key = locked[1], {"authorization": f"Bearer {KEYS[0]}"}
    page = {"origin": "https://app.example"}
    leave = {**page, "access-control-request-method": "POST"}
    assert httpx.options(url + CHAT, headers=leave).status_code == 200
    answer = post(url, headers={**page, **key})
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert answer.status_code == 200
    # A page may read why it is refused.
    refused = post(url, headers=page)
    assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
    other = {"origin": "https://evil.example"}
    assert post(url, headers={**other, **key}).status_code == 403


def test_where_there_are_keys_one_is_required(locked):
    engine, url = locked
    n_asks = len(engine.asks)
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {KEYS[0]}"},
        {"x-api-key": "wrong"},
        {"authorization": b"Bearer \xff\xfe"},
    ):
        answer = post(url, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert len(engine.asks) == n_asks
    assert httpx.get(url + "/nowhere").status_code == 401
    assert httpx.get(url + "/openapi.json").status_code == 401


def test_keys_own_their_pages_and_are_not_told_to_the_engine(locked):
    engine, url = locked
    owners = []
    for headers in (
        {"authorization": f"Bearer {KEYS[0]}"},
        {"x-api-key": KEYS[0]},
        {"authorization": f"bearer {KEYS[1]}"},
    ):
        assert post(url, headers=headers).status_code == 200
        owners.append(engine.last.owner)
    assert owners == [owner_of(KEYS[0]), owner_of(KEYS[0]), owner_of(KEYS[1])]
    assert len(set(owners)) == 2 and not any(key in owner for key in KEYS for owner in owners)


def test_without_keys_everybody_is_one_owner(server):
    post(server[1], headers={"authorization": "Bearer anything"})
    assert server[0].last.owner == ""


def test_health_needs_no_key_and_fails_with_the_engine():
    engine = FakeEngine()
    with serving(engine, api_keys=KEYS) as url:
        assert httpx.get(url + "/health").status_code == 200
        engine.alive = False
        assert httpx.get(url + "/health").status_code == 503


def test_a_body_past_the_limit_is_refused_before_it_is_read(server):
    answer = post(server[1], {**HELLO, "user": "x" * 20_000})
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "the request is larger than 10,000 bytes"


def test_a_body_without_a_length_is_counted_while_it_comes(server):
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    answer = httpx.post(server[1] + CHAT, content=chunks())
    assert answer.status_code == 413 and "error" in answer.json()


@pytest.mark.parametrize(
    "body, said",
    [
        (b"", "Field required"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "valid dictionary"),
        (b"null", ""),
        (b"1", ""),
        (b'{"model": NaN}', "NaN is not a JSON number"),
        (b'{"temperature": -Infinity}', "not a JSON number"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too long"),
        (b"[" * 9000, "nested deeper"),
        (b'{"tools": ' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}", "nested deeper"),
        (b'{"model": "\\ud800"}', "not valid Unicode"),
        (b'{"\\udfff": 1}', "not valid Unicode"),
    ],
)
def test_a_body_that_is_not_plain_json_is_a_bad_request(server, body, said):
    answer = httpx.post(server[1] + CHAT, content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"] and error["type"] == "invalid_request_error"


def test_json_is_json_whatever_its_content_type_says(server):
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=x"):
        answer = httpx.post(
            server[1] + CHAT, content=json.dumps(HELLO), headers={"content-type": kind}
        )
        assert answer.status_code == 200


SHAPES = {
    "/v1/nowhere": {"error"},
    "/nowhere": {"error"},
    "/api/nowhere": {"error"},
    "/v1/messages/nowhere": {"type", "error"},
}


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_a_path_that_is_not_there_is_404_in_its_apis_shape(server, path, method):
    answer = httpx.request(method, server[1] + path)
    assert answer.status_code == 404 and answer.json().keys() == SHAPES[path]
    assert isinstance(answer.json()["error"], str) == path.startswith("/api")


def test_another_method_is_405(server):
    answer = httpx.get(server[1] + CHAT)
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "error, status, code",
    [
        (UsageError("no"), 400, None),
        (ContextExceeded(10, 5), 400, "context_length_exceeded"),
        (KVCacheFull(1, 2, 1), 503, "insufficient_memory"),
        (Busy(1.2), 503, "server_busy"),
        (ValueError("a secret"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("place", ["submit", "answer"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_answer_has_its_status(error, status, code, place, stream):
    engine = FakeEngine(lambda ask: [error])
    if place == "submit":
        engine.busy = error
    with serving(engine) as url:
        answer = post(url, {**HELLO, "stream": stream})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert "secret" not in answer.text
        assert answer.headers.get("retry-after") == ("2" if isinstance(error, Busy) else None)
        engine.busy, engine.script = None, FakeEngine().script
        assert post(url).status_code == 200


def test_other_protocols_are_refused(server):
    upgrade = b"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nConnection: close, Upgrade\r\n"
    answer = raw(server[1], upgrade + b"Upgrade: websocket\r\n\r\n")
    assert answer.split(b" ")[1] in (b"400", b"403", b"404", b"426")
