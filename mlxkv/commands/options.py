"""Options that several commands share, and how an error spells them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import typer

from mlxkv.terminal.answer_options import SAMPLING
from mlxkv.terminal.spelling import Options

T = TypeVar("T")

KVType = Annotated[
    str | None,
    typer.Option(
        help="Format of the KV cache: native, q8, k8v4 (keys in 8 bits, values in 4), q4, or auto: "
        "quantize when memory is short. By layer: k8v4,0=native,5=q8."
    ),
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name, path, .gguf file or org/name[@revision].")
]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer together; default and maximum: the model's."),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="auto|off|lookup|mtp|MODEL",
        help="Check several tokens in one step: what followed the same tokens before (lookup, the "
        "default), what the model's own next-token layer or assistant guesses (mtp), both (auto), "
        "or lookup and what a smaller MODEL of the same tokenizer says. The answer stays the same.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="PATH|org/name[=WEIGHT]",
        help="A LoRA or DoRA adapter for the model; may be repeated, they add up.",
    ),
]
DType = Annotated[str, typer.Option(help="Compute in auto, float32, float16 or bfloat16.")]
Memory = Annotated[
    str | None, typer.Option(help="Memory limit, such as 16GiB; default: the machine's.")
]
Address = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="The server; default: MLXKV_SERVER, or this machine's."),
]
Key = Annotated[
    str | None, typer.Option("--api-key", help="The server's API key; default: MLXKV_API_KEY.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def takes(kind: Callable[..., T]) -> Callable[[Callable[[T], int]], Callable[..., int]]:
    """A command whose one argument is a dataclass with an option in each field.

    The field `sampling`, if there is one, stands for an option for each sampling parameter, and
    gets them by name, None where they are left out.
    """
    signature = inspect.signature(kind, eval_str=True)
    taken: list[inspect.Parameter] = []
    for argument in signature.parameters.values():
        taken += _sampling_options(argument) if argument.name == "sampling" else [argument]

    def decorate(command: Callable[[T], int]) -> Callable[..., int]:
        @functools.wraps(command)
        def call(**options: Any) -> int:
            if "sampling" in signature.parameters:
                options["sampling"] = {name: options.pop(name) for name in SAMPLING}
            return command(kind(**options))

        call.__signature__ = inspect.Signature(taken)  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


def _sampling_options(argument: inspect.Parameter) -> Iterator[inspect.Parameter]:
    for name, parameter in SAMPLING.items():
        names = [f"--{name.replace('_', '-')}", f"-{parameter.letter}"]
        option = typer.Option(None, *names[: 1 + bool(parameter.letter)], help=parameter.help)
        yield argument.replace(name=name, default=option, annotation=parameter.kind | None)


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
