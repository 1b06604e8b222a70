"""Ollama's API under /api.

Not here: /api/push and /api/blobs (there is no registry to push to). `/` is for people.
"""

from __future__ import annotations

from fastapi import APIRouter

from mlxkv.asks import Engine
from mlxkv.server import ollama_chat, ollama_library, ollama_models
from mlxkv.server.config import ServerConfig


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """All routes of the API."""
    routes = APIRouter()
    for module in (ollama_chat, ollama_models, ollama_library):
        routes.include_router(module.router(engine, config))
    return routes
