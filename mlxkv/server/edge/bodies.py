"""Bodies of requests while they come in: bounds of bytes, of time, and of all of them together.

Invariants:
- `held_bytes` is what was received for requests whose answers have not ended, and `MESSAGE_BYTES`
  for each piece that it came in.
- It stays within `max_bodies_bytes`: past it, the incomplete body with the most bytes is refused,
  so that clients which never finish do not keep small requests out.
- A file that goes to the disk as it comes (`UPLOADS`) counts there only as what is not written.
- A body has `body_s`, and a second more for each `min_body_rate` bytes that came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

from mlxkv.server.config import ServerConfig
from mlxkv.server.errors import stopping

_log = logging.getLogger(__name__)


UPLOADS = "/api/blobs/"
"""Paths whose bodies are files."""
MESSAGE_BYTES = 64
"""What a piece of a body takes besides its bytes."""


class Bodies:
    """The bodies of all requests of one server."""

    def __init__(self, config: ServerConfig):
        self._config = config
        self._coming: set[Body] = set()
        self._is_ending = False
        self.held_bytes = 0

    @contextmanager
    def body(self, headers: dict[str, str], path: str = "") -> Iterator[Body]:
        """The body of one request to a path, until its answer has ended.

        Raises:
            HTTPException: its Content-Length is past the limit.
        """
        is_upload = path.startswith(UPLOADS)
        limit = self._config.max_upload_bytes if is_upload else self._config.max_body_bytes
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 19 or int(length) > limit):
            raise _too_large(limit)
        body = Body(self, self._config, limit, is_upload)
        self._coming.add(body)
        if self._is_ending:
            body.refuse(stopping())
        try:
            yield body
        finally:
            self._coming.discard(body)
            self.held_bytes -= body.held_bytes

    def add(self, body: Body, n_bytes: int) -> None:
        """Count bytes of a body, and refuse bodies until all of them fit."""
        body.n_bytes += n_bytes
        more = n_bytes + MESSAGE_BYTES - (body.held_bytes if body.is_upload else 0)
        body.held_bytes += more
        self.held_bytes += more
        while self.held_bytes > self._config.max_bodies_bytes and self._coming:
            largest = max(self._coming, key=lambda each: (each.held_bytes, each is body))
            self._coming.discard(largest)
            self.held_bytes -= largest.held_bytes
            largest.held_bytes = 0
            _log.warning("too many bytes of requests at a time: the largest is refused")
            largest.refuse(_too_much())

    def complete(self, body: Body) -> None:
        """Note that all of a body is here."""
        self._coming.discard(body)

    def end(self) -> None:
        """Refuse all bodies that are not complete, and those to come: the server stops."""
        self._is_ending = True
        for body in self._coming:
            body.refuse(stopping())


class Body:
    """The body of one request.

    Args:
        bodies: all of them.
        config: has the bounds of time.
        limit: bytes at most.
        is_upload: whether a piece is written to the disk before the next is asked for.

    Attributes:
        n_bytes: received so far.
        held_bytes: what they take.
    """

    def __init__(self, bodies: Bodies, config: ServerConfig, limit: int, is_upload: bool = False):
        self._bodies, self._config = bodies, config
        self._limit, self.is_upload = limit, is_upload
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._is_complete = False
        self._refusal: HTTPException | None = None
        self._timer: asyncio.Timeout | None = None
        self.n_bytes = self.held_bytes = 0

    def refuse(self, refusal: HTTPException) -> None:
        """Let the request fail where it waits for its body."""
        self._refusal = refusal
        if self._timer is not None:
            self._timer.reschedule(self._loop.time())

    async def receive(self, receive: Receive) -> Message:
        """The next message of a request.

        Raises:
            HTTPException: the body is too large, too slow or refused.
        """
        if self._is_complete:
            return await receive()
        if self._refusal is not None:
            raise self._refusal
        until = self._started + self._config.body_s + self.n_bytes / self._config.min_body_rate
        try:
            async with asyncio.timeout_at(until) as self._timer:
                message = await receive()
        except TimeoutError:
            raise self._refusal or self._too_slow() from None
        finally:
            self._timer = None
        self._count(message)
        return message

    def _count(self, message: Message) -> None:
        if message["type"] != "http.request":
            return
        self._bodies.add(self, len(message.get("body", b"")))
        if self.n_bytes > self._limit:
            raise _too_large(self._limit)
        if self._refusal is not None:
            raise self._refusal
        if not message.get("more_body", False):
            self._is_complete = True
            self._bodies.complete(self)

    def _too_slow(self) -> HTTPException:
        _log.warning("a request's body came too slowly: it is refused")
        return HTTPException(
            408,
            f"the request's body came too slowly: {self.n_bytes:,} bytes in "
            f"{self._loop.time() - self._started:.0f} s",
            {"Connection": "close"},
        )


def _too_large(limit: int) -> HTTPException:
    return HTTPException(
        413, f"the request is larger than {limit:,} bytes", {"Connection": "close"}
    )


def _too_much() -> HTTPException:
    return HTTPException(
        503,
        "too many bytes of requests are held at a time: retry in 5 s",
        {"Connection": "close", "Retry-After": "5"},
    )
