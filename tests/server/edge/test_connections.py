"""Clients that send half of a request, or read nothing: real sockets, with short times."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.exceptions import HTTPException

from mlxkv.server.config import ServerConfig, bodies_bytes
from mlxkv.server.edge.bodies import MESSAGE_BYTES, Bodies
from mlxkv.server.edge.serving import OTHER_FILES
from tests.support.connections import received, sending, until
from tests.support.fake_engine import MODEL, FakeEngine, says, serving, serving_as
from tests.support.paths import ROOT

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
QUICK = {"head_s": 0.3, "body_s": 0.3, "stall_s": 0.3}


def ask(url: str, path: str = "/v1/chat/completions", **fields: object) -> httpx.Response:
    return httpx.post(url + path, json={**HELLO, **fields}, timeout=10)


@pytest.fixture(scope="module")
def quick() -> Iterator[str]:
    with serving(FakeEngine(), **QUICK) as url:
        yield url


@pytest.mark.parametrize("data", [HEAD, HEAD + b"x: " + b"y" * 9000])
def test_a_head_that_does_not_come_in_time_ends_its_connection(quick, data):
    with sending(quick, data) as connection:
        assert received(connection).startswith(b"HTTP/1.1 408 ")
    assert ask(quick).status_code == 200


def test_a_connection_without_a_request_is_closed_without_an_answer(quick):
    with sending(quick, b"") as connection:
        assert received(connection) == b""


def test_a_head_that_trickles_has_no_more_time(quick):
    with sending(quick, HEAD) as connection:
        connection.settimeout(0.05)
        found = b""
        for _ in range(60):
            with contextlib.suppress(TimeoutError):
                found += connection.recv(4096)
                break
            connection.sendall(b"a: b\r\n")
        assert found.startswith(b"HTTP/1.1 408 ")


def test_the_second_head_of_a_connection_has_a_time_as_well(quick):
    with sending(quick, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert b"200 OK" in connection.recv(4096)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert b"HTTP/1.1 408 " in received(connection)


@pytest.mark.parametrize(
    "path, words",
    [
        ("/v1/chat/completions", {"type": "invalid_request_error"}),
        ("/v1/messages", {"type": "invalid_request_error"}),
        ("/api/chat", None),
    ],
)
def test_a_body_that_does_not_come_in_time_is_408_in_its_apis_words(quick, path, words):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with sending(quick, head.encode() + b'{"model": ') as connection:
        status, _, body = received(connection).partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 408 ")
    error = json.loads(body)["error"]
    assert "too slowly" in (error if words is None else error["message"])
    assert words is None or words.items() <= error.items()


def test_the_rest_of_a_body_that_was_answered_has_a_time_as_well(quick):
    head = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with sending(quick, head) as connection:
        assert received(connection).startswith(b"HTTP/1.1 404 ")


def test_half_requests_keep_no_client_out():
    config = ServerConfig()
    with (
        serving_as(FakeEngine(), config, n_files=OTHER_FILES + 8) as (url, server),
        contextlib.ExitStack() as stack,
    ):
        halves = [stack.enter_context(sending(url, HEAD)) for _ in range(30)]
        assert ask(url).status_code == 200
        assert len(server.server_state.connections) <= 8
        assert received(halves[0]) == b""


FILES = """
import resource
from mlxkv.server.edge.serving import OTHER_FILES, raise_file_limit

