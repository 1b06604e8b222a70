"""The application: all APIs behind one guard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from anyio import CapacityLimiter
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from mlxkv.engine.messages import Engine
from mlxkv.errors import MlxkvError
from mlxkv.server import metrics
from mlxkv.server.agents.state_memory import StateMemory
from mlxkv.server.anthropic import routes as anthropic
from mlxkv.server.config import ServerConfig
from mlxkv.server.edge.api_keys import ApiKeys
from mlxkv.server.edge.bodies import Bodies
from mlxkv.server.edge.guard import LOCAL_ORIGINS, Guard
from mlxkv.server.errors import error_response
from mlxkv.server.ignored import Ignored
from mlxkv.server.media.hosts import media_hosts
from mlxkv.server.media.remote import Remote
from mlxkv.server.ollama import routes as ollama
from mlxkv.server.openai import (
    chat,
    completions,
    embeddings,
    models,
    rerank,
    responses,
    tokenize,
)
from mlxkv.server.speech import routes as speech
from mlxkv.server.sse import ClientGone

ROUTERS: tuple[Callable[[Engine, ServerConfig], APIRouter], ...] = (
    chat.router,
    completions.router,
    models.router,
    embeddings.router,
    rerank.router,
    responses.router,
    tokenize.router,
    speech.router,
    anthropic.router,
    ollama.router,
    metrics.router,
)
"""One per front end."""
PARSERS = 2
"""Large bodies that are parsed at a time."""


def create_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """The ASGI application.

    Args:
        engine: a started engine; the caller closes it.
        config: access and limits.

    `app.state.wake()`, awaited once when the server starts, goes on with responses in the
    background that a server before it has put away.
    Raises:
        UsageError: the file of API keys cannot be read, or one of `media_hosts` is none.
    """
    bodies, keys = Bodies(config), ApiKeys(config)
    guard = Middleware(Guard, config=config, bodies=bodies, keys=keys, expect=engine.expect)
    app = FastAPI(
        title="mlxkv",
        version=_version(),
        middleware=[_cors(config), guard],
        exception_handlers={
            MlxkvError: _on_error,
            HTTPException: _on_error,
            RequestValidationError: _on_error,
            ClientGone: _on_gone,
        },
        responses={
            "4XX": {"description": "The request is invalid or not allowed; the API's error shape"},
            "5XX": {"description": "The server failed or is busy; the API's error shape"},
        },
        docs_url=None,
        redoc_url=None,
    )
    app.state.bodies, app.state.api_keys = bodies, keys
    _fill_state(app.state, config)
    for make in ROUTERS:
        router = make(engine, config)
        app.include_router(router)
        if isinstance(router, responses.ResponseRoutes):
            app.state.wake = router.wake

    _add_health(app, engine)
    return app


def _fill_state(state: State, config: ServerConfig) -> None:
    """What requests share."""
    state.ignored = Ignored(config)
    state.parsers = CapacityLimiter(PARSERS)
    state.remote = Remote(media_hosts(config.media_hosts))
    state.stopping = asyncio.Event()
    state.state_memory = StateMemory(config.agent_file) if config.agent_prompts else None


def _add_health(app: FastAPI, engine: Engine) -> None:
    @app.get("/health", tags=["watching"])
    async def health() -> Response:
        """200 while the engine runs, 503 once it has failed for good; and how often it failed and
        has started again."""
        alive = engine.alive
        status = "ok" if alive else "the engine has stopped: restart the server"
        content = {"status": status, "restarts": engine.restarts}
        return JSONResponse(content, status_code=200 if alive else 503)


def _cors(config: ServerConfig) -> Middleware:
    """It stands outside of the guard, so that browsers may read its refusals."""
    return Middleware(
        CORSMiddleware,
        allow_origins=list(config.origins),
        allow_origin_regex=LOCAL_ORIGINS,
        allow_methods=["GET", "POST", "DELETE", "HEAD"],
        allow_headers=["*"],
        expose_headers=["mlxkv-ignored"],
    )


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, error)


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def _version() -> str:
    try:
        return version("mlxkv")
    except PackageNotFoundError:
        return "0"
