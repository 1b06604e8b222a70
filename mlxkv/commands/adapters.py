"""`mlxkv adapters`: the adapters on this machine."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from mlxkv.commands.options import AsJson, Model
from mlxkv.errors import UsageError

app = typer.Typer(
    name="adapters",
    help="List LoRA and DoRA adapters, show what they change, make models of them, remove them.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Name = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Directory, .gguf file or Hugging Face org/name.")
]


@app.command("ls")
def list_(as_json: AsJson = False) -> None:
    """List the adapters that are kept here, and those in Hugging Face's cache."""
    from mlxkv.base.units import human_bytes
    from mlxkv.store.adapters import stored_adapters
    from mlxkv.terminal.console import table

    found = stored_adapters()
    if as_json:
        entries = [{"name": x.name, "path": str(x.path), "bytes": x.size_bytes} for x in found]
        print(json.dumps(entries))
    elif found:
        rows = [(each.name, human_bytes(each.size_bytes)) for each in found]
        print(table(("NAME", "SIZE"), rows, right=("SIZE",)))
    else:
        print("no adapters yet: --adapter org/name fetches one", file=sys.stderr)


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="By which requests name it.")],
    adapter: Name,
) -> None:
    """Keep a copy of an adapter under a name: for --adapter, and MODEL+NAME in requests."""
    from mlxkv.store import adapters
    from mlxkv.store.adapter_names import add

    path = adapters.find(adapter)
    adapters.read(path)  # what cannot be read is said now
    print(add(name, adapters.AdapterRef(path)))


@app.command()
def show(adapter: Name, as_json: AsJson = False) -> None:
    """Show an adapter's format, base, ranks and what it changes."""
    from mlxkv.store import adapters
    from mlxkv.terminal.adapter_text import text, to_dict

    path = adapters.find(adapter, fetch=False)
    found = adapters.read(path)
    print(json.dumps(to_dict(found), indent=2) if as_json else text(found))


@app.command()
def make(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the new model.")],
    model: Model,
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="As for --adapter.")
    ],
) -> None:
    """Make a model of MODEL that is always loaded with adapters; both share their weights' files.

    A server finds it under its name, beside MODEL.
    """
    from mlxkv.store import refs, resolve
    from mlxkv.store.adapters import adapter_refs
    from mlxkv.store.derive import derive

    refs.output_path(name)  # raises for what is no name, or that of a built-in model
    if "/" in name:
        raise UsageError(
            f"must be a name of letters, digits, '.', '_' and '-'; got {name!r}", field="name"
        )
    print(derive(resolve.resolve(model), name, adapters=adapter_refs(adapters)))


@app.command()
def rm(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="As `mlxkv adapters ls` shows.")
    ],
) -> None:
    """Remove an adapter that is kept here, or from Hugging Face's cache."""
    from mlxkv.base.units import human_bytes
    from mlxkv.store.adapters import remove

    print(f"removed {adapter}, {human_bytes(remove(adapter))} freed")
