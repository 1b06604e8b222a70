"""`mlxkv verify`: prove that restored KV equals computed KV, or try out all a model can do."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mlxkv.commands.options import AsJson, Context, DType, Memory, Model, takes
from mlxkv.errors import INTERRUPTED, UsageError

if TYPE_CHECKING:
    from mlxkv.store.settings import Given


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """Of the command line; made by `takes`."""

    model: Model
    tokens: int | None = typer.Option(
        None, help="Length of the prompt; default: past the second wrap of every window."
    )
    kv_type: list[str] | None = typer.Option(
        None, help="native, q8, k8v4 or q4; may be repeated; default: all."
    )
    full: bool = typer.Option(
        False,
        "--full",
        help="Instead try out all that the model can do: chat, reasoning, formats, tools, "
        "limits, pictures, sound, prefix reuse, memory.",
    )
    strict: bool = typer.Option(
        False, "--strict", help="With --full, a wrong answer fails as well."
    )
    report: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="With --full, its report; default: mlxkv-verify-MODEL.json in the current folder.",
    )
    context: Context = None
    dtype: DType = "auto"
    memory: Memory = None
    as_json: AsJson = False


@takes(VerifyOptions)
def verify(options: VerifyOptions) -> int:
    """Prove on your model that restored KV gives the same answers as computed KV.

    Runs one prompt cold, in other chunks, after a rewind, and from pages in RAM and on disk, in
    each KV format; exits with 1 if a path differs from the cold run by more than is allowed.

    With --full all that the model can do is tried out instead, and a report is written. It exits
    with 1 if something that mlxkv promises does not hold.
    """
    from mlxkv.bench import verify as check
    from mlxkv.kv.types import layer_types
    from mlxkv.store.settings import COMMAND_LINE, Given
    from mlxkv.terminal.local import load_model

    o, kv_types = options, tuple(str(layer_types(each)) for each in options.kv_type or ())
    if o.full and (o.tokens is not None or len(kv_types) > 1):
        raise UsageError("--full takes one --kv-type, and no --tokens")
    for name, value in (("--strict", o.strict), ("--report", o.report)):
        if value and not o.full:
            raise UsageError(f"{name} is for --full")
    own = kv_types[0] if o.full and kv_types else None
    given = Given(context=o.context, kv_type=own, memory=o.memory, origin=COMMAND_LINE)
    if o.full:
        return _full(options, given)
    with load_model(o.model, o.dtype, given) as llm:
        made = check.verify(llm, o.tokens, kv_types)
    print(json.dumps(check.to_dict(made)) if o.as_json else check.text(made))
    return 0 if made.passed else 1


def _full(options: VerifyOptions, given: Given) -> int:
    from mlxkv.bench.acceptance import report as reports
    from mlxkv.bench.acceptance.subject import Subject
    from mlxkv.bench.acceptance.suite import accept
    from mlxkv.bench.report import check_writable, free_path, write
    from mlxkv.terminal.console import ProgressLine
    from mlxkv.terminal.local import load_model

    file = options.report or free_path("mlxkv-verify", Path(options.model).name)
    check_writable(file)
    progress = ProgressLine()
    with load_model(options.model, options.dtype, given) as llm:
        try:
            made = accept(Subject(llm), options.model, options.strict, progress)
        finally:
            progress.clear()
    write(reports.to_dict(made), file)
    if options.as_json:
        print(json.dumps(reports.to_dict(made), indent=1))
    else:
        print(reports.text(made, shutil.get_terminal_size().columns))
    print(f"report: {file}", file=sys.stderr)
    return int(not made.passed) if made.complete else INTERRUPTED
