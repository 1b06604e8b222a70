"""Options that several commands share, and how an error spells them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from mlxkv.terminal.spelling import Options

KVType = Annotated[
    str | None, typer.Option("--kv-type", help="Format of the KV cache: native, q8, q4 or auto.")
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name, path, .gguf file or Hugging Face org/name.")
]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer together; at most the model's own, as without."),
]
DType = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Memory = Annotated[str | None, typer.Option(help="Limit, such as 16GiB.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def options_of(app: typer.Typer, args: Sequence[str]) -> Options:
    """The options and arguments of the command that was called, by the names of its parameters."""
    command: Any = typer.main.get_command(app)
    for arg in args:
        commands = getattr(command, "commands", {})
        if arg not in commands:
            break
        command = commands[arg]
    return Options(
        {
            parameter.name: max(parameter.opts, key=len)
            if parameter.param_type_name == "option"
            else parameter.metavar or parameter.name.upper()
            for parameter in command.params
        }
    )
