"""POST /v1/rerank: documents by how well they fit a query, in Cohere's and Jina's shape.

A chat model is asked about each document (`generation.rank`), as a request like any other: the
queue, prefixes, keys and limits are those of chats.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from mlxkv.engine.messages import Answer, Ask, Engine
from mlxkv.generation.rank import (
    AT_A_TIME,
    MAX_DOCUMENTS,
    Rank,
    Ranked,
    check,
    in_order,
    messages,
    options_of,
    ranked,
)
from mlxkv.server import sse
from mlxkv.server.agents.clients import client_of
from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import AdapterNames, Count, Part, Real, Refused, Text, seconds
from mlxkv.server.ignored import note
from mlxkv.server.json_route import JSONRoute
from mlxkv.server.model_names import LocalModel, present, with_named
from mlxkv.server.requests import build_request


class Document(Part):
    """A document with fields, of which `text` is judged."""

    text: str


class RerankRequest(Part):
    """A query, and documents to be put in order."""

    model: str
    query: Text
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Count | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Count | None = None
    instruction: str | None = None
    adapter: AdapterNames | None = None
    keep_alive: Real | str | None = None
    rank_fields: Refused = None
    max_chunks_per_doc: Refused = None

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


def router(engine: Engine, config: ServerConfig) -> APIRouter:
    """The routes for ranking: Jina's path is Cohere's first."""
    routes = APIRouter(route_class=JSONRoute, tags=["openai"])

    @routes.post("/v1/rerank")
    @routes.post("/v2/rerank")
    async def rerank(request: Request, body: RerankRequest) -> Response:
        """Put documents in order by how well they fit a query."""
        note(request, body)
        texts = body.texts()
        check(body.query, texts, body.top_n, body.max_tokens_per_doc)
        model = await present(engine, config, body.model)
        first = await with_named(engine, config, model, _ask(request, model, body, texts[0]))
        adapter = first.request.adapter  # found once: all documents have the same
        asks = [_ask(request, model, body, text, adapter) for text in texts]
        answers: list[Answer] = []
        found = await sse.unless_gone(request, _judged(engine, asks, answers), answers)
        return JSONResponse(_shown(body, texts, found))

    return routes


def _ask(
    http: Request,
    model: LocalModel,
    body: RerankRequest,
    text: str,
    adapter: Sequence[str] | None = None,
) -> Ask:
    """The request for one document.

    Args:
        http: that it came with.
        model: that judges.
        body: what is asked for.
        text: of the document.
        adapter: those of the model and the body, found; None to take them as they are named.
    """
    rank = Rank(body.query, text, body.instruction, body.max_tokens_per_doc)
    # Built without the recommended sampling, which a verdict's probabilities do not depend on.
    options = options_of(rank) | {"adapter": body.adapter}
    request = build_request(messages(rank.head, text), **options)
    ask = model.ask(request, http.state.owner, seconds(body.keep_alive))
    if adapter is not None:
        ask = replace(ask, request=replace(ask.request, adapter=tuple(adapter)))
    return replace(ask, client=client_of(http))


async def _judged(engine: Engine, asks: list[Ask], answers: list[Answer]) -> list[Ranked]:
    """The verdicts in the documents' order, some documents at a time."""
    places = asyncio.Semaphore(AT_A_TIME)

    async def judged(i: int, ask: Ask) -> Ranked:
        async with places:
            answer = engine.submit(ask)
            answers.append(answer)
            return ranked(i, [chunk async for chunk in answer])

    tasks = [asyncio.ensure_future(judged(i, ask)) for i, ask in enumerate(asks)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _shown(body: RerankRequest, texts: list[str], found: list[Ranked]) -> dict[str, Any]:
    rows = []
    for each in in_order(found, body.top_n):
        row: dict[str, Any] = {"index": each.index, "relevance_score": each.score}
        if body.return_documents:
            row["document"] = {"text": texts[each.index]}
        rows.append(row)
    n_tokens = sum(each.n_tokens for each in found)
    computed = sum(each.n_computed for each in found)
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens, "computed_tokens": computed}
    usage["cached_tokens"] = n_tokens - computed
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "object": "list",
        "model": body.model,
        "results": rows,
        "usage": usage,
        "meta": {"tokens": {"input_tokens": n_tokens, "output_tokens": 0}},
    }
