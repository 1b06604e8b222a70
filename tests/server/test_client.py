"""What asks a server: addresses, and answers that are no answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mlxkv import errors
from mlxkv.server.client import Server

Reply = Callable[[Any], None]
"""Answers a request; gets its handler, which has the `body`."""


@contextmanager
def replying(reply: Reply) -> Iterator[Server]:
    """A server that answers every request so."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply(self)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield Server.at(f"127.0.0.1:{made.server_port}", "")
    finally:
        made.shutdown()
        made.server_close()


def whole(status: int, body: bytes, **headers: str) -> Reply:
    """An answer in one piece."""

    def reply(handler: Any) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def chunked(*parts: bytes, last: bytes = b"0\r\n\r\n") -> Reply:
    """An answer in pieces, which may break off."""

    def reply(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for part in parts:
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        handler.wfile.write(last)
        handler.close_connection = True

    return reply


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("mac-mini.local", "http://mac-mini.local:11434"),
        ("http://mac-mini.local", "http://mac-mini.local:80"),
        ("https://Host.example/mlxkv/", "https://host.example:443/mlxkv"),
        ("[::1]:9", "http://[::1]:9"),
        ("http://localhost:11434/", "http://localhost:11434"),
    ],
)
def test_an_address_may_be_short(address, url):
    assert str(Server.at(address)) == url


@pytest.mark.parametrize(
    "address",
    ["", " ", "ftp://x", "http://", "::1", "a b", "host:", "host:0", "host:70000", "host:x",
     "user:key@host", "host/?q", "http://a\nb"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address, monkeypatch):
    with pytest.raises(
        errors.UsageError, match=r"server must be an address like 127\.0\.0\.1:11434"
    ):
        Server.at(address)
    if address:
        monkeypatch.setenv("MLXKV_SERVER", address)
        with pytest.raises(errors.UsageError, match="MLXKV_SERVER must be an address"):
            Server.at()


def test_the_environment_names_a_server_and_a_key_where_nobody_does(monkeypatch):
    for name in ("MLXKV_SERVER", "MLXKV_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert (str(Server.at()), Server.at().key) == ("http://127.0.0.1:11434", "")
    monkeypatch.setenv("MLXKV_SERVER", "there:1")
    monkeypatch.setenv("MLXKV_API_KEY", "secret")
    assert (str(Server.at()), Server.at().key) == ("http://there:1", "secret")
    assert (str(Server.at("here:2", "own")), Server.at("here:2", "own").key) == (
        "http://here:2",
        "own",
    )


def test_a_key_that_cannot_be_sent_is_refused():
    for key in ("a\nb", "schlüssel"):
        with pytest.raises(errors.UsageError, match="api_key must be printable ASCII"):
            Server.at("host", key)


def test_requests_carry_the_key_and_go_below_the_path():
    seen: list[tuple[str, str | None, str | None, bytes]] = []

    def reply(handler: Any) -> None:
        headers = handler.headers
        seen.append((handler.path, headers["Authorization"], headers["Content-Type"], handler.body))
        whole(200, b"{}")(handler)

    with replying(reply) as server:
        below = Server(server.scheme, server.host, server.port, "/mlxkv", "secret")
        assert below.ask("POST", "/api/show", {"model": "m"}) == {}
        assert server.ask("GET", "/api/ps") == {}
    assert seen == [
        ("/mlxkv/api/show", "Bearer secret", "application/json", b'{"model": "m"}'),
        ("/api/ps", None, None, b""),
    ]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.UsageError),
        (401, errors.UsageError),
        (403, errors.UsageError),
        (404, errors.ModelNotFound),
        (413, errors.UsageError),
        (422, errors.CheckpointError),
        (500, errors.MlxkvError),
        (502, errors.DownloadError),
        (503, errors.OutOfMemory),
        (507, errors.OutputError),
    ],
)
def test_an_error_keeps_its_words_and_its_exit_code(status, kind):
    with replying(whole(status, b'{"error": "it is so"}')) as server:
        with pytest.raises(errors.MlxkvError, match=rf"answered {status}: it is so$") as asked:
            server.ask("GET", "/")
        with pytest.raises(errors.MlxkvError, match="it is so") as streamed:
            next(server.lines("/", {}))
    assert type(asked.value) is type(streamed.value) is kind


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": {"message": "OpenAI says so"}}', "answered 404: OpenAI says so$"),
        (b"<h1>Not\nFound</h1>", "answered 404: <h1>Not Found</h1>$"),
        (b"", "answered 404: no body$"),
        (b"[]", r"answered 404: \[\]$"),
    ],
)
def test_an_error_in_another_shape_is_one_line_too(body, words):
    with replying(whole(404, body)) as server, pytest.raises(errors.ModelNotFound, match=words):
        server.ask("GET", "/")


