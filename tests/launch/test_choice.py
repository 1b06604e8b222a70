from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mlxkv.errors import UsageError
from mlxkv.launch.choice import Facts, running_server
from tests.support.fake_engine import FakeEngine, serving


class Ollama(BaseHTTPRequestHandler):
    """Answers the version as Ollama does."""

    def do_GET(self) -> None:
        data = b'{"version": "0.21.2"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def ollama() -> Iterator[int]:
    """The port of a server that is not mlxkv's."""
    server = HTTPServer(("127.0.0.1", 0), Ollama)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def closed() -> int:
    """A port at which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLXKV_SERVER", raising=False)
    monkeypatch.delenv("MLXKV_API_KEY", raising=False)


def test_a_server_at_the_default_address_is_used(monkeypatch):
    with serving(FakeEngine()) as url:
        monkeypatch.setattr("mlxkv.server.client.PORT", int(url.rsplit(":", 1)[1]))
        assert str(running_server(None, None)) == url


def test_another_program_at_the_default_address_is_left_alone(monkeypatch, ollama):
    monkeypatch.setattr("mlxkv.server.client.PORT", ollama)
    assert running_server(None, None) is None


def test_nothing_at_the_default_address_means_to_start_one(monkeypatch, closed):
    monkeypatch.setattr("mlxkv.server.client.PORT", closed)
    assert running_server(None, None) is None


@pytest.mark.parametrize("by_variable", [True, False])
def test_another_program_at_an_address_of_the_users_is_an_error(monkeypatch, ollama, by_variable):
    address = f"127.0.0.1:{ollama}"
    if by_variable:
        monkeypatch.setenv("MLXKV_SERVER", address)
    with pytest.raises(UsageError, match="not `mlxkv serve`"):
        running_server(None if by_variable else address, None)


def test_nothing_at_an_address_that_was_asked_for_is_an_error(closed):
    with pytest.raises(UsageError, match="no server at"):
        running_server(f"127.0.0.1:{closed}", None)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (Facts(16_384, True), []),
        (Facts(16_383, True), ["m has a context of 16,383 tokens; Codex needs 16,384"]),
        (Facts(65_536, False), ["the chat template of m has no tools"]),
        (Facts(0, False), ["a context of 0", "has no tools"]),
    ],
)
def test_a_model_that_a_program_cannot_work_with_is_warned_of(facts, words):
    found = facts.warnings("m", "Codex")
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))
