"""Ollama's API under /api.

Without /api/push: there is no registry to push to. `/` is the monitoring page.
"""

from __future__ import annotations

from fastapi import APIRouter

from mlxkv.engine.messages import Engine
from mlxkv.server.config import ServerConfig
from mlxkv.server.ollama import blobs, chat, embeddings, library, models


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """All routes of the API."""
    routes = APIRouter()
    for module in (chat, models, embeddings, library, blobs):
        routes.include_router(module.router(engine, config))
    return routes
