"""Connections: how many there may be, and how long they may keep the server waiting.

Invariants:
- There are at most `max_connections`. A new one takes the place of the one that has waited longest
  without a request: connections that never send one keep no client out. Only where all of them
  have requests is the new one refused.
- A head has `head_s`. Bodies are bounded in `bodies`; the rest of a body whose answer was sent has
  `body_s`.
- A client that reads nothing for `stall_s` is disconnected, also while its connection is being
  closed: what is written to it is buffered until then, and no longer.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import ClassVar, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlxkv.server.config import ServerConfig

_log = logging.getLogger(__name__)

BACKLOG = 64
"""Connections that the system may accept before we see them."""
READ_BYTES = 16 << 10
"""A client that reads this in `stall_s` goes on, however much there is to read."""

Wait = Literal["head", "rest"]


class Connections:
    """The connections of one server.

    Args:
        config: their bounds.
        limit: how many there may be.
    """

    def __init__(self, config: ServerConfig, limit: int):
        self.config = config
        self._limit = limit
        self._open: dict[Connection, None] = {}

    def admit(self, new: Connection) -> bool:
        """Count a new connection, with room made for it if need be; False: there is none."""
        if len(self._open) >= self._limit:
            _log.warning("there are %d connections, which is the limit", self._limit)
            if not self.drop_one():
                return False
        self._open[new] = None
        return True

    def drop_one(self) -> bool:
        """Close the connection that has waited longest for a request, if there is one."""
        for waits in (Connection.is_idle, Connection.has_no_body, Connection.has_no_head):
            for each in self._open:
                if waits(each):
                    each.abort()
                    return True
        return False

    def remove(self, one: Connection) -> None:
        """Forget a closed connection."""
        self._open.pop(one, None)

    def sweep(self) -> None:
        """Start the time of connections that end when their client has read what was written."""
        for each in list(self._open):
            each.watch_writes()


class Connection(H11Protocol):
    """One connection; `protocol_of` makes the class that a server uses."""

    all: ClassVar[Connections]

    _reads: asyncio.TimerHandle | None = None
    _waits_for: Wait | None = None
    _writes: asyncio.TimerHandle | None = None
    _unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if self.all.admit(self):
            self._watch_reads()
        else:
            self._refuse(503, "Service Unavailable", "too many connections: retry later")

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.remove(self)
        for timer in (self._reads, self._writes):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_reads()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reads()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writes is not None:
            self._writes.cancel()
            self._writes = None

    def abort(self) -> None:
        """Close it without sending what was not read."""
        self.all.remove(self)
        self.transport.abort()

    def has_no_head(self) -> bool:
        """Whether it waits for a request."""
        return self.cycle is None or self.cycle.response_complete

    def is_idle(self) -> bool:
        """Whether it waits for a request, and its client has read all answers."""
        return self.has_no_head() and not self.transport.get_write_buffer_size()

    def has_no_body(self) -> bool:
        """Whether it has a request whose body is not complete."""
        return self.conn.their_state is h11.SEND_BODY

    def _watch_reads(self) -> None:
        """Start or end the time for what the client has to send next."""
        waits_for = self._next_wait()
        if waits_for == self._waits_for:
            return
        self._waits_for = waits_for
        if self._reads is not None:
            self._reads.cancel()
            self._reads = None
        if waits_for is not None:
            config = self.all.config
            bound_s = config.head_s if waits_for == "head" else config.body_s
            self._reads = self.loop.call_later(bound_s, self._too_slow)

    def _next_wait(self) -> Wait | None:
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.IDLE:
            # Between two requests uvicorn's own timer runs, until there is data.
            return "head" if self.timeout_keep_alive_task is None else None
        is_answered = self.cycle is not None and self.cycle.response_complete
        return "rest" if self.has_no_body() and is_answered else None

    def _too_slow(self) -> None:
        self._reads = None
        has_begun = bool(self.conn.trailing_data[0])
        if self._waits_for == "rest" or not has_begun:
            self.abort()
            return
        _log.warning("a request's head did not come in time: its connection is closed")
        self._refuse(408, "Request Timeout", "the request's head did not come in time")

    def _refuse(self, status: int, phrase: str, message: str) -> None:
        """Answer before there is a request, thus in no API's own shape, and close."""
        body = json.dumps({"error": {"message": message, "type": "server_error"}})
        head = (
            f"HTTP/1.1 {status} {phrase}\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.transport.write((head + body).encode("ascii"))
        self.transport.close()

    def watch_writes(self) -> None:
        """Start the time in which a client has to read, if it is waited for."""
        is_waited_for = self.flow.write_paused or self.transport.is_closing()
        unread = self.transport.get_write_buffer_size()
        if self._writes is not None or not unread or not (is_waited_for or self.has_no_head()):
            return
        self._unread_bytes = unread
        self._writes = self.loop.call_later(self.all.config.stall_s, self._stalled)

    def _stalled(self) -> None:
        self._writes = None
        unread = self.transport.get_write_buffer_size()
        if unread and self._unread_bytes - unread < min(READ_BYTES, self._unread_bytes):
            _log.warning("a client does not read its answer: it is disconnected")
            self.abort()
        else:
            self.watch_writes()


def protocol_of(connections: Connections) -> type[Connection]:
    """The protocol for one server's connections."""
    return type("BoundConnection", (Connection,), {"all": connections})
