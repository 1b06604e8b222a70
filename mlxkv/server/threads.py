"""Work that is done beside the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fastapi import concurrency

from mlxkv.errors import contained

P = ParamSpec("P")
T = TypeVar("T")


async def run_in_threadpool(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a thread; whatever it raises is an error of the request."""

    def call() -> T:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            raise contained(error) from None

    return await concurrency.run_in_threadpool(call)
