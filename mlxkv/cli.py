"""The command line: parses and prints. Imports live inside the commands, so that --help is instant.

Results go to stdout; progress, figures and errors to stderr. An error is one line, and its exit
code is the exception's (mlxkv.errors).
"""

from __future__ import annotations

import sys
from typing import Annotated, cast

import typer

from mlxkv import __version__
from mlxkv.commands import kv, run, serve
from mlxkv.commands.bench import bench
from mlxkv.commands.options import KVType, Model, options_of
from mlxkv.commands.run import Context
from mlxkv.errors import INTERRUPTED, MlxkvError, UsageError
from mlxkv.llm import plan as plans
from mlxkv.store import library

app = typer.Typer(
    name="mlxkv",
    help="Run language models with MLX.",
    rich_markup_mode=None,  # keeps rich out of the start
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(run.run)
app.add_typer(kv.app)
app.command()(serve.serve)
app.command()(serve.ps)
app.command()(serve.stop)
app.command()(bench)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    flags = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in flags
    if debug:  # accepted wherever it stands
        args.remove("--debug")
    usage_error = typer.BadParameter.__mro__[2]  # click's ClickException, which typer may carry
    try:
        code = app(args, prog_name="mlxkv", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Abort:
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        if isinstance(error, MlxkvError):
            return _fail(error.spelled(options_of(app, args)), error.exit_code)
        if isinstance(error, usage_error):
            text = cast(typer.BadParameter, error).format_message()
            return _fail(f"{text.rstrip('.')}; see `mlxkv --help`", UsageError.exit_code)
        text = " ".join(str(error).split())
        return _fail(f"unexpected {type(error).__name__}: {text} (--debug shows the trace)", 1)


def _fail(message: str, code: int) -> int:
    print(f"mlxkv: {' '.join(message.split())}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    if version:
        print(f"mlxkv {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def pull(model: Model) -> None:
    """Fetch a model."""
    from mlxkv.store import catalog, resolve
    from mlxkv.terminal.console import ProgressLine

    progress = ProgressLine()
    try:
        path = resolve.pull(model, report=progress if progress.on else resolve.silent)
    finally:
        progress.clear()
    entry = catalog.find(model)
    if entry is not None and entry.notice:
        print(entry.notice, file=sys.stderr)
    print(path)


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models that are here."""
    import json
    from dataclasses import asdict

    from mlxkv.base.units import human_bytes
    from mlxkv.terminal.console import table

    models = library.list_models()
    if as_json:
        print(json.dumps([asdict(model) | {"path": str(model.path)} for model in models]))
        return
    if not models:
        print("no models yet: `mlxkv run` fetches the default one", file=sys.stderr)
        return
    rows = [
        (
            model.name,
            model.family,
            human_bytes(model.size_bytes),
            model.quantization,
            f"{model.context:,}" if model.context else "?",
            model.source,
        )
        for model in models
    ]
    header = ("NAME", "FAMILY", "SIZE", "QUANTIZATION", "CONTEXT", "SOURCE")
    print(table(header, rows, right=("SIZE", "CONTEXT")))


app.command("ls", hidden=True)(list_)


@app.command()
def show(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model is: shape, size, KV cache, licence, files."""
    import json

    from mlxkv.store import resolve
    from mlxkv.store.info import describe, to_dict

    card = describe(model, resolve.resolve(model, fetch=False))
    print(json.dumps(to_dict(card), indent=2) if as_json else card.text())


@app.command()
def rm(
    model: Model,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a model from the disk."""
    from mlxkv.base.units import human_bytes

    plan = library.plan_removal(model)
    size = human_bytes(plan.n_bytes)
    if sys.stdin.isatty() and not yes and not typer.confirm(f"remove {model} ({size})?", err=True):
        print("nothing removed", file=sys.stderr)
        return
    freed = library.remove(model)
    print(f"removed {model}, {human_bytes(freed)} freed")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Directory, .gguf file, org/name or name.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="A path, or a bare name for mlxkv's own models folder."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", "-q", help="affine4, affine8, mxfp4, mxfp8, nvfp4, ... none."),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Values that share a scale.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="mixed: more bits for embeddings, head and the like.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
) -> None:
    """Convert a checkpoint to an MLX model directory."""
    from mlxkv.store import refs, resolve
    from mlxkv.terminal.console import ProgressLine

    progress = ProgressLine()
    try:
        path = resolve.source_path(source, report=progress if progress.on else resolve.silent)
        target = refs.output_path(output or resolve.default_output(source, quantize, dtype))
        from mlxkv.convert import convert as convert_model  # pyright: ignore[reportMissingImports]

        result = convert_model(
            path,
            target,
            dtype=dtype,
            quantize=quantize,
            group_size=group_size,
            recipe=recipe,
            dry_run=dry_run,
            progress=lambda step: progress("converting", step.done_bytes, step.total_bytes),
        )
    finally:
        progress.clear()
    if dry_run:
        from mlxkv.convert import describe  # pyright: ignore[reportMissingImports]

        print(describe(result.plan))
    else:
        print(result.path)


@app.command()
def plan(
    model: Model,
    context: Annotated[
        int | None, typer.Option(help="Tokens; without it what `run` would have.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Conversations at a time.")] = 1,
    kv_type: KVType = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    memory: Annotated[str | None, typer.Option(help="Limit, such as 16GiB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what memory a model and its KV cache need, before anything is loaded."""
    import json

    from mlxkv.terminal import plan_text

    needs = plans.plan(model, context, sequences, kv_type, memory, dtype)
    print(json.dumps(plan_text.to_dict(needs)) if as_json else plan_text.text(needs))


@app.command()
def verify(
    model: Model,
    tokens: Annotated[
        int | None,
        typer.Option(help="Length of the prompt; past the second wrap of every window without it."),
    ] = None,
    kv_type: Annotated[
        list[str] | None,
        typer.Option("--kv-type", help="native, q8 or q4; may be repeated; all without it."),
    ] = None,
    context: Context = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    memory: Annotated[str | None, typer.Option(help="Limit, such as 16GiB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Prove on a model of yours that restored KV gives what computing gives.

    Runs one prompt cold, in other chunks, after a rewind, and from pages in RAM and on disk, in
    each KV format; exits with 1 if a path differs from the cold run by more than is allowed.
    """
    import json

    from mlxkv.commands import verify as check
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


@app.command()
def models() -> None:
    """List the model families that mlxkv runs."""
    from mlxkv.store.info import supported

    print(supported())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Check what MLX runs on, and say what to do about what is missing."""
    import json

    from mlxkv.commands import doctor as checks

    findings = checks.examine()
    print(json.dumps(checks.to_dict(findings), indent=2) if as_json else checks.text(findings))
    return 1 if any(finding.state == "broken" for finding in findings) else 0


@app.command(hidden=True)
def version() -> None:
    """Print the version."""
    print(f"mlxkv {__version__}")


if __name__ == "__main__":
    sys.exit(main())
