"""Access control, before any other code sees a request.

- `Host` must be an address, a name of this machine or network, or a configured one: a name that an
  attacker has pointed at this machine (DNS rebinding) is none of them, and an address cannot be.
- `Origin`, which browsers alone send, must be the server's own, local or a configured one. Without
  that a web page could ask, though never read the answer, with a form that needs no leave of CORS.
- Where there are API keys, one of them must come as a bearer token or in `x-api-key`.
- A body is bounded while it comes in, see `bodies`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import Callable

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxkv.errors import contained
from mlxkv.server import ignored
from mlxkv.server.agents.clients import client_named
from mlxkv.server.config import ServerConfig
from mlxkv.server.edge.api_keys import ApiKeys
from mlxkv.server.edge.bodies import Bodies
from mlxkv.server.errors import error_response

_log = logging.getLogger(__name__)

_LOCAL_NAMES = (".localhost", ".local", ".internal")
"""Ends of names that no public DNS server gives out: containers and machines of this network."""
LOCAL_ORIGINS = (
    r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:[0-9]{1,5})?"
    r"|(app|file|tauri|vscode-webview|vscode-file)://[A-Za-z0-9._-]*"
)
"""Pages that may ask by default, as with Ollama: of this machine, and of programs on it."""
NO_SNIFFING = (b"x-content-type-options", b"nosniff")
"""Browsers take a response for what it says to be: text of a prompt is never a page."""
OPEN_PATHS = frozenset({"/", "/health"})
"""Paths that need no key: they only show that the server runs. The page at `/` is static; its
figures come from `/stats.json`, which needs a key."""


class Guard:
    """ASGI middleware that checks access and sets `request.state.owner`.

    Args:
        app: behind it.
        config: access.
        bodies: their bounds.
        keys: that are known.
        expect: told the owner and client of a request whose body is to come.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        bodies: Bodies,
        keys: ApiKeys,
        expect: Callable[[str, str], None] = lambda owner, client: None,
    ):
        self._app = app
        self._config = config
        self._bodies = bodies
        self._keys, self._expect = keys, expect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = [*message.get("headers", ()), *ignored.header(scope.get("state", {}))]
                if not any(name.lower() == NO_SNIFFING[0] for name, _ in headers):
                    headers.append(NO_SNIFFING)
                message = {**message, "headers": headers}
            await send(message)

        try:
            headers = _headers(scope)
            self._check(scope, headers)
            owner = self._owner(scope["path"], headers)
            scope.setdefault("state", {})["owner"] = owner
            if scope["method"] == "POST" and scope["path"] not in OPEN_PATHS:
                self._expect(owner, client_named(headers.get("user-agent", "")))
            with self._bodies.body(headers, scope["path"]) as body:
                await self._app(scope, lambda: body.receive(receive), watched)
        except asyncio.CancelledError:
            raise
        except BaseException as raised:
            error = contained(raised)
            if started:
                raise error from None
            await error_response(scope["path"], error)(scope, receive, watched)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not self._knows(_name_of(host)):
            raise HTTPException(
                403,
                f"the Host header {host[:80]!r} is not a name of this server: use localhost or an "
                f"IP address, or have the server's operator allow the name",
            )
        origin = headers.get("origin")
        own = f"{scope.get('scheme', 'http')}://{host}".lower()
        allowed = self._config.origins
        if origin is None or origin.lower() == own or {origin, "*"} & {*allowed}:
            return
        if not re.fullmatch(LOCAL_ORIGINS, origin):
            raise HTTPException(
                403, f"the origin {origin[:80]!r} is not allowed by the server's operator"
            )

    def _knows(self, name: str | None) -> bool:
        if name is None:
            return False
        named = {"localhost", *(host.lower() for host in (self._config.host, *self._config.hosts))}
        if name in named or name.endswith(_LOCAL_NAMES):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _owner(self, path: str, headers: dict[str, str]) -> str:
        """The owner of a request's pages; "" if no keys are set."""
        if not self._keys or path in OPEN_PATHS:
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        found = self._keys.owner(key)
        if found is None:
            raise HTTPException(
                401,
                "an API key is required: send it as `Authorization: Bearer KEY` or `x-api-key`"
                if not key
                else "unknown API key",
                {"WWW-Authenticate": "Bearer"},
            )
        return found


def _headers(scope: Scope) -> dict[str, str]:
    """Headers by name; security headers that come twice are refused."""
    headers: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name = raw.decode("latin-1").lower()
        if name in headers and name in {"host", "origin", "authorization", "x-api-key"}:
            raise HTTPException(400, f"duplicate header {name}")
        headers[name] = value.decode("latin-1")
    return headers


def _name_of(host: str) -> str | None:
    """`localhost:8080` -> `localhost`, `[::1]:80` -> `::1`; None for an invalid host."""
    name, port = host, ""
    if host.startswith("["):
        name, closed, port = host[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            return None
        port = port[1:]
    elif ":" in host:
        name, _, port = host.partition(":")
    if not name or (port and not (port.isascii() and port.isdigit())):
        return None
    return name.lower().rstrip(".")
