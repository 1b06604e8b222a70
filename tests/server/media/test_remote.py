"""Files that requests name by URL: from allowed servers, over checked addresses, within bounds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anthropic
import openai
import pytest

from mlxkv.errors import UsageError
from mlxkv.server.media import network, read
from mlxkv.server.media.abilities import Abilities
from mlxkv.server.media.hosts import FetchError, media_hosts, target_of
from mlxkv.server.media.remote import MAX_REDIRECTS, Remote
from tests.support.fake_engine import MODEL, FakeEngine, serving

PNG = b"\x89PNG of a server"


class Pictures(BaseHTTPRequestHandler):
    """Answers by the path; `asked` has each path."""

    protocol_version = "HTTP/1.1"
    asked: list[str]
    waits = threading.Event()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        kind, _, rest = self.path.lstrip("/").partition("?")
        status, headers, body = 200, {"Content-Type": "image/png"}, PNG
        if kind == "to":
            status, headers, body = 302, {"Location": rest}, b""
        elif kind == "round":
            status, headers, body = 307, {"Location": "/round"}, b""
        elif kind == "type":
            headers = {"Content-Type": rest} if rest else {}
        elif kind == "status":
            status = int(rest)
        elif kind == "packed":
            headers["Content-Encoding"] = "gzip"
        elif kind == "host":
            body = (self.headers["Host"] + str("cookie" in self.headers)).encode()
        elif kind == "slow":
            self.waits.wait(10)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if kind != "endless":
            self.send_header("Content-Length", rest if kind == "long" else str(len(body)))
        self.end_headers()
        if kind == "endless":
            body = body * 100
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    Pictures.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.daemon_threads = True
    thread = threading.Thread(target=lambda: server.serve_forever(0.01))
    thread.start()
    yield server.server_address[1]
    Pictures.waits.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fetch(port: int) -> Any:
    def get(path: str, *hosts: str, host: str = "127.0.0.1", **limits: Any) -> bytes:
        allowed = [f"{each}:{port}" for each in hosts or ("127.0.0.1",)]
        remote = Remote(media_hosts(allowed), limits.pop("seconds", 20.0))
        limits = {"kind": "image", "max_bytes": 1000, **limits}
        return asyncio.run(remote.fetch(f"http://{host}:{port}{path}", **limits))

    return get


def test_an_address_that_the_operator_gives_may_be_inside_the_network(fetch, port):
    assert fetch("/a.png?x=1") == PNG
    assert Pictures.asked[-1] == "/a.png?x=1"
    assert fetch("/host") == f"127.0.0.1:{port}False".encode()


def test_a_name_that_leads_into_the_network_is_refused(fetch):
    n_asked = len(Pictures.asked)
    with pytest.raises(FetchError, match="into the server's own network"):
        fetch("/a.png", "localhost", host="localhost")
    assert len(Pictures.asked) == n_asked


def test_a_name_with_one_address_inside_the_network_is_refused(fetch, port, monkeypatch):
    async def resolved(self: Any, host: str, port: int, **options: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, port)) for address in ("93.184.215.14", "127.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)
    with pytest.raises(FetchError, match="into the server's own network"):
        fetch("/a.png", "pictures.example", host="pictures.example")


def test_a_name_is_connected_to_by_the_address_that_was_checked(fetch, monkeypatch):
    names = []

    async def resolved(self: Any, host: str, port: int, **options: Any) -> list[Any]:
        names.append(host)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)
    monkeypatch.setattr(network, "is_public", lambda address: address == "127.0.0.1")
    assert fetch("/host", "*.example", host="a.example").startswith(b"a.example:")
    assert names[0] == "a.example" and names[1:] in ([], ["127.0.0.1"])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/to?/a.png", None),
        ("/to?http://127.0.0.1:1/a.png", "is on 127.0.0.1, from which"),
        ("/to?http://localhost/a.png", "is on localhost, from which"),
        ("/to?file:///etc/hostname", "must be a data URL"),
        ("/to?//169.254.169.254/meta", "is on 169.254.169.254, from which"),
        ("/round", f"more than {MAX_REDIRECTS} times"),
        ("/to?", f"more than {MAX_REDIRECTS} times"),
        ("/status?404", "its status is 404"),
        ("/status?204", "its status is 204"),
        ("/type?text/html", "is not a picture: 127.0.0.1 says 'text/html'"),
        ("/type?", "is not a picture"),
        ("/type?IMAGE/webp;a=b", None),
        ("/type?application/octet-stream", None),
        ("/type?audio/wav", "is not a picture"),
        ("/packed", "is compressed"),
        ("/to?http://127.0.0.1:1/a.png", "is redirected by 127.0.0.1 to a URL that is on"),
        ("/long?5000", "more than 1,000 bytes"),
        ("/endless", "more than 1,000 bytes"),
    ],
)
def test_redirects_types_and_sizes_are_checked(fetch, path, words):
    if words is None:
        assert fetch(path) == PNG
        return
    with pytest.raises(FetchError) as caught:
        fetch(path)
    assert words in str(caught.value)


def pictures(ask: Any) -> list[bytes]:
    return [part["image"] for part in ask.request.prompt[0]["content"]]


def test_all_apis_fetch_from_the_operators_hosts_alone(port, monkeypatch):
    async def abilities_of(engine: Any, model: Any) -> Abilities:
        return Abilities(frozenset({"image"}))

    monkeypatch.setattr(read, "abilities_of", abilities_of)
    engine, there = FakeEngine(), f"http://127.0.0.1:{port}/a.png"
    image: Any = {"type": "image", "source": {"type": "url", "url": there}}
    part: Any = {"type": "image_url", "image_url": {"url": there}}
    with serving(engine, media_hosts=(f"127.0.0.1:{port}",)) as url:
        before = len(Pictures.asked)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": [part, part]}]
            client.chat.completions.create(model=MODEL, messages=messages)
            part["image_url"]["url"] = f"http://127.0.0.1:{port}/status?404"
            with pytest.raises(openai.BadRequestError, match="its status is 404") as caught:
                client.chat.completions.create(model=MODEL, messages=messages)
            assert caught.value.param == "messages.0.content.0.image_url"
        assert pictures(engine.asks[0]) == [PNG, PNG]
        assert Pictures.asked[before:] == ["/a.png", "/status?404"]
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other:
            asked: Any = [{"role": "user", "content": [image]}]
            other.messages.create(model=MODEL, max_tokens=9, messages=asked)
        assert pictures(engine.last) == [PNG]
        image["source"]["url"] = "http://127.0.0.1:1/a.png"
        refused = pytest.raises(anthropic.BadRequestError, match=r"operator allow 127\.0\.0\.1:1")
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other, refused:
            other.messages.create(model=MODEL, max_tokens=9, messages=asked)


def test_sound_has_types_of_its_own(fetch):
    assert fetch("/type?audio/mpeg", kind="audio") == PNG
    with pytest.raises(FetchError, match="is not sound"):
        fetch("/a.png", kind="audio")


def test_a_slow_server_is_left(fetch):
    with pytest.raises(FetchError, match=r"did not come from 127\.0\.0\.1 in 0\.2 s"):
        fetch("/slow", seconds=0.2)


def test_a_server_that_is_not_there_is_told(fetch):
    remote = Remote(media_hosts(["127.0.0.1:1"]))
    with pytest.raises(FetchError, match="the connection failed"):
        asyncio.run(remote.fetch("http://127.0.0.1:1/a", "image", 9))


@pytest.mark.parametrize(
    ("host", "url", "is_allowed"),
    [
        ("example.com", "https://example.com/a", True),
        ("Example.COM.", "HTTPS://EXAMPLE.com./a", True),
        ("example.com", "http://example.com/a", True),
        ("example.com", "https://example.com:8443/a", False),
        ("example.com:8443", "https://example.com:8443/a", True),
        ("example.com:8443", "https://example.com/a", False),
        ("example.com", "https://a.example.com/", False),
        ("example.com", "https://example.com.evil.org/", False),
        ("example.com", "https://evil.org/example.com", False),
        ("example.com", "https://evil.org?@example.com", False),
        ("*.example.com", "https://a.b.example.com/", True),
        ("*.example.com", "https://example.com/", False),
        ("*.example.com", "https://evilexample.com/", False),
        ("*.1", "http://127.0.0.1/", False),
        ("10.0.0.7", "http://10.0.0.7/", True),
        ("10.0.0.7", "http://10.0.0.8/", False),
        ("10.0.0.7", "http://167772167/", False),
        ("[fd00::7]", "http://[FD00:0::7]/", True),
        ("[fd00::7]:81", "http://[fd00::7]:81/", True),
    ],
)
def test_a_host_is_allowed_as_a_whole(host, url, is_allowed):
    (allowed,) = media_hosts([host])
    assert allowed.allows(target_of(url)) is is_allowed


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com/a",
        "gopher://example.com/",
        "https:///a",
        "https://user:key@example.com/",
        "https://user@example.com/",
        "https://example.com\\@evil.org/",
        "https://exa mple.com/",
        "https://example.com/\r\nHost: evil.org",
        "https://ex\u00e4mple.com/",
        "https://example.com:99999/",
        "https://[::1/",
        "https://example.com/" + "a" * 9000,
    ],
)
def test_what_is_no_plain_url_is_refused(url):
    with pytest.raises(ValueError):
        target_of(url)


@pytest.mark.parametrize(
    "text",
    ["", "*", "*.", "*.10.0.0.7", "a*.com", "https://a.com", "a.com/x", "a.com?x", "a.com#x",
     "u@a.com", "a b.com", "a.com:x"],
)  # fmt: skip
def test_what_is_no_host_cannot_be_allowed(text):
    with pytest.raises(UsageError, match="media_hosts must be HOST"):
        media_hosts([text])


def test_the_guard_of_downloads_lets_a_checked_address_pass(monkeypatch):
    from mlxkv.errors import DownloadError
    from mlxkv.store import outgoing

    hooks: list[Any] = []
    monkeypatch.setattr(outgoing.sys, "addaudithook", hooks.append)
    outgoing.only_public()
    (check,) = hooks
    with pytest.raises(DownloadError):
        check("socket.connect", (None, ("127.0.0.1", 8000)))
    with outgoing.also_allowed([("127.0.0.1", 8000)]):
        check("socket.connect", (None, ("127.0.0.1", 8000)))
        with pytest.raises(DownloadError):
            check("socket.connect", (None, ("127.0.0.1", 8001)))
    with pytest.raises(DownloadError):
        check("socket.connect", (None, ("127.0.0.1", 8000)))
