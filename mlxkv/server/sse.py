"""Event streams, and clients that disconnect.

- An answer is cancelled as soon as its client disconnects, or does not read for `stall_s`.
- Nothing is buffered: the next event is computed when the one before is written.
- When the server stops, the stream ends with an error that says so, behind what the answers have
  told by then: those that were put away say that they go on.
- An error before the first event, or within `first_s`, is a response with its own status; later
  the stream has begun and the error is its last event.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from mlxkv.engine.messages import Answer
from mlxkv.errors import contained
from mlxkv.generation.outputs import Chunk
from mlxkv.server.config import ServerConfig
from mlxkv.server.errors import OPENAI, ServerStopping, failure_of, openai_error

T = TypeVar("T")
Events = AsyncGenerator[bytes, None]

SSE = "text/event-stream"
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_TURNS = 50
"""Turns of the event loop: more than what an answer has told needs to reach its response."""


class ClientGone(Exception):
    """The client closed the connection."""


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {dumps(data)}\n\n".encode()


def openai_error_event(error: BaseException) -> bytes:
    """The last events of a stream that failed, in the shapes of OpenAI's API."""
    return event(openai_error(failure_of(error, OPENAI))) + DONE


def dumps(data: Any) -> str:
    """Compact JSON on one line."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


async def merge(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yield (index, chunk) of several answers as they come. Closing it cancels them all."""
    readers = [aiter(answer) for answer in answers]
    pending: dict[asyncio.Future[Chunk | None], int] = {}
    try:
        pending = {_next(reader): i for i, reader in enumerate(readers)}
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=pending.__getitem__):
                i = pending.pop(future)
                if (chunk := future.result()) is not None:
                    yield i, chunk
                    pending[_next(readers[i])] = i
    finally:
        _cancel(answers)
        await _drop(*pending)


async def unless_gone(
    request: Request, work: Coroutine[Any, Any, T], answers: Sequence[Answer] = ()
) -> T:
    """Await some work, and cancel it when the client disconnects.

    Args:
        request: the HTTP request.
        work: a coroutine.
        answers: cancelled at the end, even if the work has not begun to read them.

    Raises:
        ClientGone: the client disconnected.
        ServerStopping: the server stops.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    stop = _stop_of(request)
    try:
        await asyncio.wait({task, gone, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and gone.done():
            raise ClientGone
        if not await _arrived(task):
            raise ServerStopping
        return task.result()
    finally:
        _cancel(answers)
        await _drop(task, gone, stop)


async def stream(
    request: Request,
    events: Events,
    config: ServerConfig,
    on_error: Callable[[BaseException], bytes],
    media_type: str = SSE,
    ping: bytes | None = PING,
    answers: Sequence[Answer] = (),
) -> Response:
    """A response that sends events as they come.

    Args:
        request: the HTTP request.
        events: sent one by one; always closed at the end.
        config: timeouts.
        on_error: makes the last event of a stream that failed.
        media_type: of the response.
        ping: sent in pauses, to keep the connection open; None for nothing.
        answers: cancelled at the end, even if no event has begun to read them.

    Raises:
        ClientGone: the client disconnected before the first event. Also what that event raises.
        ServerStopping: the server stops before the first event.
    """
    first, gone = _next(events), asyncio.ensure_future(_gone(request.receive))
    stop = _stop_of(request)
    try:
        await asyncio.wait(
            {first, gone, stop}, timeout=config.first_s, return_when=asyncio.FIRST_COMPLETED
        )
        if gone.done():
            raise ClientGone
        if first.done():
            first.result()
        elif stop.done():
            if not await _arrived(first):
                raise ServerStopping
            first.result()
    except BaseException:
        _cancel(answers)
        await _drop(first, gone, stop)
        await events.aclose()
        raise
    return _Stream(events, first, gone, stop, config, on_error, media_type, ping, answers)


class _Stream(Response):
    """See `stream`."""

    def __init__(
        self,
        events: Events,
        first: asyncio.Future[bytes | None],
        gone: asyncio.Future[None],
        stop: asyncio.Future[Any],
        config: ServerConfig,
        on_error: Callable[[BaseException], bytes],
        media_type: str,
        ping: bytes | None,
        answers: Sequence[Answer],
    ):
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        # Keep proxies from buffering events.
        self.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._next, self._gone, self._stop = events, first, gone, stop
        self._config, self._on_error, self._ping = config, on_error, ping
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        try:
            await asyncio.wait({pump, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        except TimeoutError:
            pass  # the client does not read, and `connections` has not seen it: uvicorn closes
        finally:
            _cancel(self._answers)
            await _drop(pump, self._gone, self._stop)
            await _drop(self._next)
            await self._events.aclose()

    async def _pump(self, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        more = True
        while more:
            body, more = await self._body()
            # Waits while the client does not read.
            async with asyncio.timeout(self._config.stall_s):
                await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _body(self) -> tuple[bytes, bool]:
        """The next bytes, and whether more follow."""
        timeout = None if self._ping is None else self._config.ping_s
        futures = {self._next, self._stop}
        done, _ = await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            return self._ping or b"", True
        if self._stop in done and not await _arrived(self._next):
            return self._on_error(ServerStopping()), False
        try:
            body = self._next.result()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            return self._on_error(contained(error)), False
        if body is None:
            return b"", False
        self._next = _next(self._events)
        return body, True


def _stop_of(request: Request) -> asyncio.Future[Any]:
    """Done when the server stops."""
    return asyncio.ensure_future(request.app.state.stopping.wait())


async def _arrived(future: asyncio.Future[Any]) -> bool:
    """Whether a future completes with what is on the event loop already."""
    for _ in range(_TURNS):
        if future.done():
            return True
        await asyncio.sleep(0)
    return future.done()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _next(items: AsyncIterator[T]) -> asyncio.Future[T | None]:
    """A future of the next item; None at the end."""

    async def one() -> T | None:
        return await anext(items, None)

    return asyncio.ensure_future(one())


def _cancel(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.cancel()


async def _drop(*futures: asyncio.Future[Any]) -> None:
    """Cancel futures and wait for their end; their errors are ignored."""
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)
