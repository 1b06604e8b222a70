"""The root command, and the edge of errors. Commands import late, so that --help is instant.

Results go to stdout; progress, figures and errors to stderr. An error is one line, and its exit
code is the exception's (mlxkv.errors).
"""

from __future__ import annotations

import sys
from typing import Annotated, cast

import typer

from mlxkv import __version__
from mlxkv.commands import adapters, kv, models, run, serve
from mlxkv.commands.alias import alias
from mlxkv.commands.bench import bench
from mlxkv.commands.convert import compare, convert
from mlxkv.commands.doctor import doctor
from mlxkv.commands.embed import embed
from mlxkv.commands.launch import launch
from mlxkv.commands.options import options_of
from mlxkv.commands.rerank import rerank
from mlxkv.commands.transcribe import transcribe
from mlxkv.commands.verify import verify
from mlxkv.errors import (
    INTERRUPTED,
    MlxkvError,
    OutOfMemory,
    UsageError,
    contained,
    lacks_memory,
    one_line,
)

app = typer.Typer(
    name="mlxkv",
    help="Run language models with MLX.",
    rich_markup_mode=None,  # keeps rich out of the start
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(models.pull)
app.command("list")(models.list_)
app.command("ls", hidden=True)(models.list_)
app.command()(models.show)
app.command()(models.rm)
app.command()(convert)
app.command()(compare)
app.command()(models.plan)
app.command()(alias)
app.command()(verify)
app.command()(models.models)
app.command()(doctor)
app.command()(run.run)
app.command()(transcribe)
app.command()(embed)
app.command()(rerank)
app.add_typer(kv.app)
app.add_typer(adapters.app)
app.command()(serve.serve)
app.command()(serve.ps)
app.command()(serve.stop)
app.command()(launch)
app.command()(bench)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    flags = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in flags
    if debug:  # accepted wherever it stands
        args.remove("--debug")
    usage_error = typer.BadParameter.__mro__[2]  # click's ClickException, which typer may carry
    try:
        code = app(args, prog_name="mlxkv", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BaseException as raised:
        error = contained(raised)
        if debug:
            raise
        if isinstance(error, MlxkvError):
            return _fail(error.spelled(options_of(app, args)), error.exit_code)
        if isinstance(error, usage_error):
            text = cast(typer.BadParameter, error).format_message()
            return _fail(f"{text.rstrip('.')}; see `mlxkv --help`", UsageError.exit_code)
        if lacks_memory(error):
            return _fail(f"memory ran out ({one_line(error)})", OutOfMemory.exit_code)
        text = f"unexpected {type(error).__name__}: {one_line(error)}"
        return _fail(f"{text} (--debug shows the trace)", 1)


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


@app.command(hidden=True)
def version() -> None:
    """Print the version."""
    print(f"mlxkv {__version__}")


if __name__ == "__main__":
    sys.exit(main())
