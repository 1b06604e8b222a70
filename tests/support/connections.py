"""Clients that do not behave as clients do: plain sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.support.fake_engine import FakeAnswer, FakeEngine


@contextlib.contextmanager
def sending(url: str, data: bytes, **options: int) -> Iterator[socket.socket]:
    """A connection on which this was sent."""
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.settimeout(10)
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connection.connect((host, int(port)))
        connection.sendall(data)
        yield connection


def received(connection: socket.socket) -> bytes:
    """All until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def until(holds: Callable[[], object], seconds: float = 10) -> None:
    """Wait until something holds, for some seconds at most."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.005)


def left(engine: FakeEngine, url: str, path: str, body: Any) -> FakeAnswer:
    """Send a request, and go when its answer was begun; that answer."""
    n_before, data = len(engine.answers), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with sending(url, head.encode() + data):
        until(lambda: len(engine.answers) > n_before)
    return engine.answers[-1]
