"""HTTP client of a running server, for `mlxkv ps`, `stop`, and `run` with a server.

Errors have the server's message, and the exit code that a command in this process would have. No
proxy is used and no redirect followed: prompts and keys go to the named address only.
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
_ERRORS = (UsageError, ModelNotFound, CheckpointError, DownloadError, OutputError, OutOfMemory)
_KINDS = {kind.status: kind for kind in _ERRORS}
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
        path: prefix of its paths, without a slash at the end.
        key: API key; "" for none.
    """

    scheme: str
    host: str
    port: int
    path: str = ""
    key: str = ""

    @classmethod
    def at(cls, address: str | None = None, key: str | None = None) -> Server:
        """The server at an address.

        Args:
            address: HOST, HOST:PORT or a URL; None for MLXKV_SERVER, or this machine.
            key: API key; None for MLXKV_API_KEY, or no key.

        Raises:
            UsageError: an invalid address, or a key that is not printable ASCII.
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
        """Send a request, and return the whole response.

        Raises:
            UsageError: no server at the address.
            MlxkvError: the server answers with an error.
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
        """Send a POST, and yield the lines of its response. Closing the generator cancels it.

        Raises:
            UsageError: no server at the address.
            MlxkvError: the server answers with an error, or the response breaks off.
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

    def incomplete(self) -> MlxkvError:
        """The error for a response without its last line."""
        return MlxkvError(f"{self} closed the connection before the answer was complete")

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
        """Send a request, and return the response with its body unread.

        Args:
            connection: an open connection.
            method: HTTP method.
            path: below `self.path`.
            body: sent as JSON; None for no body.
            waits: wait without a timeout, as loading and generating may take any time.

        Raises:
            MlxkvError: the status is an error.
        """
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection.sock.settimeout(None if waits else ANSWER_S)
        # Detects a server whose machine has gone off the network.
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A server that refuses a body before reading all of it answers why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, f"{self.path}{path}", data, headers)
        response = connection.getresponse()
        if response.status != 200:
            busy = response.getheader("Retry-After") is not None
            data = response.read()
            raise self._error(response.status, _message(data), busy or not _is_ours(data))
        return response

    def _error(self, status: int, message: str, is_general: bool = False) -> MlxkvError:
        """A response's error as the exception that it would be in this process.

        Args:
            status: HTTP status.
            message: the server's message.
            is_general: the server is busy, or a proxy answered: statuses from 500 on then do not
                mean a model or its memory.
        """
        kind = UsageError if status in _REFUSED else _KINDS.get(status, MlxkvError)
        kind = MlxkvError if is_general and status >= 500 else kind
        return kind(f"{self} answered {status}: {message}")

    def _broken(self, error: Exception) -> MlxkvError:
        """The error for a malformed response or a broken connection."""
        if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
            return self.incomplete()
        if isinstance(error, OSError):
            return MlxkvError(f"the connection to {self} broke: {_reason(error)}")
        return MlxkvError(f"{self} does not answer like `mlxkv serve` ({type(error).__name__})")


def _reason(error: Exception) -> str:
    """The operating system's message for an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object, or raise ValueError."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _is_ours(answer: bytes) -> bool:
    """Whether an error is from `mlxkv serve`, and not from a proxy in front of it."""
    try:
        return "error" in _object(answer)
    except ValueError:
        return False


def _status(line: Mapping[str, Any]) -> int:
    """The status of an error that ends a stream."""
    status = line.get("status")
    return status if isinstance(status, int) else 500


def _message(answer: bytes | Mapping[str, Any]) -> str:
    """The message of an error in the shape of any of the server's APIs."""
    if isinstance(answer, bytes):
        try:
            answer = _object(answer)
        except ValueError:
            return " ".join(answer[:_SHOWN_CHARS].decode("utf-8", "replace").split()) or "no body"
    error = answer.get("error")
    error = error.get("message") if isinstance(error, dict) else error
    return str(error or answer)[:_SHOWN_CHARS]