for soft, hard in ((256, 4096), (256, 256)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(raise_file_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], OTHER_FILES)
"""


def test_256_files_as_on_macos_are_raised_as_far_as_may_be_and_leave_room_for_connections():
    done = subprocess.run(
        [sys.executable, "-c", FILES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    raised, kept = (list(map(int, line.split())) for line in done.stdout.splitlines())
    assert raised[:2] == [4096, 4096] and kept[:2] == [256, 256]
    assert 256 - kept[2] >= 32


def test_half_bodies_keep_no_client_out():
    head = HEAD + b"Content-Length: 1000\r\n\r\n{"
    with (
        serving(FakeEngine(), max_connections=4) as url,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(12):
            stack.enter_context(sending(url, head))
        assert ask(url).status_code == 200


def test_where_all_connections_have_requests_a_new_one_is_refused():
    engine = FakeEngine(lambda ask: [1e9])
    with (
        serving(engine, max_connections=2) as url,
        httpx.Client(timeout=10) as client,
        contextlib.ExitStack() as stack,
    ):
        body = json.dumps({**HELLO, "stream": True}).encode()
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
        for _ in range(2):
            stack.enter_context(sending(url, head + body))
        until(lambda: len(engine.asks) == 2)
        answer = client.get(url + "/health")
        assert answer.status_code == 503 and "too many" in answer.json()["error"]["message"]


def test_all_bodies_together_have_a_bound_that_small_requests_do_not_meet():
    head = HEAD + b"Content-Length: 60000\r\n\r\n"
    with serving_as(FakeEngine(), ServerConfig(max_bodies_bytes=100_000)) as (url, server):
        bodies = server.config.app.state.bodies  # pyright: ignore[reportAttributeAccessIssue]
        with (
            sending(url, head + b" " * 50_000) as first,
            sending(url, head + b" " * 40_000),
        ):
            until(lambda: bodies.held_bytes >= 90_000)
            assert ask(url, user="x" * 20_000).status_code == 200
            assert received(first).startswith(b"HTTP/1.1 503 ")
        until(lambda: not bodies.held_bytes)


def test_a_body_in_single_bytes_is_held_for_more_than_its_length():
    async def pieces() -> int:
        bodies = Bodies(ServerConfig(max_bodies_bytes=100 * MESSAGE_BYTES))
        with bodies.body({}) as body:
            with pytest.raises(HTTPException) as caught:
                for _ in range(1000):
                    await body.receive(piece)
            n_bytes = body.n_bytes
        assert caught.value.status_code == 503 and bodies.held_bytes == 0
        return n_bytes

    async def piece() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert asyncio.run(pieces()) < 100


def test_a_file_has_a_bound_of_its_own_and_is_not_held():
    async def send(n_pieces: int) -> Bodies:
        config = ServerConfig(max_body_bytes=100, max_bodies_bytes=3000, max_upload_bytes=10_000)
        bodies = Bodies(config)
        with bodies.body({}, "/api/blobs/sha256:0") as body:
            for _ in range(n_pieces):
                await body.receive(piece)
            assert bodies.held_bytes < 2000
        return bodies

    async def piece() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    assert asyncio.run(send(10)).held_bytes == 0
    with pytest.raises(HTTPException) as caught:
        asyncio.run(send(11))
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    "memory_gib, bodies_mib", [(0.25, 64), (1, 64), (2, 128), (4, 256), (64, 256)]
)
def test_little_memory_holds_few_bodies(memory_gib, bodies_mib):
    assert bodies_bytes(int(memory_gib * 2**30)) == bodies_mib << 20


def test_a_stream_that_is_not_read_is_cancelled_and_its_connection_closed():
    engine = FakeEngine(says(*["x" * 100_000] * 200))
    with serving_as(engine, ServerConfig(stall_s=0.3)) as (url, server):
        body = json.dumps({**HELLO, "stream": True}).encode()
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
        with sending(url, head + body, SO_RCVBUF=4096):
            until(lambda: engine.answers)
            assert engine.answers[0].cancelled.wait(10)
            assert engine.answers[0].n_read < 200
            until(lambda: not server.server_state.connections)


def test_an_answer_that_is_not_read_is_not_kept_for_ever():
    engine = FakeEngine(says(*["x" * 100_000] * 200))
    with serving_as(engine, ServerConfig(stall_s=0.3)) as (url, server):
        body = json.dumps(HELLO).encode()
        head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        with sending(url, head + body, SO_RCVBUF=4096) as connection:
            assert connection.recv(10)
            until(lambda: not server.server_state.connections)


def test_where_no_file_is_left_for_a_connection_one_is_dropped_and_no_trace_logged(caplog):
    with (
        serving_as(FakeEngine(), ServerConfig()) as (url, server),
        sending(url, HEAD) as half,
    ):
        until(lambda: server.server_state.connections)
        loop = server.servers[0].get_loop()
        error = OSError(errno.EMFILE, "Too many open files")
        loop.call_soon_threadsafe(loop.call_exception_handler, {"exception": error})
        assert received(half) == b""
        assert ask(url).status_code == 200
    assert [record.exc_info for record in caplog.records] == [None]
