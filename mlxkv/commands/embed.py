"""`mlxkv embed`: vectors of texts."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from mlxkv.commands.inputs import texts_or_lines
from mlxkv.commands.options import AsJson, DType, Memory, Model
from mlxkv.errors import UsageError


def embed(
    model: Model,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT... | -", help="Texts; - for one in each line piped in."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What the model puts before each text: query, document, ...; default: its own.",
        ),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(help="Values of a vector, the first ones; default: all.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut texts that are longer than the model takes.")
    ] = False,
    as_json: AsJson = False,
    npy: Annotated[bool, typer.Option("--npy", help="Write a NumPy file, float32 [N, D].")] = False,
    dtype: DType = "auto",
    memory: Memory = None,
) -> None:
    """Make vectors of texts, by a model that was trained for it: one a line.

    No KV is kept for texts: attention goes both ways, so no beginning serves another text.
    """
    from mlxkv.generation.embed_request import EmbedRequest
    from mlxkv.store.settings import COMMAND_LINE, Given
    from mlxkv.terminal.local import load_model

    if as_json and npy:
        raise UsageError("--json and --npy are two formats: give one")
    if npy and sys.stdout.isatty():
        raise UsageError("--npy writes a binary file: redirect it, mlxkv embed ... > vectors.npy")
    of = texts_or_lines(texts, "nothing to embed")
    EmbedRequest(of, prompt, dimensions, truncate)  # raises before a model is loaded
    with load_model(model, dtype, Given(memory=memory, origin=COMMAND_LINE)) as llm:
        vectors = llm.embed(of, prompt=prompt, dimensions=dimensions, truncate=truncate)
    if npy:
        import numpy as np

        np.save(sys.stdout.buffer, np.array(vectors))
        return
    rows: Any = vectors.tolist()
    if as_json:
        print(json.dumps({"model": model, "dimensions": vectors.shape[1], "embeddings": rows}))
    else:
        for row in rows:
            print(json.dumps(row))
