"""POST /v1/responses, and what is kept of them for an hour (`response_store`, `response_live`).

`conversation` is refused. Reasoning comes in the clear, as the content of its item, whatever
`include` names.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse

from mlxkv.engine.messages import Engine
from mlxkv.errors import UsageError
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.media.read import with_media
from mlxkv.server.model_names import present, with_named
from mlxkv.server.openai.respond import respond, submit_all
from mlxkv.server.openai.response_live import LiveResponses, labelled
from mlxkv.server.openai.response_reply import ResponseReply
from mlxkv.server.openai.response_request import ResponseRequest
from mlxkv.server.openai.response_store import ResponseStore


class ResponseRoutes(APIRouter):
    """The routes for responses.

    Attributes:
        wake: goes on with the responses in the background that were put away.
    """

    wake: Callable[[], Awaitable[None]]


def router(engine: Engine, config: ServerConfig) -> ResponseRoutes:
    """The routes for responses."""
    routes = ResponseRoutes(route_class=JSONRoute, tags=["openai"])
    store = ResponseStore()
    live = LiveResponses(engine, store)
    routes.wake = live.wake_all

    @routes.post("/v1/responses")
    async def responses(request: Request, body: ResponseRequest) -> Response:
        """Answer items with items."""
        note(request, body)
        owner = request.state.owner
        items = store.conversation(owner, body.previous_response_id, body.input)
        model = await present(engine, config, body.model)
        ask = await with_named(engine, config, model, body.ask(model, owner, items))
        ask = await with_media(request, engine, config, model, ask)
        put = partial(store.put, owner, items, goes_on=ask.request.go_on)
        keep = put if body.store is not False else None
        reply = ResponseReply(body, keep)
        ask = labelled(ask, reply, items) if keep is not None else ask
        if not body.background:
            return await respond(request, engine, config, [ask], reply, body.stream, reply.failed)
        (answer,) = submit_all(request, engine, config, [ask])
        begun = live.follow(owner, reply, answer)
        if not body.stream:
            return JSONResponse(begun.response)
        return await sse.stream(request, begun.events(), config, reply.failed)

    _add_stored(routes, store, live, config)
    return routes


def _add_stored(
    routes: APIRouter, store: ResponseStore, live: LiveResponses, config: ServerConfig
) -> None:
    """The routes for responses that were made."""

    @routes.get("/v1/responses/{response_id}")
    async def stored(
        request: Request,
        response_id: str,
        stream: bool = False,
        starting_after: Annotated[int, Query(ge=0)] | None = None,
    ) -> Response:
        """A response of the last hour; with `stream` its events, from one on."""
        owner = request.state.owner
        begun = await live.get(owner, response_id)
        if begun is not None and stream:
            after = -1 if starting_after is None else starting_after
            return await sse.stream(request, begun.events(after), config, begun.failed)
        found = store.get(owner, response_id)
        if found is not None and stream:
            raise UsageError("stream is for responses in the background: background: true")
        if found is not None:
            return JSONResponse(found.response)
        if begun is None:
            raise unknown(response_id)
        return JSONResponse(begun.response)

    @routes.post("/v1/responses/{response_id}/cancel")
    async def cancel(request: Request, response_id: str) -> Response:
        """Cancel a response in the background."""
        begun = await live.get(request.state.owner, response_id)
        if begun is None:
            raise unknown(response_id)
        await begun.cancel()
        return JSONResponse(begun.response)

    @routes.delete("/v1/responses/{response_id}")
    async def forget(request: Request, response_id: str) -> Response:
        """Forget a response."""
        owner = request.state.owner
        was_live = await live.forget(owner, response_id)
        if not store.delete(owner, response_id) and not was_live:
            raise unknown(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def unknown(response_id: str) -> HTTPException:
    """No response has this id."""
    return HTTPException(404, f"no response with the id {response_id[:80]!r}")
