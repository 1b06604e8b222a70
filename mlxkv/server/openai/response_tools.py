"""Tools of OpenAI's responses, and the functions that the model is told of.

- A tool of a namespace is one function, `NAMESPACE__NAME`; its calls come out under both names.
- A custom tool takes text and no JSON: the model is told of a function with one string, `input`.
- Tools that OpenAI's server runs are left out, and named (`ignored`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mlxkv.server.fields import LeftOut, Part, type_of
from mlxkv.server.tools import Function, Name

BETWEEN = "__"
INPUT = "input"


class FunctionTool(Function):
    """A function."""

    type: Literal["function"]


class Format(Part):
    """What the text of a custom tool looks like: any, or as a grammar has it."""

    type: Literal["text", "grammar"]
    syntax: str | None = None
    definition: str | None = None


class CustomTool(Part):
    """A tool that takes text."""

    type: Literal["custom"]
    name: Name
    description: str | None = None
    format: Format | None = None

    def function(self) -> Function:
        """The function that the model is told of."""
        said = [self.description] if self.description else []
        if self.format is not None and self.format.definition:
            said.append(f"{INPUT} keeps to this {self.format.syntax} grammar:")
            said.append(self.format.definition)
        parameters = {
            "type": "object",
            "properties": {INPUT: {"type": "string"}},
            "required": [INPUT],
            "additionalProperties": False,
        }
        return Function(
            name=self.name, description="\n".join(said) or None, parameters=parameters, strict=None
        )


class HostedTool(LeftOut):
    """A tool that OpenAI's server runs."""

    type: str


def _kind(tool: Any) -> str:
    given = type_of(tool)
    return given if given in ("function", "custom", "namespace") else "hosted"


_Callable = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[HostedTool, Tag("hosted")],
    Discriminator(lambda tool: "hosted" if _kind(tool) == "namespace" else _kind(tool)),
]


class Namespace(Part):
    """Tools under a common name."""

    type: Literal["namespace"]
    name: Name
    description: str | None = None
    tools: Annotated[list[_Callable], Field(max_length=512)]


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[Namespace, Tag("namespace")]
    | Annotated[HostedTool, Tag("hosted")],
    Discriminator(_kind),
]


@dataclass(frozen=True, slots=True)
class Callee:
    """How the API names a function that the model may call."""

    function: Function
    name: str
    namespace: str | None = None
    is_custom: bool = False


def full_name(namespace: str | None, name: str) -> str:
    """The name by which the model knows a tool."""
    return name if not namespace else f"{namespace}{BETWEEN}{name}"


def callees(tools: Sequence[Any]) -> list[Callee]:
    """The functions that the model may call."""
    return [callee for tool in tools for callee in _callees(tool, None)]


def _callees(tool: Any, namespace: str | None) -> Iterator[Callee]:
    match tool:
        case Namespace():
            for inner in tool.tools:
                yield from _callees(inner, tool.name)
        case FunctionTool() | CustomTool():
            is_custom = isinstance(tool, CustomTool)
            function = tool.function() if isinstance(tool, CustomTool) else tool
            named = function.model_copy(update={"name": full_name(namespace, tool.name)})
            yield Callee(named, tool.name, namespace, is_custom)
