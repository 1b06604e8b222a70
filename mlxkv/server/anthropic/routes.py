"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlxkv.engine.messages import Ask, Engine
from mlxkv.server import sse
from mlxkv.server.anthropic.answers import PING, Reply, error_event
from mlxkv.server.anthropic.fields import CountRequest, MessagesRequest, OldThread
from mlxkv.server.anthropic.messages import BETWEEN, template_messages
from mlxkv.server.config import ServerConfig
from mlxkv.server.errors import ThreadNotFound
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.media.read import with_media
from mlxkv.server.model_names import LocalModel, present, with_named
from mlxkv.server.requests import apply_rules, build_request


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes of the API."""
    routes = APIRouter(route_class=JSONRoute, tags=["anthropic"])

    @routes.post("/v1/messages")
    async def messages(request: Request, body: MessagesRequest) -> Response:
        """Answer a conversation."""
        note(request, body)
        if isinstance(body.thread, OldThread):
            raise ThreadNotFound("no thread is kept here: send the whole conversation")
        model = await present(engine, config, body.model)
        ask = _ask(body, model, request.state.owner, **_sampling(body))
        ask = await with_named(engine, config, model, ask)
        ask = await with_media(request, engine, config, model, ask, BETWEEN)
        answer = engine.submit(apply_rules(ask, config, request))
        reply = Reply(body)
        if not body.stream:
            return JSONResponse(await sse.unless_gone(request, reply.whole(answer), [answer]))
        events = reply.events(answer)
        return await sse.stream(request, events, config, error_event, ping=PING, answers=[answer])

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request, body: CountRequest) -> Response:
        """Count the tokens of a conversation."""
        note(request, body)
        model = await present(engine, config, body.model)
        ask = _ask(body, model, request.state.owner)
        ask = await with_media(request, engine, config, model, ask, BETWEEN)
        asked = apply_rules(ask, config, request)
        tokens = await sse.unless_gone(request, engine.tokenize(asked))
        return JSONResponse({"input_tokens": len(tokens)})

    @routes.get("/api/hello", include_in_schema=False)
    @routes.head("/api/hello", include_in_schema=False)
    async def hello() -> Response:
        """What clients ask to see whether the API can be reached."""
        return JSONResponse({"message": "hello"})

    return routes


def _ask(body: CountRequest, model: LocalModel, owner: str, **options: Any) -> Ask:
    options |= body.tool_options() | {"template_options": body.chat_template_kwargs or None}
    request = build_request(template_messages(body), think=body.think, **options)
    return model.ask(request, owner)


def _sampling(body: MessagesRequest) -> dict[str, Any]:
    return body.sampling() | {
        "max_tokens": body.max_tokens,
        "draft": body.draft,
        "adapter": body.adapter,
        "stop": body.stop_sequences or None,
    }
