"""`mlxkv launch`: another program on a model of this machine."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxkv.commands.options import Address, Key
from mlxkv.errors import UsageError

if TYPE_CHECKING:
    from mlxkv.launch.programs import Program
    from mlxkv.server.client import Server

NO_KEY = "mlxkv"
"""Programs refuse to start without a key, which a server without keys does not read."""


def launch(
    name: Annotated[
        str | None, typer.Argument(metavar="PROGRAM", help="What to start; --list lists them.")
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGUMENTS]", help="Passed to the program as they are."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Default: the model run last, or the only one."),
    ] = None,
    server: Address = None,
    api_key: Key = None,
    list_: Annotated[bool, typer.Option("--list", help="List the programs.")] = False,
    print_: Annotated[
        bool, typer.Option("--print", help="Print what would be run, for a shell.")
    ] = False,
) -> int:
    """Start PROGRAM, a coding agent, on a model of a server that runs, or of one started for it.

    The program gets its environment and arguments from mlxkv; its settings are not changed.
    """
    from mlxkv.launch.programs import executable, find_program

    if list_:
        return _list()
    if name is None:
        raise UsageError("PROGRAM is missing; `mlxkv launch --list` lists what can be started")
    program = find_program(name)
    if print_:
        return _print(program, arguments or (), model, server, api_key)
    path = executable(program)
    with _served(program, model, server, api_key) as (running, chosen):
        return _run(program, path, arguments or (), running, chosen)


def _list() -> int:
    import shutil

    from mlxkv.launch.programs import PROGRAMS
    from mlxkv.terminal.console import table

    rows = [
        (
            program.name,
            program.title,
            "yes" if shutil.which(program.command) else "no",
            program.tried,
            program.install,
        )
        for program in PROGRAMS
    ]
    print(table(("NAME", "PROGRAM", "INSTALLED", "TRIED", "INSTALL WITH"), rows))
    return 0


@contextmanager
def _served(
    program: Program, model: str | None, address: str | None, key: str | None
) -> Iterator[tuple[Server, str]]:
    """A server and the model's name there; one of our own ends with the block."""
    from mlxkv.launch import choice, own_server

    running = choice.running_server(address, key)
    if running is not None:
        yield running, model or choice.served_model(running)
        return
    chosen = model or choice.stored_model()
    choice.check_stored(chosen)
    log = own_server.new_log(program.name)
    _say(f"loading {chosen}; the server's log is {log}")
    with own_server.serving(chosen, _key(key), log) as own:
        yield own, chosen


def _run(program: Program, path: str, extra: Sequence[str], server: Server, model: str) -> int:
    from mlxkv.launch.choice import facts
    from mlxkv.launch.programs import Target
    from mlxkv.launch.session import run_program
    from mlxkv.store import last_model

    known = facts(server, model)
    for warning in known.warnings(model, program.title):
        _say(f"warning: {warning}")
    _say(f"{program.title} runs on {model} at {server}")
    last_model.remember(model)
    with tempfile.TemporaryDirectory(prefix="mlxkv-launch-") as made:
        folder = Path(made)
        key = server.key or NO_KEY
        target = Target(str(server), model, key, known.context, folder, known.sees)
        call = program.call(target)
        return run_program(path, call, extra, server.host, folder)


def _print(
    program: Program, extra: Sequence[str], model: str | None, address: str | None, key: str | None
) -> int:
    """Print a shell script for a server that runs, or will run at the default address."""
    from mlxkv.base.paths import cache_dir
    from mlxkv.launch import choice
    from mlxkv.launch.programs import Target
    from mlxkv.launch.session import script
    from mlxkv.server.client import Server

    server = choice.running_server(address, key)
    if server is None:
        server = Server.at(address, key)
        chosen = model or choice.stored_model()
        known = choice.stored_facts(chosen)
        _say(f"no server runs: start one with `mlxkv serve --model {chosen}`")
    else:
        chosen = model or choice.served_model(server)
        known = choice.facts(server, chosen)
    folder = cache_dir() / "launch"
    key = server.key or NO_KEY
    target = Target(str(server), chosen, key, known.context, folder, known.sees)
    print(script(program.command, program.call(target), extra, folder))
    return 0


def _key(key: str | None) -> str:
    from mlxkv.server.client import Server

    return Server.at(None, key).key


def _say(text: str) -> None:
    print(f"mlxkv: {text}", file=sys.stderr, flush=True)
