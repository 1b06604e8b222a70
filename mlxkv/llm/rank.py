"""Rank documents with a model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlxkv.engine import prompt as prompts
from mlxkv.engine.driver import run
from mlxkv.engine.runtime import Runtime
from mlxkv.generation.generation import Generation
from mlxkv.generation.outputs import Chunk
from mlxkv.generation.rank import (
    AT_A_TIME,
    Rank,
    Ranked,
    check,
    in_order,
    messages,
    options_of,
    ranked,
)
from mlxkv.generation.request import Request


def rerank(
    runtime: Runtime,
    query: str,
    documents: Sequence[str],
    *,
    instruction: str | None = None,
    top_n: int | None = None,
    max_tokens_per_doc: int | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
) -> list[Ranked]:
    """Judge how well documents fit a query, by the probability that a model says yes.

    The query's and instruction's KV is computed once.

    Args:
        runtime: the model.
        query: what is looked for.
        documents: texts.
        instruction: what makes a document fit; None for that of a web search.
        top_n: how many to return; None for all.
        max_tokens_per_doc: cut longer ones; None for an error past the context.
        adapter: as for `LLM.generate`.

    Returns:
        The best first.

    Raises:
        UsageError: an embedding model, or nothing to rank.
        ContextExceeded: a document that is too long.
        TemplateError: the model has no chat template.
        OutOfMemory: no room for a document's KV.
    """
    check(query, documents, top_n, max_tokens_per_doc)
    found: list[Ranked] = []
    for start in range(0, len(documents), AT_A_TIME):
        generations = [
            _generation(runtime, Rank(query, document, instruction, max_tokens_per_doc), adapter)
            for document in documents[start : start + AT_A_TIME]
        ]
        answers: list[list[Chunk]] = [[] for _ in generations]
        for i, chunk in run(runtime, generations, keep_sessions=False):
            answers[i].append(chunk)
        found += [ranked(start + i, chunks) for i, chunks in enumerate(answers)]
    return in_order(found, top_n)


def _generation(
    runtime: Runtime, rank: Rank, adapter: str | Path | Sequence[str | Path] | None
) -> Generation:
    prompt = messages(rank.head, rank.document)
    request = Request.of(prompt, adapter=adapter, **options_of(rank))
    session = runtime.session(adapter=request.adapter)
    return prompts.start(runtime, request, prompts.prepare(runtime, request), session)
