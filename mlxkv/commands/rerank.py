"""`mlxkv rerank`: documents by how well they fit a query."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from mlxkv.commands.inputs import texts_or_lines
from mlxkv.commands.options import Adapters, AsJson, Context, DType, KVType, Memory, Model


def rerank(
    model: Model,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What is looked for.")],
    documents: Annotated[
        list[str] | None,
        typer.Argument(metavar="DOC... | -", help="Texts; - for one in each line piped in."),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What makes a document fit; default: that of a web search.")
    ] = None,
    top_n: Annotated[int | None, typer.Option(help="How many to print; default: all.")] = None,
    max_tokens_per_doc: Annotated[
        int | None, typer.Option(help="Cut longer documents; default: an error.")
    ] = None,
    adapter: Adapters = None,
    as_json: AsJson = False,
    context: Context = None,
    kv_type: KVType = None,
    dtype: DType = "auto",
    memory: Memory = None,
) -> None:
    """Put documents in order by the probability that the model says they fit: the best first.

    Each line has that probability, the document's number from 0 on, and its text.
    """
    from mlxkv.generation.rank import check
    from mlxkv.store.settings import COMMAND_LINE, Given
    from mlxkv.terminal.local import load_model

    texts = texts_or_lines(documents, "nothing to rank")
    check(query, texts, top_n, max_tokens_per_doc)
    given = Given(context=context, kv_type=kv_type, memory=memory, origin=COMMAND_LINE)
    with load_model(model, dtype, given, adapter or ()) as llm:
        ranked = llm.rerank(
            query, texts, instruction=instruction, max_tokens_per_doc=max_tokens_per_doc
        )
    found = ranked[:top_n]
    if as_json:
        rows = [asdict(each) | {"document": texts[each.index]} for each in found]
        print(json.dumps({"model": model, "results": rows}))
        return
    for each in found:
        print(f"{each.score:.4f}  {each.index:>3}  {' '.join(texts[each.index].split())}")
    n_tokens, n_computed = sum(x.n_tokens for x in ranked), sum(x.n_computed for x in ranked)
    print(f"{n_computed:,} of {n_tokens:,} tokens computed", file=sys.stderr)
