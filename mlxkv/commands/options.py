"""Options that several commands share, and how an error spells them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from mlxkv.terminal.answer_options import SAMPLING
from mlxkv.terminal.spelling import Options

KVType = Annotated[
    str | None,
    typer.Option(
        help="Format of the KV cache: native, q8, q4, or auto: quantize when memory is short."
    ),
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name, path, .gguf file or Hugging Face org/name.")
]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer together; default and maximum: the model's."),
]
DType = Annotated[str, typer.Option(help="Compute in auto, float32, float16 or bfloat16.")]
Memory = Annotated[
    str | None, typer.Option(help="Memory limit, such as 16GiB; default: the machine's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def with_sampling(command: Callable[..., int]) -> Callable[..., int]:
    """A command with an option for each sampling parameter in place of its argument `sampling`.

    Args:
        command: gets the options by name in `sampling`, None where they are left out.
    """
    signature = inspect.signature(command, eval_str=True)
    taken = []
    for argument in signature.parameters.values():
        if argument.name != "sampling":
            taken.append(argument)
            continue
        for name, parameter in SAMPLING.items():
            names = [f"--{name.replace('_', '-')}", f"-{parameter.letter}"]
            option = typer.Option(*names[: 1 + bool(parameter.letter)], help=parameter.help)
            hint = Annotated[parameter.kind | None, option]
            taken.append(argument.replace(name=name, default=None, annotation=hint))

    @functools.wraps(command)
    def call(**options: Any) -> int:
        sampling = {name: options.pop(name) for name in SAMPLING}
        return command(**options, sampling=sampling)

    call.__signature__ = signature.replace(parameters=taken)  # pyright: ignore[reportAttributeAccessIssue]
    return call


def options_of(app: typer.Typer, args: Sequence[str]) -> Options:
    """The options and arguments of the command in `args`, by the names of its parameters."""
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
