"""GET /v1/models."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from mlxkv.engine.messages import Engine
from mlxkv.errors import ModelNotFound
from mlxkv.server.config import ServerConfig
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import adapted, context_of, listed
from mlxkv.server.requests import whose_figures
from mlxkv.server.threads import run_in_threadpool
from mlxkv.store.adapter_names import SIGN


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes for models."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])

    @routes.get("/v1/models")
    async def models(request: Request) -> Response:
        """The models on this machine."""
        rows = await _models(engine, config, whose_figures(request))
        ends = {"first_id": rows[0]["id"], "last_id": rows[-1]["id"]} if rows else {}
        page = {"has_more": False, "first_id": None, "last_id": None, **ends}
        return JSONResponse({"object": "list", "data": rows, **page})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        """One of the models on this machine."""
        for row in await _models(engine, config, whose_figures(request)):
            if row["id"] == name:
                return JSONResponse(row)
        raise ModelNotFound(f"model {name[:80]!r} not found: GET /v1/models lists the models")

    return routes


async def _models(engine: Engine, config: ServerConfig, owner: str | None) -> list[dict[str, Any]]:
    """The models on this machine, and those loaded from other folders; of adapters in memory an
    owner's, or all for None."""
    rows = await run_in_threadpool(_stored, config)
    for loaded in await run_in_threadpool(engine.loaded, owner):
        rows.setdefault(loaded.name, _model(loaded.name, 0, loaded.context))
        for adapter, _ in loaded.adapters:
            name = f"{loaded.name}{SIGN}{adapter}"
            rows.setdefault(name, rows[loaded.name] | {"id": name, "display_name": name})
    for name, model in config.aliases:
        if model in rows:
            rows.setdefault(name, rows[model] | {"id": name, "display_name": name})
    return [rows[name] for name in sorted(rows)]


def _stored(config: ServerConfig) -> dict[str, dict[str, Any]]:
    """The rows of stored models and their aliases, by name."""
    rows, models = {}, listed(config)
    for model in models:
        created = int(model.path.stat().st_mtime) if model.path.exists() else 0
        rows[model.name] = _model(model.name, created, context_of(model.path, config))
    for model, base in adapted(models):
        rows[model.name] = rows[base.name] | {"id": model.name, "display_name": model.name}
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
