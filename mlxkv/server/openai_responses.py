"""POST /v1/responses."""

from __future__ import annotations

from fastapi import APIRouter

from mlxkv.engine import Engine
from mlxkv.server.config import ServerConfig
from mlxkv.server.json_route import JSONRoute


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The route of responses."""
    return APIRouter(route_class=JSONRoute, tags=["openai"])
