"""Routes that change the stored models: POST /api/pull, /api/copy and /api/create, and
DELETE /api/delete.

The work runs in a few threads. After its client disconnects it ends at its next report.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from mlxkv.engine.messages import Engine
from mlxkv.errors import MlxkvError, UsageError, contained
from mlxkv.sampling.params import GENERATION_CONFIG, SamplingParams
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import Refused, Strict
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import find, new_name, pullable_name, stored_name
from mlxkv.server.ollama.answers import NDJSON, error_line, line
from mlxkv.server.ollama.fields import Named, Options
from mlxkv.server.threads import run_in_threadpool
from mlxkv.store import derive, library, resolve, uploads
from mlxkv.store.adapter_names import check_number, find_named
from mlxkv.store.adapters import AdapterRef
from mlxkv.store.resolve import Report

MAX_JOBS = 2
"""Downloads and conversions at a time: one alone can keep disk or network busy."""
EVERY_S = 0.1
"""Time between two reports of the same step."""
_SAMPLING = tuple(GENERATION_CONFIG.values())
_SETTINGS = {"num_ctx": "context", "num_keep": "keep"}
_KEPT = (*_SETTINGS, *_SAMPLING)

Work = Callable[[Report], object]
Statuses = AsyncGenerator[dict[str, Any], None]


class PullRequest(Named):
    """A model to download."""

    insecure: Refused = None
    stream: bool | None = None


class DeleteRequest(Named):
    """A model to delete."""


class CopyRequest(Strict):
    """A model to copy to a second name."""

    source: str
    destination: str


class CreateRequest(Named):
    """A model to make from another one."""

    from_: Annotated[str | None, Field(alias="from")] = None
    quantize: str | None = Field(
        default=None, description="A format of `mlxkv convert`: affine4, affine8, mxfp4, ..."
    )
    parameters: Options | None = Field(None, description=f"{', '.join(_KEPT)}.")
    stream: bool | None = None
    files: Refused = Field(default=None, description="Use `mlxkv convert`.")
    adapters: dict[str, float | str] | None = Field(
        default=None,
        description="Adapters that are here, by name or as org/name, each with its weight; or "
        "files by name, each with the digest under which /api/blobs has it.",
    )
    template: Refused = None
    system: Refused = None
    messages: Refused = None
    license: Refused = None

    def settings(self) -> dict[str, Any]:
        """The parameters that are set.

        Raises:
            UsageError: one that cannot be stored with a model.
        """
        if self.parameters is None:
            return {}
        given = self.parameters.model_dump(exclude_none=True)
        if unknown := sorted(given.keys() - {*_KEPT}):
            raise UsageError(
                f"parameters.{unknown[0]}: not supported; a model keeps {', '.join(_KEPT)}"
            )
        return given | self.parameters.sampling()


class Stopped(MlxkvError):
    """The client disconnected, so its work stops."""


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes that change the stored models."""
    routes = APIRouter(route_class=JSONRoute, tags=["ollama"])
    limiter = anyio.CapacityLimiter(MAX_JOBS)

    async def respond(request: Request, work: Work, streams: bool | None) -> Response:
        lines = _progress(work, limiter)
        if streams is False:
            return JSONResponse(await sse.unless_gone(request, _last(lines)))
        events = _events(lines)
        return await sse.stream(request, events, config, error_line, NDJSON, ping=None)

    @routes.post("/api/pull")
    async def pull(request: Request, body: PullRequest) -> Response:
        """Download a model."""
        name = await run_in_threadpool(pullable_name, body.model_name)
        return await respond(request, lambda report: resolve.pull(name, report=report), body.stream)

    @routes.delete("/api/delete")
    async def delete(body: DeleteRequest) -> Response:
        """Delete a model, when its last answer has ended; new requests wait for that."""
        name = await run_in_threadpool(stored_name, body.model_name)
        async with engine.without(name):
            await run_in_threadpool(library.remove, name)
        return Response()

    @routes.post("/api/copy")
    async def copy(body: CopyRequest) -> Response:
        """Copy a model to a second name."""
        await run_in_threadpool(_copy, body.source, body.destination)
        return Response()

    @routes.post("/api/create")
    async def create(request: Request, body: CreateRequest) -> Response:
        """Make a model from another one."""
        work = await run_in_threadpool(_creation, body)
        return await respond(request, work, body.stream)

    return routes


def _copy(source: str, destination: str) -> None:
    folder = find(source).path
    assert folder is not None
    derive.derive(folder, new_name(destination))


def _creation(body: CreateRequest) -> Work:
    """The work that makes a model.

    Raises:
        UsageError: an unsupported parameter, or the name exists.
        ModelNotFound: no such source.
    """
    if not body.from_:
        raise UsageError("from is required: it names the stored model to start from")
    values, name, source = body.settings(), new_name(body.model_name), stored_name(body.from_)
    refs, files = list[AdapterRef](), dict[str, str]()
    for each, given in (body.adapters or {}).items():
        if isinstance(given, str):
            files[each] = given
        else:
            refs.append(AdapterRef(find_named(each), given))
    check_number(len(refs), "adapters")
    sampling = {key: values[key] for key in _SAMPLING if key in values}
    chosen = {_SETTINGS[key]: values[key] for key in _SETTINGS if key in values}

    def work(report: Report) -> object:
        with uploads.adapters_of(files, len(refs)) as sent:
            return derive.derive(
                resolve.resolve(source, fetch=False, report=report),
                name,
                quantize=body.quantize or None,
                chosen=chosen,
                sampling=SamplingParams(**sampling) if sampling else None,
                adapters=[*refs, *sent],
                report=report,
            )

    return work


class _Lines:
    """Turns the reports of a worker thread into status lines."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._label, self._at = "", 0.0
        self.queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.stop = threading.Event()

    def run(self, work: Work) -> None:
        """Work in this thread; whatever it raises is an error of the request."""
        try:
            work(self.report)
        except BaseException as error:
            raise contained(error) from None

    def report(self, label: str, done: int, total: int) -> None:
        """A `resolve.Report`, called in the worker thread."""
        if self.stop.is_set():
            raise Stopped("the client disconnected")
        now = time.monotonic()
        if label == self._label and done < total and now - self._at < EVERY_S:
            return
        self._label, self._at = label, now
        amounts = {"total": total, "completed": done} if total else {}
        self._loop.call_soon_threadsafe(self.queue.put_nowait, {"status": label, **amounts})


async def _progress(work: Work, limiter: anyio.CapacityLimiter) -> Statuses:
    """Yield the reports of some work, then `success`. Closing the generator stops the work."""
    lines = _Lines()

    async def run() -> None:
        try:
            await anyio.to_thread.run_sync(lines.run, work, limiter=limiter)
        finally:
            lines.queue.put_nowait(None)

    task = asyncio.ensure_future(run())
    try:
        while (each := await lines.queue.get()) is not None:
            yield each
        await task
        yield {"status": "success"}
    finally:
        lines.stop.set()
        # Nothing awaits the task; its error, the stop, must be retrieved.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())


async def _events(lines: Statuses) -> sse.Events:
    async with aclosing(lines):
        async for each in lines:
            yield line(each)


async def _last(lines: Statuses) -> dict[str, Any]:
    last: dict[str, Any] = {}
    async with aclosing(lines):
        async for each in lines:
            last = each
    return last
