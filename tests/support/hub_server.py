"""A server on loopback that speaks the part of the Hugging Face hub's protocol for downloads."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by name, each with its files; `requests` is what was asked.

    Args:
        repos: files by their path, by the name of the repository.
        gated: repositories whose files are refused; their list too, unless `repos` has them.
        failing: whether every answer is an error.
        ranges: whether a range is answered with that range, or with the whole file.
        elsewhere: whether files are at another address, to which the hub redirects.
        listed: sizes that the list of files has, where they are not the real ones.
        n_sent: bytes of the pieces of bodies that left.
        revisions: branches and tags, each with its commit; files are the same at all.
        hashes: whether the list of files has their hashes.
        cuts: by file, after how many bytes each further answer breaks off.
        status: answers every request for a file, where it is not 0.
        ranged: the `Range` headers that were sent, by file.
    """

    repos: Mapping[str, Mapping[str, bytes]]
    gated: frozenset[str] = frozenset()
    failing: bool = False
    ranges: bool = True
    elsewhere: bool = False
    listed: dict[str, object] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    n_sent: list[int] = field(default_factory=list)
    url: str = ""
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    hashes: bool = True
    cuts: dict[str, list[int]] = field(default_factory=dict)
    status: int = 0
    ranged: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serves the hub while the block runs; its address is in `hub.url`."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_client_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub in this process ask this address."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    cut_after: int | None = None
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def setup(self) -> None:
        # Small, so that what a client does not read stays here and is not counted as sent.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        super().setup()

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0].removeprefix("/mirror")
        self.served.requests.append(f"{self.command} {path}")
        if self.served.failing:
            return self._send(500, b"", {}, body)
        if self.served.elsewhere and "/resolve/" in path and not path.startswith("/elsewhere/"):
            there = self.served.url.replace("127.0.0.1", "localhost")
            parts = path.strip("/").split("/")
            data = self.served.repos.get("/".join(parts[:2]), {}).get("/".join(parts[4:]), b"")
            about = {
                "Location": f"{there}/elsewhere{path}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{_etag(data)}"',
                "X-Linked-Size": str(len(data)),
            }
            return self._send(302, b"", about, body)
        parts = path.removeprefix("/elsewhere").strip("/").split("/")
        if parts == ["api", "models"]:
            return self._search(body)
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:], body)
        return self._file("/".join(parts[:2]), "/".join(parts[4:]), body)

    def _known(self, repo: str, body: bool, *, listing: bool = False) -> bool:
        if repo in self.served.gated and not (listing and repo in self.served.repos):
            self._send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        elif repo not in self.served.repos:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        else:
            return True
        return False

    def _api(self, repo: str, rest: list[str], body: bool) -> None:
        if not self._known(repo, body, listing=True):
            return None
        revision = unquote(rest[1]) if rest[:1] == ["revision"] else "main"
        commit = self.served.revisions.get(revision)
        if commit is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        siblings = [self._sibling(*file) for file in self.served.repos[repo].items()]
        answer = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
        return self._send(
            200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body
        )

    def _search(self, body: bool) -> None:
        """The repositories with the words in their names, each with its config and sizes."""
        asked = parse_qs(self.path.partition("?")[2])
        words = asked.get("search", [""])[0].split()
        found = []
        for name, files in self.served.repos.items():
            if all(word in name for word in words):
                sizes = {"U8": sum(len(files[f]) for f in files if f.endswith(".safetensors"))}
                config = json.loads(files["config.json"])
                about = {"parameters": sizes, "total": sizes["U8"]}
                found.append({"id": name, "config": config, "safetensors": about, "downloads": 1})
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)

    def _sibling(self, name: str, data: bytes) -> dict[str, object]:
        about = {"rfilename": name, "size": self.served.listed.get(name, len(data))}
        if self.served.hashes and name.endswith((".safetensors", ".gguf")):
            sha256 = hashlib.sha256(data).hexdigest()
            about["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 1}
        elif self.served.hashes:
            about["blobId"] = _etag(data)
        return about

    def _file(self, repo: str, name: str, body: bool) -> None:
        if not self._known(repo, body):
            return None
        if self.served.status:
            return self._send(self.served.status, b"", {}, body)
        data = self.served.repos[repo].get(name)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT}
        self.served.ranged.append((name, self.headers.get("Range", "")))
        self.cut_after = None
        if body and (cuts := self.served.cuts.get(name)):
            self.cut_after = cuts.pop(0)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not self.served.ranges:
            return self._send(200, data, headers, body)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if start >= stop:
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"}, body)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._send(206, data[start:stop], headers, body)

    def _send(self, status: int, data: bytes, headers: Mapping[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self._send_body(memoryview(data))

    def _send_body(self, data: memoryview) -> None:
        if self.cut_after is not None:
            data, self.close_connection = data[: self.cut_after], True
        try:
            while data:
                n = self.request.send(data[: 1 << 16])
                self.served.n_sent.append(n)
                data = data[n:]
        except ConnectionError:  # the client has read enough
            self.close_connection = True


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
