"""Files of `POST /api/create`, sent before it: HEAD and POST /api/blobs/DIGEST.

They go to the disk as they come; `edge.bodies` bounds their bytes and their time.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from mlxkv.engine.messages import Engine
from mlxkv.server.config import ServerConfig
from mlxkv.server.threads import run_in_threadpool
from mlxkv.store import uploads


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes for files."""
    del engine, config
    routes = APIRouter(tags=["ollama"])

    @routes.head("/api/blobs/{digest}")
    async def has(digest: str) -> Response:
        """200 if the file of a digest is here, 404 if not."""
        found = await run_in_threadpool(uploads.find, digest)
        return Response(status_code=404 if found is None else 200)

    @routes.post("/api/blobs/{digest}", status_code=201)
    async def send(digest: str, request: Request) -> Response:
        """Send a file: the body is its content, whose SHA-256 is `sha256:...`."""
        length = request.headers.get("content-length", "")
        upload = await run_in_threadpool(
            uploads.Upload, digest, int(length) if length.isdecimal() else None
        )
        try:
            async for piece in request.stream():
                await run_in_threadpool(upload.write, piece)
            await run_in_threadpool(upload.finish)
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            upload.close()
        return Response(status_code=201)

    return routes
