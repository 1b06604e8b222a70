"""A server on a socket: uvicorn with bounds of its own, and an end that comes in time.

The end of a server (`Server.shutdown`), in this order:

1. It takes no more connections.
2. `on_stop` is called: the engine puts answers away, and their requests end with that.
3. Other requests end with a reason, see `end_requests`. What waits for a client is not waited
   for.
4. What has not ended after `REASON_S` is cancelled, and connections are closed.
5. `on_end` is called: the engine writes what it keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from mlxkv.server.config import ServerConfig
from mlxkv.server.edge.connections import BACKLOG, Connections, protocol_of
from mlxkv.server.edge.stop import Later

_log = logging.getLogger(__name__)

MOST_FILES = 10_240
"""Open files that we ask for: macOS grants no more to a process by default."""
OTHER_FILES = BACKLOG + 64
"""Open files besides connections: of models and pages, and connections that are not counted yet."""
REASON_S = 1.5
"""Time for requests to end with their reason, once the server stops."""
AWAY_S = 3.0
"""Time for the engine to put answers away: it waits for the step that it computes."""
_POLL_S = 0.02
_NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def raise_file_limit() -> int:
    """Let this process open more files, as far as it may; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinity = resource.RLIM_INFINITY
    wanted = MOST_FILES if hard == infinity else min(hard, MOST_FILES)
    if soft != infinity and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MOST_FILES if soft == infinity else soft


def end_requests(app: FastAPI) -> None:
    """End all requests with an error that says why: streams with their last event, others with a
    status. What they computed is kept when the engine closes."""
    app.state.stopping.set()
    app.state.bodies.end()


class Server(uvicorn.Server):
    """Serves an application of `create_app`. Signals are the caller's, see `stop`.

    Args:
        app: the application.
        config: bounds and times.
        n_files: how many files the process may open.
        on_end: called when no more requests will come.
        on_stop: called before requests end, in a thread of its own; for at most `AWAY_S`.
    """

    def __init__(
        self,
        app: FastAPI,
        config: ServerConfig,
        n_files: int = MOST_FILES,
        on_end: Callable[[], object] = lambda: None,
        on_stop: Callable[[], object] = lambda: None,
    ):
        most = max(1, min(config.max_connections, n_files - OTHER_FILES))
        self.bounds = Connections(config, most)
        self._app, self._on_end, self._on_stop = app, on_end, on_stop
        self._is_away = asyncio.Event()
        self._away: Later | None = None
        super().__init__(
            uvicorn.Config(
                app,
                port=0,
                loop="asyncio",
                http=protocol_of(self.bounds),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
            )
        )

    def stop(self) -> None:
        """End as soon as possible; may be called by a signal's handler."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections."""
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        self._away = self._later_away()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        self.bounds.sweep()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all requests and connections, see the module."""
        for server in self.servers:
            server.close()
        for each in sockets or ():
            each.close()
        await self._put_away()
        end_requests(self._app)
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._ended(REASON_S)
        for task in list(self.server_state.tasks):
            task.cancel()
        await self._ended(_POLL_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        self._on_end()

    def _later_away(self) -> Later:
        loop = asyncio.get_running_loop()

        def run() -> None:
            try:
                self._on_stop()
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is closed: too late
                    loop.call_soon_threadsafe(self._is_away.set)

        return Later(run, "put away")

    async def _put_away(self) -> None:
        if self._away is None:
            return
        self._away.start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_away.wait(), AWAY_S)

    async def _ended(self, within_s: float) -> None:
        """Wait until all requests have ended, and their answers were read."""
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        state = self.server_state
        while (state.connections or state.tasks) and not self.force_exit and loop.time() < until:
            await asyncio.sleep(_POLL_S)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _NO_FILES:
            # asyncio tries again in a second; this makes room for one connection.
            _log.warning("no connection can be taken: %s", error.strerror)
            self.bounds.drop_one()
            return
        loop.default_exception_handler(context)
