"""The end of a server: what clients are told, and that it comes in time."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import Request

from mlxkv.engine.answers import EngineAnswer
from mlxkv.engine.messages import PutAway
from mlxkv.generation.outputs import Chunk
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.edge.log_lines import OncePerMinute, WithoutKeys
from tests.server.edge.test_connections import HEAD
from tests.support.connections import sending, until
from tests.support.fake_engine import MODEL, FakeEngine, serving_as

HANGS = """
import os, signal, sys, time
from mlxkv.server.edge.stop import Stop
stop = Stop(float(sys.argv[1]))
stop.install()
for number in sys.argv[2:]:
    os.kill(os.getpid(), int(number))
    time.sleep(0.02)
while True:
    time.sleep(9)
"""
HANGS_AT_THE_END = """
import threading
from mlxkv.commands.serve import _run
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from tests.support.fake_engine import FakeEngine
engine = FakeEngine()
engine.close = threading.Event().wait
_run(engine, ServerConfig(port=0, end_s=1.0))
"""
WITHOUT_MORE_THREADS = """
import os, signal, sys, threading
from mlxkv.commands.serve import _run
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from tests.support.fake_engine import FakeEngine
engine, done = FakeEngine(), []
engine.failed = None
engine.close = lambda: done.append("closed") or print(done)
engine.put_to_sleep = lambda: done.append("asleep")
def refuse(self):
    raise RuntimeError("can't start new thread")
def end():
    sys.stdin.readline()
    threading.Thread.start = refuse
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=end, daemon=True).start()
_run(engine, ServerConfig(port=0))
"""
MESSAGES = [{"role": "user", "content": "hi"}]
STREAMS = {
    "/v1/chat/completions": {"messages": MESSAGES, "stream": True},
    "/v1/completions": {"prompt": "hi", "stream": True},
    "/v1/responses": {"input": "hi", "stream": True},
    "/v1/messages": {"messages": MESSAGES, "stream": True, "max_tokens": 9},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "hi"},
}


def test_streams_and_other_answers_end_with_the_reason_and_nothing_is_waited_for():
    engine = FakeEngine(lambda ask: [Chunk("a", 1), 1e9])
    ended: list[bool] = []

    def ask(path: str, whole: bool) -> tuple[int, bytes]:
        body = {"model": MODEL, **STREAMS[path], **({"stream": False} if whole else {})}
        answer = httpx.post(url + path, json=body, timeout=10)
        return answer.status_code, answer.content

    config = ServerConfig()
    with (
        serving_as(engine, config, on_end=lambda: ended.append(True)) as (url, server),
        sending(url, HEAD),
        sending(url, HEAD + b"Content-Length: 9\r\n\r\n{") as body,
        ThreadPoolExecutor(12) as pool,
    ):
        streams = {path: pool.submit(ask, path, False) for path in STREAMS}
        wholes = {path: pool.submit(ask, path, True) for path in STREAMS}
        until(lambda: [each.n_read for each in engine.answers] == [1] * 12)
        server.stop()
        for path in STREAMS:
            status, content = streams[path].result()
            assert status == 200 and b"the server is stopping" in content, path
            status, content = wholes[path].result()
            assert status == 503 and "error" in json.loads(content), path
        assert body.recv(12) == b"HTTP/1.1 503"
    assert ended and all(answer.cancelled.is_set() for answer in engine.answers)


def test_a_stream_tells_what_its_answer_was_told_before_the_server_stopped():
    """However late the event loop comes to it: an answer that was put away goes on."""

    async def silent() -> dict[str, Any]:
        return await asyncio.Future()

    async def told(*items: Chunk | PutAway) -> list[bytes]:
        stopping, got = asyncio.Event(), []
        state = SimpleNamespace(state=SimpleNamespace(stopping=stopping))
        request = Request({"type": "http", "app": state}, silent)
        answer = EngineAnswer(lambda: None)
        answer.tell(Chunk("begun", 1))

        async def events():
            async for _, chunk in sse.merge([answer]):
                yield chunk.text.encode()

        async def send(message):
            got.append(message.get("body"))
            if message.get("body") == b"begun":
                for item in items:
                    answer.tell(item)
                stopping.set()

        config, name = ServerConfig(), lambda error: type(error).__name__.encode()
        response = await sse.stream(request, events(), config, name)
        await response(request.scope, request.receive, send)
        return got[1:]

    pieces = [Chunk(str(i), i) for i in range(40)]
    found = asyncio.run(told(*pieces, PutAway()))
    assert found == [b"begun", *(piece.text.encode() for piece in pieces), b"PutAway"]
    assert asyncio.run(told(*pieces[:1])) == [b"begun", b"0", b"ServerStopping"]


@pytest.mark.parametrize(
    "within_s, numbers",
    [
        ("0.6", [signal.SIGTERM]),
        ("0.6", [signal.SIGHUP]),
        ("99", [signal.SIGINT, signal.SIGTERM]),
    ],
)
def test_a_process_that_hangs_ends_with_the_signals_code(within_s, numbers):
    command = [sys.executable, "-c", HANGS, within_s, *(str(int(each)) for each in numbers)]
    done = subprocess.run(command, timeout=20, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 128 + numbers[0]
    assert b"not written" in done.stderr


def test_an_engine_that_does_not_close_is_not_waited_for():
    with subprocess.Popen([sys.executable, "-c", HANGS_AT_THE_END], stderr=subprocess.PIPE) as made:
        assert made.stderr is not None and b"listening" in made.stderr.readline()
        made.send_signal(signal.SIGTERM)
        assert made.wait(20) == 128 + signal.SIGTERM


def record(line: int, message: str, *args: object, name: str = "asyncio") -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "a.py", line, message, args, None)


def test_one_line_of_a_kind_and_minute_is_logged_and_the_others_are_counted():
    now = [0.0]
    once = OncePerMinute(lambda: now[0])
    assert [once.filter(record(1, "%d", n)) for n in range(4)] == [True, False, False, False]
    assert once.filter(record(2, "another"))
    now[0] = 61.0
    later = record(1, "%d", 5)
    assert once.filter(later) and later.getMessage() == "5 (and 3 times more)"
    named = [once.filter(record(3, "%d", n, name="mlxkv.server.ignored")) for n in range(12)]
    assert named == [True] * 10 + [False] * 2


def test_no_key_is_logged_in_a_message_or_a_trace():
    keys = ["secret", "secret-longer"]
    try:
        raise ValueError("of secret-longer")
    except ValueError:
        trace = sys.exc_info()
    made = record(1, "GET /?key=%s", "secret")
    made.exc_info = trace
    text = WithoutKeys(lambda: keys).format(made)
    assert "secret" not in text and "GET /?key=***" in text and "ValueError: of ***" in text


def test_it_ends_where_no_thread_can_be_started_any_more():
    command, pipe = [sys.executable, "-c", WITHOUT_MORE_THREADS], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as made:
        assert made.stderr is not None
        url = made.stderr.readline().split()[-1]
        assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        printed, errors = made.communicate("end\n", timeout=60)
    assert (made.returncode, printed.strip()) == (0, "['asleep', 'closed']"), errors
