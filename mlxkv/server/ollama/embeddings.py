"""Vectors of texts: POST /api/embed and /api/embeddings."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlxkv.engine.messages import EmbedAsk, Embeddings, Engine
from mlxkv.generation.embed_request import EmbedRequest
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import Count, NoEffect, Real, Text, Texts, one_or_more, seconds
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import present
from mlxkv.server.ollama.fields import Loading, Named, Options


class EmbedBody(Named):
    """Texts to embed."""

    input: Texts
    truncate: bool | None = None
    dimensions: Count | None = None
    options: Annotated[Options | Loading | None, NoEffect()] = None
    keep_alive: Real | str | None = None


class EmbeddingsBody(Named):
    """A text to embed; the form before /api/embed."""

    prompt: Text
    options: Annotated[Options | Loading | None, NoEffect()] = None
    keep_alive: Real | str | None = None


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes for vectors of texts."""
    routes = APIRouter(route_class=JSONRoute, tags=["ollama"])

    async def embedded(
        http: Request, body: EmbedBody | EmbeddingsBody, wanted: EmbedRequest
    ) -> Embeddings:
        note(http, body)
        model = await present(engine, config, body.model_name)
        keep_alive_s = seconds(body.keep_alive)
        ask = EmbedAsk(model.name, wanted, http.state.owner, keep_alive_s, model.path)
        return await sse.unless_gone(http, engine.embed(ask))

    @routes.post("/api/embed")
    async def embed(request: Request, body: EmbedBody) -> Response:
        """Embed texts, with a model that was trained for it."""
        started = time.perf_counter_ns()
        truncate = body.truncate is not False  # as in Ollama, a long text is cut
        wanted = EmbedRequest(one_or_more(body.input), "", body.dimensions, truncate)
        found = await embedded(request, body, wanted)
        answer = {
            "model": body.model_name,
            "embeddings": [list(vector) for vector in found.vectors],
            "total_duration": time.perf_counter_ns() - started,
            "prompt_eval_count": found.n_tokens,
        }
        return JSONResponse(answer)

    @routes.post("/api/embeddings")
    async def embeddings(request: Request, body: EmbeddingsBody) -> Response:
        """Embed one text."""
        wanted = EmbedRequest([body.prompt], "", truncate=True)
        found = await embedded(request, body, wanted)
        return JSONResponse({"embedding": list(found.vectors[0])})

    return routes
