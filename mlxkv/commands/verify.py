"""`mlxkv verify`: prove that restored KV equals computed KV, or try out all a model can do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxkv.commands.options import AsJson, Context, DType, Memory, Model
from mlxkv.errors import INTERRUPTED, UsageError

if TYPE_CHECKING:
    from mlxkv.store.settings import Given


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
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Instead try out all that the model can do: chat, reasoning, formats, tools, "
            "limits, pictures, sound, prefix reuse, memory.",
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --full, a wrong answer fails as well.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --full, its report; default: mlxkv-verify-MODEL.json in the current folder.",
        ),
    ] = None,
    context: Context = None,
    dtype: DType = "auto",
    memory: Memory = None,
    as_json: AsJson = False,
) -> int:
    """Prove on your model that restored KV gives the same answers as computed KV.

    Runs one prompt cold, in other chunks, after a rewind, and from pages in RAM and on disk, in
    each KV format; exits with 1 if a path differs from the cold run by more than is allowed.

    With --full all that the model can do is tried out instead, and a report is written. It exits
    with 1 if something that mlxkv promises does not hold.
    """
    from mlxkv.bench import verify as check
    from mlxkv.kv.storage import storage_of
    from mlxkv.kv.types import KV_TYPES
    from mlxkv.store.settings import COMMAND_LINE, Given
    from mlxkv.terminal.local import load_model

    for each in kv_type or ():
        storage_of(each)
    if full and (tokens is not None or len(kv_type or ()) > 1):
        raise UsageError("--full takes one --kv-type, and no --tokens")
    for name, value in (("--strict", strict), ("--report", report)):
        if value and not full:
            raise UsageError(f"{name} is for --full")
    own = kv_type[0] if full and kv_type else None
    given = Given(context=context, kv_type=own, memory=memory, origin=COMMAND_LINE)
    if full:
        return _full(model, dtype, given, strict, report, as_json)
    with load_model(model, dtype, given) as llm:
        made = check.verify(llm, tokens, tuple(kv_type or KV_TYPES))
    print(json.dumps(check.to_dict(made)) if as_json else check.text(made))
    return 0 if made.passed else 1


def _full(
    model: str, dtype: str, given: Given, strict: bool, file: Path | None, as_json: bool
) -> int:
    from mlxkv.bench.acceptance import report as reports
    from mlxkv.bench.acceptance.subject import Subject
    from mlxkv.bench.acceptance.suite import accept
    from mlxkv.bench.report import check_writable, free_path, write
    from mlxkv.terminal.console import ProgressLine
    from mlxkv.terminal.local import load_model

    file = file or free_path("mlxkv-verify", Path(model).name)
    check_writable(file)
    progress = ProgressLine()
    with load_model(model, dtype, given) as llm:
        try:
            made = accept(Subject(llm), model, strict, progress)
        finally:
            progress.clear()
    write(reports.to_dict(made), file)
    if as_json:
        print(json.dumps(reports.to_dict(made), indent=1))
    else:
        print(reports.text(made, shutil.get_terminal_size().columns))
    print(f"report: {file}", file=sys.stderr)
    return int(not made.passed) if made.complete else INTERRUPTED