def test_a_server_that_is_busy_is_not_out_of_memory():
    reply = whole(503, b'{"error": "too many"}', Retry_After="2")
    with replying(reply) as server, pytest.raises(errors.MlxkvError, match="too many") as caught:
        server.ask("GET", "/")
    assert type(caught.value) is errors.MlxkvError


def test_a_redirect_is_not_followed():
    reply = whole(307, b"", Location="http://127.0.0.1:9/")
    with replying(reply) as server, pytest.raises(errors.MlxkvError, match="answered 307: no body"):
        server.ask("GET", "/")


@pytest.mark.parametrize("body", [b"hello", b"[1]", b"\xff"])
def test_what_is_no_json_object_is_another_server(body):
    words = "does not answer like `mlxkv serve`"
    with replying(whole(200, body)) as server, pytest.raises(errors.MlxkvError, match=words):
        server.ask("GET", "/")
    with (
        replying(whole(200, body + b"\n")) as server,
        pytest.raises(errors.MlxkvError, match=words),
    ):
        next(server.lines("/", {}))


def test_what_speaks_no_http_is_another_server():
    def reply(handler: Any) -> None:
        handler.wfile.write(b"220 mail.example ESMTP\r\n")
        handler.close_connection = True

    with replying(reply) as server, pytest.raises(errors.MlxkvError, match="does not answer like"):
        server.ask("GET", "/")


def test_no_server_is_said_with_what_to_do():
    with pytest.raises(
        errors.UsageError, match=r"no server at http://127\.0\.0\.1:9 .*`mlxkv serve`"
    ):
        Server.at("127.0.0.1:9").ask("GET", "/")


def test_lines_come_one_by_one():
    go_on = threading.Event()

    def reply(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        # A piece is no line: the second comes in two.
        for piece in (b'{"a":1}\n', b'{"a":', b"2}\n", b""):
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            handler.wfile.flush()
            assert go_on.wait(10), "the first line was not read before the second came"

    with replying(reply) as server, closing(server.lines("/", {})) as lines:
        assert next(lines) == {"a": 1}
        go_on.set()
        assert next(lines) == {"a": 2}


def test_an_error_that_ends_a_stream_has_the_exit_code_of_its_status():
    first = b'{"a":1}\n'
    ends = [
        ({"error": "damaged", "status": 422}, errors.CheckpointError),
        ({"error": "who knows"}, errors.MlxkvError),
    ]
    for end, kind in ends:
        with replying(chunked(first, json.dumps(end).encode() + b"\n")) as server:
            lines = server.lines("/", {})
            assert next(lines) == {"a": 1}
            with pytest.raises(errors.MlxkvError, match=str(end["error"])) as caught:
                next(lines)
        assert type(caught.value) is kind


@pytest.mark.parametrize("last", [b"5\r\n{", b'3\r\n{"a\r\n0\r\n\r\n'])
def test_half_a_line_is_an_error_and_no_end(last):
    with replying(chunked(b'{"a":1}\n', last=last)) as server:
        lines = server.lines("/", {})
        assert next(lines) == {"a": 1}
        with pytest.raises(errors.MlxkvError, match="before the answer was complete"):
            next(lines)


def test_closing_a_stream_closes_its_connection():
    gone = threading.Event()

    def reply(handler: Any) -> None:
        chunked(b'{"a":1}\n')(handler)
        handler.connection.settimeout(10)
        if handler.connection.recv(1) == b"":
            gone.set()

    with replying(reply) as server:
        lines = server.lines("/", {})
        next(lines)
        assert not gone.is_set()
        lines.close()
        assert gone.wait(10)
