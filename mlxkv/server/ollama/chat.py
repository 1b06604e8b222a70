"""POST /api/generate and /api/chat."""

from __future__ import annotations

import dataclasses
import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlxkv.engine.messages import Ask, Engine
from mlxkv.generation.outputs import Chunk
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.media.read import with_media
from mlxkv.server.model_names import LocalModel, present, with_named
from mlxkv.server.ollama.answers import NDJSON, Piece, Reply, error_line
from mlxkv.server.ollama.fields import Answered, GenerateRequest
from mlxkv.server.ollama.messages import ChatRequest, template_messages
from mlxkv.server.requests import apply_rules, build_request


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes that generate text."""
    routes = APIRouter(route_class=JSONRoute, tags=["ollama"])

    @routes.post("/api/generate")
    async def generate(request: Request, body: GenerateRequest) -> Response:
        """Answer a prompt. Without one: load the model, or unload it if keep_alive is 0."""
        note(request, body)
        if not body.prompt and not body.images:
            return await _load(request, engine, config, body, chats=False)
        return await _answer(request, engine, config, body)

    @routes.post("/api/chat")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer messages. Without any: load the model, or unload it if keep_alive is 0."""
        note(request, body)
        if not body.messages:
            return await _load(request, engine, config, body, chats=True)
        return await _answer(request, engine, config, body)

    return routes


async def _answer(
    request: Request,
    engine: Engine,
    config: ServerConfig,
    body: GenerateRequest | ChatRequest,
) -> Response:
    chats = isinstance(body, ChatRequest)
    reply = Reply(body.model_name, chats, calls=chats and bool(body.tools))
    model = await present(engine, config, body.model_name)
    ask = await with_named(engine, config, model, _ask(body, model, request.state.owner))
    ask = await with_media(request, engine, config, model, ask)
    ask = apply_rules(ask, config, request)
    if model.name not in engine.names():
        # The engine would load it too, but here its time can be measured.
        path = await sse.unless_gone(request, engine.load(model.name, path=model.path))
        ask = dataclasses.replace(ask, path=path)
        reply.load_ns = time.perf_counter_ns() - reply.started_ns
    answer = engine.submit(ask)
    if body.stream is False:
        return JSONResponse(await sse.unless_gone(request, reply.whole(answer), [answer]))
    lines = reply.events(answer)
    return await sse.stream(request, lines, config, error_line, NDJSON, ping=None, answers=[answer])


def _ask(body: GenerateRequest | ChatRequest, model: LocalModel, owner: str) -> Ask:
    chats = isinstance(body, ChatRequest)
    prompt = template_messages(body.messages or ()) if chats else body.engine_prompt()
    request = build_request(prompt, logprobs=body.n_logprobs, **body.keywords())
    return model.ask(request, owner, body.keep_alive_s)


async def _load(
    request: Request, engine: Engine, config: ServerConfig, body: Answered, chats: bool
) -> Response:
    reply = Reply(body.model_name, chats)
    model = await present(engine, config, body.model_name)
    if body.keep_alive_s == 0:
        await engine.unload(model.name, model.path)
        last = Chunk("", finish_reason="unload")
    else:
        await sse.unless_gone(request, engine.load(model.name, body.keep_alive_s, model.path))
        reply.load_ns = time.perf_counter_ns() - reply.started_ns
        last = Chunk("", finish_reason="load")
    return JSONResponse(reply.part(Piece(), **reply.last_fields(last)))
