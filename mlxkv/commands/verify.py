"""`mlxkv verify`: prove that restored KV equals computed KV, or try out all a model can do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxkv.commands.options import AsJson, Context, DType, Memory, Model
from mlxkv.errors import OutputError, UsageError

if TYPE_CHECKING:
    from mlxkv.llm.llm import LLM


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
            help="Try out all that the model can do instead: chat, reasoning, formats, tools, "
            "limits, pictures, sound, prefix reuse, memory.",
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --full, a wrong answer fails as well.")
    ] = False,
    json_to: Annotated[
        str | None,
        typer.Option("--json-to", metavar="FILE", help="Write JSON to FILE beside the table."),
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
    if full and (tokens or len(kv_type or ()) > 1):
        raise UsageError("--full takes one --kv-type, and no --tokens")
    if strict and not full:
        raise UsageError("--strict is for --full")
    _check_writable(json_to)
    own = kv_type[0] if full and kv_type else None
    given = Given(context=context, kv_type=own, memory=memory, origin=COMMAND_LINE)
    with load_model(model, dtype, given) as llm:
        if full:
            return _full(llm, strict, json_to, as_json)
        report = check.verify(llm, tokens, tuple(kv_type or KV_TYPES))
    made = json.dumps(check.to_dict(report))
    _write(made, json_to)
    print(made if as_json else check.text(report))
    return 0 if report.passed else 1


def _full(llm: LLM, strict: bool, json_to: str | None, as_json: bool) -> int:
    from mlxkv.bench.acceptance import report as reports
    from mlxkv.bench.acceptance.subject import Subject
    from mlxkv.bench.acceptance.suite import accept
    from mlxkv.terminal.console import ProgressLine

    progress = ProgressLine()
    try:
        report = accept(Subject(llm), progress)
    finally:
        progress.clear()
    made = json.dumps(reports.to_dict(report), ensure_ascii=False)
    _write(made, json_to)
    print(made if as_json else reports.text(report))
    return 0 if report.passed(strict) else 1


def _check_writable(file: str | None) -> None:
    """Raise OutputError now, and not when all checks have run."""
    if file is None:
        return
    path = Path(file).expanduser()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{file}: cannot be written")


def _write(text: str, file: str | None) -> None:
    if file is None:
        return
    try:
        Path(file).expanduser().write_text(f"{text}\n", "utf-8")
    except OSError as error:
        raise OutputError(f"{file}: {error.strerror}") from error
