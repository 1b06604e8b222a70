"""Strict JSON bodies: no NaN, no lone surrogates, no deep nesting.

A body is parsed as JSON whatever its content type: Ollama's examples use `curl -d`, which sends a
form's type. Web pages cannot exploit that, see `guard`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

MAX_DEPTH = 64
"""Levels of nesting; real JSON schemas need fewer."""


class JSONRequest(Request):
    """A request whose body is JSON."""

    async def json(self) -> Any:
        """The body, parsed; raises as `parse_json`."""
        return parse_json(await self.body())


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
    """

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
