"""GET /v1/models, and POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import Field

from mlxkv.engine.messages import Engine
from mlxkv.errors import ModelNotFound, UsageError
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import Texts, one_or_more
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import present
from mlxkv.server.openai.fields import Common
from mlxkv.store import library


class EmbeddingRequest(Common):
    """Texts to be made vectors of."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = Field(None, description="Not supported: the model decides.")


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes for models and embeddings."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])

    @routes.get("/v1/models")
    async def models() -> Response:
        """The models on this machine."""
        return JSONResponse({"object": "list", "data": await _models(engine)})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of the models on this machine."""
        for row in await _models(engine):
            if row["id"] == name:
                return JSONResponse(row)
        raise ModelNotFound(f"model {name[:80]!r} not found: GET /v1/models lists the models")

    @routes.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        """Embed texts, with a model that was trained for it."""
        note(request, body)
        model = await present(engine, config, body.model)
        texts = one_or_more(body.input)
        found = await sse.unless_gone(request, engine.embed(model.name, texts))
        if len(found.vectors) != len(texts):
            raise UsageError(f"{len(texts)} texts gave {len(found.vectors)} vectors")
        rows = [_row(i, vector, body.encoding_format) for i, vector in enumerate(found.vectors)]
        used = {"prompt_tokens": found.n_tokens, "total_tokens": found.n_tokens}
        return JSONResponse({"object": "list", "data": rows, "model": body.model, "usage": used})

    return routes


async def _models(engine: Engine) -> list[dict[str, Any]]:
    """The models on this machine, and those loaded from other folders."""
    rows: dict[str, dict[str, Any]] = {}
    for stored in await run_in_threadpool(library.list_models):
        created = int(stored.path.stat().st_mtime) if stored.path.exists() else 0
        rows[stored.name] = _model(stored.name, created)
    for name in engine.names():
        rows.setdefault(name, _model(name, 0))
    return [rows[name] for name in sorted(rows)]


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "mlxkv"}


def _row(index: int, vector: Sequence[float], encoding: str | None) -> dict[str, Any]:
    shown: Any = list(vector)
    if encoding == "base64":
        shown = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return {"object": "embedding", "index": index, "embedding": shown}
