"""Strict JSON bodies: no NaN, no lone surrogates, no deep nesting.

A body is parsed as JSON whatever its content type: Ollama's examples use `curl -d`, which sends a
form's type. Web pages cannot exploit that, see `guard`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Any

import anyio
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

MAX_DEPTH = 64
"""Levels of nesting; real JSON schemas need fewer."""
MAX_VALUES = 1 << 21
"""Values of lists and objects together: twice the tokens of the longest contexts."""
MAX_CONTAINERS = 50_000
"""Lists and objects together: several times those of the longest conversations of agents."""
MAX_STRINGS = 500_000
"""Strings, names of fields included."""
LARGE_BYTES = 256 << 10
"""Bodies of this size are parsed outside the event loop, two at a time."""


class JSONRequest(Request):
    """A request whose body is JSON."""

    async def json(self) -> Any:
        """The body, parsed; raises as `parse_json`."""
        body = await self.body()
        if len(body) < LARGE_BYTES:
            return parse_json(body)
        return await anyio.to_thread.run_sync(parse_json, body, limiter=self.app.state.parsers)


class JSONRoute(APIRoute):
    """A route whose body is JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            others = [(k, v) for k, v in request.scope["headers"] if k.lower() != b"content-type"]
            headers = [*others, (b"content-type", b"application/json")]
            return await handler(
                JSONRequest({**request.scope, "headers": headers}, request.receive)
            )

        return handle


def parse_json(body: bytes) -> Any:
    """Parse standard JSON.

    Raises:
        JSONDecodeError: not standard JSON, or nested deeper than `MAX_DEPTH`.
        HTTPException: more values than are allowed.
    """
    _check_size(body)

    def refuse(name: str) -> Any:
        raise JSONDecodeError(f"{name} is not a JSON number", "", 0)

    try:
        value = json.loads(body, parse_constant=refuse, parse_float=_finite)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()
    except JSONDecodeError:
        raise
    except RecursionError:
        raise JSONDecodeError(f"nested deeper than {MAX_DEPTH} levels", "", 0) from None
    except UnicodeError:
        raise JSONDecodeError("a string is not valid Unicode", "", 0) from None
    except ValueError:  # an int of more than 4,300 digits
        raise JSONDecodeError("a number is too long", "", 0) from None
    _check_depth(value)
    return value


def _check_size(body: bytes) -> None:
    """Count before parsing, as each value takes some 30 times its bytes.

    Commas and brackets within strings are left out only where they would matter.
    """
    if len(body) <= MAX_CONTAINERS:
        return
    if _is_within(body):
        return
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') <= 2 * MAX_STRINGS and _is_within(b'"'.join(body.split(b'"')[::2])):
        return
    raise HTTPException(
        413,
        f"the request has more than {MAX_CONTAINERS:,} lists and objects, {MAX_STRINGS:,} strings "
        f"or {MAX_VALUES:,} values",
    )


def _is_within(text: bytes) -> bool:
    n_containers = text.count(b"[") + text.count(b"{")
    n_values = text.count(b",") + n_containers
    n_strings = text.count(b'"') // 2
    return n_containers <= MAX_CONTAINERS and n_values <= MAX_VALUES and n_strings <= MAX_STRINGS


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise JSONDecodeError(f"the number {text[:20]} is too large", "", 0)
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise JSONDecodeError(f"nested deeper than {MAX_DEPTH} levels", "", 0)
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        level, depth = [each for each in inner if isinstance(each, dict | list)], depth + 1
