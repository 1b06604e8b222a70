"""Asking a server that runs: `mlxkv ps`, `stop`, and `run` with a server.

Errors are the server's own words, under the exit code that a command in this process would have.
No proxy is asked and no redirect followed: prompts and keys go to the address that was named.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from mlxkv.errors import (
    CheckpointError,
    DownloadError,
    MlxkvError,
    ModelNotFound,
    OutOfMemory,
    OutputError,
    UsageError,
)
from mlxkv.server.config import HOST, PORT

CONNECT_S, ANSWER_S = 10.0, 60.0
_KINDS = {
    kind.status: kind
    for kind in (
        UsageError,
        ModelNotFound,
        CheckpointError,
        DownloadError,
        OutputError,
        OutOfMemory,
    )
}
_REFUSED = (401, 403, 413)
_URL = re.compile(
    r"(?:(?P<scheme>https?)://)?(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<host>[\w.-]+))"
    r"(?::(?P<port>\d{1,5}))?(?P<path>(?:/[\w.~/-]*)?)",
    re.ASCII,
)
_PORTS = {None: PORT, "http": 80, "https": 443}
_SHOWN_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Server:
    """A server's address.

    Args:
        scheme: http or https.
        host: name or address.
        port: its port.
        path: what its own paths are below, without a slash at the end.
        key: API key, "" for none.
    """

    scheme: str
    host: str
    port: int
    path: str = ""
    key: str = ""

    @classmethod
    def at(cls, address: str | None = None, key: str | None = None) -> Server:
        """A server by its address; None is MLXKV_SERVER's, or this machine's.

        Args:
            address: HOST, HOST:PORT or a URL.
            key: API key; None for MLXKV_API_KEY, or none.

        Raises:
            UsageError: no address, or a key that cannot be sent.
        """
        where = "" if address is not None else "MLXKV_SERVER "
        if address is None:
            address = os.environ.get("MLXKV_SERVER") or f"{HOST}:{PORT}"
        key = os.environ.get("MLXKV_API_KEY", "") if key is None else key
        if not (key.isascii() and key.isprintable()):
            raise UsageError("must be printable ASCII", field="api_key")
        found = _URL.fullmatch(address)
        port = int(found["port"] or _PORTS[found["scheme"]]) if found else 0
        if found is None or not 0 < port < 1 << 16:
            raise UsageError(
                f"{where}must be an address like {HOST}:{PORT}, or a URL of http or https; got "
                f"{address!r}",
                field=None if where else "server",
            )
        host = (found["ipv6"] or found["host"]).lower()
        return cls(found["scheme"] or "http", host, port, found["path"].rstrip("/"), key)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The whole answer to a request.

        Raises:
            UsageError: there is no server.
            MlxkvError: it refuses.
        """
        connection = self._connect()
        try:
            response = self._request(connection, method, path, body)
            return _object(response.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._broken(error) from None
        finally:
            connection.close()

    def lines(self, path: str, body: Any) -> Generator[dict[str, Any]]:
        """The answer to a POST as its lines come. Closing it before its end cancels the answer.

        Raises:
            UsageError: there is no server.
            MlxkvError: it refuses, or what it does fails.
        """
        connection = self._connect()
        try:
            response = self._request(connection, "POST", path, body, waits=True)
            while data := response.readline():
                if not data.endswith(b"\n"):
                    raise http.client.IncompleteRead(data)
                line = _object(data)
                if "error" in line:
                    raise self._error(_status(line), _message(line))
                yield line
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self._broken(error) from None
        finally:
            connection.close()

    def ended(self) -> MlxkvError:
        """An answer that ended without its last line."""
        return MlxkvError(f"{self} ended the answer before it was done")

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_S)
        try:
            connection.connect()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no server at {self} ({_reason(error)}): start one with `mlxkv serve`"
            ) from None
        return connection

    def _request(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Any,
        waits: bool = False,
    ) -> http.client.HTTPResponse:
        """The response to a request, its body unread.

        Args:
            connection: to ask over.
            method: of HTTP.
            path: below the server's own.
            body: sent as JSON; None for nothing.
            waits: for as long as a model takes to be loaded and to write.

        Raises:
            MlxkvError: its status is an error.
        """
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection.sock.settimeout(None if waits else ANSWER_S)
        # A server whose machine is gone says nothing: the system finds that out.
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A body that is not read to its end has an answer that says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, f"{self.path}{path}", data, headers)
        response = connection.getresponse()
        if response.status != 200:
            busy = response.getheader("Retry-After") is not None
            said = response.read()
            raise self._error(response.status, _message(said), busy or not _is_ours(said))
        return response

    def _error(self, status: int, message: str, passing: bool = False) -> MlxkvError:
        """What the server says went wrong, as the exception that it would be here.

        Args:
            status: of HTTP.
            message: its words.
            passing: it is busy, or what answers is not `mlxkv serve`: a status from 500 on then
                says nothing of models and memory.
        """
        kind = UsageError if status in _REFUSED else _KINDS.get(status, MlxkvError)
        kind = MlxkvError if passing and status >= 500 else kind
        return kind(f"{self} answered {status}: {message}")

    def _broken(self, error: Exception) -> MlxkvError:
        """Something came that is no answer, or nothing more does."""
        if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
            return self.ended()
        if isinstance(error, OSError):
            return MlxkvError(f"the connection to {self} broke: {_reason(error)}")
        return MlxkvError(f"{self} does not answer like `mlxkv serve` ({type(error).__name__})")


def _reason(error: Exception) -> str:
    """What the system says went wrong."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none.
    """
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _is_ours(answer: bytes) -> bool:
    """Whether an error is one of `mlxkv serve`, and not of what stands before it."""
    try:
        return "error" in _object(answer)
    except ValueError:
        return False


def _status(line: Mapping[str, Any]) -> int:
    """Of an error that ends a stream."""
    status = line.get("status")
    return status if isinstance(status, int) else 500


def _message(answer: bytes | Mapping[str, Any]) -> str:
    """What an error says, in the shape of any API that the server has."""
    if isinstance(answer, bytes):
        try:
            answer = _object(answer)
        except ValueError:
            return " ".join(answer[:_SHOWN_CHARS].decode("utf-8", "replace").split()) or "nothing"
    said = answer.get("error")
    said = said.get("message") if isinstance(said, dict) else said
    return str(said or answer)[:_SHOWN_CHARS]
