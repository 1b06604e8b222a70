"""GET /v1/models, and POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from mlxkv.engine.messages import Engine
from mlxkv.errors import ModelNotFound, UsageError
from mlxkv.server import sse
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import Texts, one_or_more
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import context_of, listed, present
from mlxkv.server.openai.fields import Common
from mlxkv.server.threads import run_in_threadpool


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
        rows = await _models(engine, config)
        ends = {"first_id": rows[0]["id"], "last_id": rows[-1]["id"]} if rows else {}
        page = {"has_more": False, "first_id": None, "last_id": None, **ends}
        return JSONResponse({"object": "list", "data": rows, **page})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of the models on this machine."""
        for row in await _models(engine, config):
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


async def _models(engine: Engine, config: ServerConfig) -> list[dict[str, Any]]:
    """The models on this machine, and those loaded from other folders."""
    rows = await run_in_threadpool(_stored, config)
    for loaded in await run_in_threadpool(engine.loaded):
        rows.setdefault(loaded.name, _model(loaded.name, 0, loaded.context))
    for name, model in config.aliases:
        if model in rows:
            rows.setdefault(name, rows[model] | {"id": name, "display_name": name})
    return [rows[name] for name in sorted(rows)]


def _stored(config: ServerConfig) -> dict[str, dict[str, Any]]:
    """The rows of stored models and their aliases, by name."""
    rows = {}
    for model in listed(config):
        created = int(model.path.stat().st_mtime) if model.path.exists() else 0
        rows[model.name] = _model(model.name, created, context_of(model.path, config))
    return rows


def _model(name: str, created: int, context: int | None) -> dict[str, Any]:
    """A row that the clients of OpenAI, vLLM, OpenRouter and Anthropic can read.

    Args:
        name: the model's name, or its alias.
        created: seconds since 1970.
        context: tokens of prompt and answer together; None if not known.
    """
    limits = {"context_length": context, "max_model_len": context, "max_input_tokens": context}
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "mlxkv",
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **(limits if context else {}),
    }


def _row(index: int, vector: Sequence[float], encoding: str | None) -> dict[str, Any]:
    shown: Any = list(vector)
    if encoding == "base64":
        shown = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return {"object": "embedding", "index": index, "embedding": shown}
