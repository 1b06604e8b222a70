"""`mlxkv alias`: further names of models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from mlxkv.commands.options import AsJson
from mlxkv.errors import ModelNotFound, UsageError


def alias(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The further name, such as gpt-4o.")
    ] = None,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The model that it stands for.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", "-d", help="Delete NAME.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give MODEL a further NAME, which a client insists on; alone, list them."""
    from mlxkv.store import aliases, refs

    if delete:
        if name is None or model is not None:
            raise UsageError("--delete takes one NAME")
        refs.remove_alias(name)
        return
    if name is not None and model is not None:
        print(f"{name} stands for {refs.add_alias(name, model)}")
        return
    known = aliases.stored_aliases()
    if name is not None and name not in known:
        raise ModelNotFound(f"no alias named {name!r}: mlxkv alias {name} MODEL makes it")
    shown = known if name is None else {name: known[name]}
    if as_json:
        print(json.dumps(shown))
    elif shown:
        from mlxkv.terminal.console import table

        print(table(("NAME", "MODEL"), sorted(shown.items())))


def run_aliases(pairs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The aliases of `serve --alias NAME=MODEL`.

    Raises:
        UsageError, ModelNotFound: as `refs.alias_target`, or no `=`.
    """
    from mlxkv.store.refs import alias_target

    found = {}
    for pair in pairs:
        name, sign, model = pair.partition("=")
        if not sign:
            raise UsageError(f"--alias takes NAME=MODEL; got {pair!r}")
        found[name] = alias_target(name, model)
    return tuple(found.items())
