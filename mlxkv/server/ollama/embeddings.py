"""Vectors of texts: POST /api/embed and /api/embeddings.

As in Ollama, a request without a text loads the model and has no vectors in its answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from mlxkv.engine.messages import EmbedAsk, Embeddings, Engine
from mlxkv.generation.embed_request import EmbedRequest
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import (
    Count,
    NoEffect,
    Real,
    Refused,
    Text,
    one_or_more,
    seconds,
)
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import present, without_adapters
from mlxkv.server.ollama.fields import Loading, Named, Options


class EmbedBody(Named):
    """Texts to embed."""

    input: str | Annotated[list[Text], Field(max_length=2048)] | None = None
    truncate: bool | None = None
    dimensions: Count | None = None
    options: Annotated[Options | Loading | None, NoEffect()] = None
    adapter: Refused = None
    keep_alive: Real | str | None = None


class EmbeddingsBody(Named):
    """A text to embed; the form before /api/embed."""

    prompt: str = ""
    options: Annotated[Options | Loading | None, NoEffect()] = None
    adapter: Refused = None
    keep_alive: Real | str | None = None


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes for vectors of texts."""
    routes = APIRouter(route_class=JSONRoute, tags=["ollama"])

    async def embedded(
        http: Request,
        body: EmbedBody | EmbeddingsBody,
        texts: Sequence[str],
        dimensions: int | None = None,
        truncate: bool = True,
    ) -> Embeddings:
        note(http, body)
        model = without_adapters(await present(engine, config, body.model_name))
        keep_alive_s = seconds(body.keep_alive)
        if not texts:
            await sse.unless_gone(http, engine.load(model.name, keep_alive_s, model.path))
            return Embeddings((), 0)
        wanted = EmbedRequest(texts, "", dimensions, truncate)
        ask = EmbedAsk(model.name, wanted, http.state.owner, keep_alive_s, model.path)
        return await sse.unless_gone(http, engine.embed(ask))

    @routes.post("/api/embed")
    async def embed(request: Request, body: EmbedBody) -> Response:
        """Embed texts, with a model that was trained for it."""
        started = time.perf_counter_ns()
        truncate = body.truncate is not False  # as in Ollama, a long text is cut
        texts = one_or_more(body.input) if body.input else ()
        found = await embedded(request, body, texts, body.dimensions, truncate)
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
        found = await embedded(request, body, [body.prompt] if body.prompt else ())
        return JSONResponse({"embedding": list(found.vectors[0]) if found.vectors else []})

    return routes
