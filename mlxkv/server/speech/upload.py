"""Forms with one file, kept in memory: no recording is written to this machine's disk.

Bytes and time are bounded while the body comes in (`edge.bodies`), the number of fields and their
length here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

MAX_FIELDS = 32
MAX_FIELD_BYTES = 64 << 10


class _InMemory(MultiPartParser):
    """Files stay in memory; the name of the bound has changed with the versions."""

    spool_max_size = max_file_size = 1 << 40


class UploadRequest(Request):
    """A request whose body is a form with one file."""

    async def _parsed(self) -> FormData:
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise HTTPException(400, "the body must be a form: multipart/form-data with a file")
        parser = _InMemory(
            self.headers,
            self.stream(),
            max_files=1,
            max_fields=MAX_FIELDS,
            max_part_size=MAX_FIELD_BYTES,
        )
        try:
            return await parser.parse()
        except MultiPartException as error:
            raise HTTPException(400, f"the form cannot be read: {error.message}") from None

    def form(self, **limits: Any) -> Any:
        """The form; its bounds are those of this module."""
        return self._parsed()


class UploadRoute(APIRoute):
    """A route whose body is a form with one file."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(UploadRequest(request.scope, request.receive))

        return handle
