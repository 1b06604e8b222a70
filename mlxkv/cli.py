"""The root command, and the edge of errors. A command is imported when it is asked for.

Results go to stdout; progress, figures and errors to stderr. An error is one line, and its exit
code is the exception's (mlxkv.errors).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, MutableMapping
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from mlxkv import __version__
from mlxkv.commands.options import options_of
from mlxkv.errors import (
    INTERRUPTED,
    MlxkvError,
    OutOfMemory,
    UsageError,
    contained,
    lacks_memory,
    one_line,
)

HOMES = {
    "pull": "models:pull",
    "list": "models:list_",
    "ls": "models:list_",
    "show": "models:show",
    "rm": "models:rm",
    "convert": "convert:convert",
    "compare": "convert:compare",
    "plan": "models:plan",
    "alias": "alias:alias",
    "verify": "verify:verify",
    "models": "models:models",
    "doctor": "doctor:doctor",
    "run": "run:run",
    "transcribe": "transcribe:transcribe",
    "embed": "embed:embed",
    "rerank": "rerank:rerank",
    "serve": "serve:serve",
    "ps": "serve:ps",
    "stop": "serve:stop",
    "launch": "launch:launch",
    "bench": "bench:bench",
    "kv": "kv:app",
    "adapters": "adapters:app",
}
"""Command -> its module in `mlxkv.commands`, and its function there, or its group of commands."""
HIDDEN = ("ls",)


class Late(MutableMapping[str, Any]):
    """The commands by name, each imported and built when it is looked up: a start needs one, and
    building all of them took a tenth of it."""

    def __init__(self, built: MutableMapping[str, Any]):
        self._built = built

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _built(name)
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**HOMES, **self._built})

    def __len__(self) -> int:
        return len({**HOMES, **self._built})


def _built(name: str) -> Any:
    module, _, place = HOMES[name].partition(":")
    found = getattr(importlib.import_module(f"mlxkv.commands.{module}"), place)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = typer.Typer(rich_markup_mode=None, add_completion=False)
    alone.command(name, hidden=name in HIDDEN)(found)
    return typer.main.get_command(alone)


class Commands(TyperGroup):
    """The root command's group."""

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        self.commands = Late(self.commands)


app = typer.Typer(
    name="mlxkv",
    cls=Commands,
    help="Run language models with MLX.",
    rich_markup_mode=None,  # keeps rich out of the start
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
            return _misused(cast(typer.BadParameter, error))
        if lacks_memory(error):
            return _fail(f"memory ran out ({one_line(error)})", OutOfMemory.exit_code)
        text = f"unexpected {type(error).__name__}: {one_line(error)}"
        return _fail(f"{text} (--debug shows the trace)", 1)


def _misused(error: typer.BadParameter) -> int:
    """Say what of a command line is wrong; a group without a command has its help for that."""
    text, context = error.format_message(), getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(text, file=sys.stderr)
        return UsageError.exit_code
    command = "mlxkv" if context is None else context.command_path
    return _fail(f"{text.rstrip('.')}; see `{command} --help`", UsageError.exit_code)


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
