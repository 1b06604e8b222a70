"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlxkv.engine.messages import EmbedAsk, Engine
from mlxkv.generation.embed_request import EmbedRequest
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import Count, Real, Refused, Texts, one_or_more, seconds
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import present, without_adapters
from mlxkv.server.openai.fields import Common
from mlxkv.server.threads import run_in_threadpool


class EmbeddingRequest(Common):
    """Texts to be made vectors of."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    prompt: str | None = None
    truncate: bool | None = None
    adapter: Refused = None
    keep_alive: Real | str | None = None


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The route for vectors of texts."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])

    @routes.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """Embed texts, with a model that was trained for it."""
        note(request, body)
        model = without_adapters(await present(engine, config, body.model))
        texts = one_or_more(body.input)
        wanted = EmbedRequest(texts, body.prompt, body.dimensions, bool(body.truncate))
        keep_alive_s = seconds(body.keep_alive)
        ask = EmbedAsk(model.name, wanted, request.state.owner, keep_alive_s, model.path)
        found = await sse.unless_gone(request, engine.embed(ask))
        rows = await run_in_threadpool(_rows, found.vectors, body.encoding_format)
        used = {"prompt_tokens": found.n_tokens, "total_tokens": found.n_tokens}
        return JSONResponse({"object": "list", "data": rows, "model": body.model, "usage": used})

    return routes


def _rows(vectors: Sequence[Sequence[float]], encoding: str | None) -> list[dict[str, Any]]:
    return [
        {"object": "embedding", "index": i, "embedding": _shown(vector, encoding)}
        for i, vector in enumerate(vectors)
    ]


def _shown(vector: Sequence[float], encoding: str | None) -> str | list[float]:
    """A vector as numbers, or as the little-endian float32 that OpenAI's client asks for."""
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return list(vector)
