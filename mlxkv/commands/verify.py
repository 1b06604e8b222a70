"""`mlxkv verify`: prove on a model that restored KV equals computed KV."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mlxkv.commands.options import AsJson, Context, DType, Memory, Model


def verify(
    model: Model,
    tokens: Annotated[
        int | None,
        typer.Option(help="Length of the prompt; default: past the second wrap of every window."),
    ] = None,
    kv_type: Annotated[
        list[str] | None,
        typer.Option(help="native, q8 or q4; may be repeated; default: all."),
    ] = None,
    context: Context = None,
    dtype: DType = "auto",
    memory: Memory = None,
    as_json: AsJson = False,
) -> int:
    """Prove on your model that restored KV gives the same answers as computed KV.

    Runs one prompt cold, in other chunks, after a rewind, and from pages in RAM and on disk, in
    each KV format; exits with 1 if a path differs from the cold run by more than is allowed.
    """
    from mlxkv.bench import verify as check
    from mlxkv.kv.storage import storage_of
    from mlxkv.kv.types import KV_TYPES
    from mlxkv.store.settings import COMMAND_LINE, Given
    from mlxkv.terminal.local import load_model

    for each in kv_type or ():
        storage_of(each)
    given = Given(context=context, memory=memory, origin=COMMAND_LINE)
    with load_model(model, dtype, given) as llm:
        report = check.verify(llm, tokens, tuple(kv_type or KV_TYPES))
    print(json.dumps(check.to_dict(report)) if as_json else check.text(report))
    return 0 if report.passed else 1
