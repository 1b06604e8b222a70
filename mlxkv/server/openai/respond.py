"""From requests of OpenAI's APIs to the engine, and back as one response or a stream of events."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from mlxkv.engine.messages import Answer, Ask, Engine
from mlxkv.errors import UsageError
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.errors import OPENAI, failure_of, openai_error
from mlxkv.server.requests import bounded


class Reply(Protocol):
    """How an API writes answers."""

    def events(self, answers: Sequence[Answer]) -> sse.Events: ...

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]: ...


def several(ask: Ask, n: int) -> list[Ask]:
    """The same, `n` times, each with random numbers of its own."""
    return [dataclasses.replace(ask, request=ask.request.nth(i)) for i in range(n)]


def submit_all(engine: Engine, config: ServerConfig, asks: Sequence[Ask]) -> list[Answer]:
    """The answers to all, or to none.

    Raises:
        UsageError: more answers or tokens than one request may ask for. Whatever the engine raises.
    """
    if len(asks) > config.max_choices:
        raise UsageError(
            f"one request may ask for {config.max_choices} answers; this one asks for {len(asks)}"
        )
    answers: list[Answer] = []
    try:
        for ask in asks:
            answers.append(engine.submit(bounded(ask, config)))
    except BaseException:
        for answer in answers:
            answer.cancel()
        raise
    return answers


def error_event(error: BaseException) -> bytes:
    """The end of a stream that failed."""
    return sse.event(openai_error(failure_of(error, OPENAI))) + sse.DONE


async def respond(
    request: Request,
    config: ServerConfig,
    reply: Reply,
    answers: Sequence[Answer],
    streams: bool | None,
    on_error: Callable[[BaseException], bytes] = error_event,
) -> Response:
    """The response with the answers, which are cancelled when the client goes.

    Args:
        request: whose client is watched.
        config: how long to wait for what.
        reply: writes the answers.
        answers: that were submitted.
        streams: whether they are sent while they come.
        on_error: the end of a stream that failed.
    """
    if streams:
        events = reply.events(answers)
        return await sse.stream(request, events, config, on_error, answers=answers)
    return JSONResponse(await sse.unless_gone(request, reply.whole(answers), answers))
