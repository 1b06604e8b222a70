"""Ollama's API under /api.

Not here: /api/push and /api/blobs (there is no registry to push to). `/` is for people.
"""

from __future__ import annotations

from fastapi import APIRouter

from mlxkv.engine.messages import Engine
from mlxkv.server.config import ServerConfig
from mlxkv.server.ollama import chat, library, models


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """All routes of the API."""
    routes = APIRouter()
    for module in (chat, models, library):
        routes.include_router(module.router(engine, config))
    return routes
