"""Tools of a request, in the form that all three APIs bring them to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from mlxkv.errors import UsageError
from mlxkv.sampling.grammar import Grammar
from mlxkv.server.fields import Part

NAME_PATTERN = r"^[A-Za-z0-9_.:/-]{1,128}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]

PICTURE_NOTE = "[image left out: this model reads text only]"
"""What stands in the place of a picture that a tool gave."""


class Function(Part):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="Calls keep to the schema where tool_choice is required or names one."
    )

    def schema_of(self) -> dict[str, Any]:
        """As chat templates take it."""
        parameters = {"type": "object", "properties": {}}
        function = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {
            "type": "function",
            "function": {**function, "parameters": self.parameters or parameters},
        }


def allowed_tools(
    functions: Sequence[Function], mode: str, named: Sequence[str] | None
) -> list[Function]:
    """The tools that a choice leaves.

    Args:
        functions: all of them.
        mode: `auto`, `none`, `required`.
        named: the only ones that may be called; None for all.

    Raises:
        UsageError: a name that is none of them; a call is required and there is no tool.
    """
    known = [function.name for function in functions]
    if len(set(known)) != len(known):
        raise UsageError("two tools have the same name")
    for name in named or ():
        if name not in known:
            raise UsageError(
                f"tool_choice names {name!r}; the tools are {', '.join(known) or 'none'}"
            )
    if mode == "none":
        return []
    left = [each for each in functions if named is None or each.name in named]
    if mode == "required" and not left:
        raise UsageError("tool_choice requires a call, and there are no tools")
    return left


def tools_grammar(
    functions: Sequence[Function], mode: str, parallel: bool, content: Grammar | None
) -> Grammar | None:
    """What a choice of tools and a format say of the answer together.

    Raises:
        UsageError: a format beside tools that need not be called, and no JSON.
    """
    if mode == "required":
        if content is not None:
            raise UsageError("response_format has no place where tool_choice requires a call")
        return _calls(functions, parallel, None)
    if content is None or not functions:
        return content
    if content.kind not in ("json_object", "json_schema"):
        raise UsageError(
            "with tools, response_format must be text, json_object or json_schema; or give "
            'tool_choice "none"'
        )
    return _calls(functions, parallel, content)


def _calls(functions: Sequence[Function], parallel: bool, content: Grammar | None) -> Grammar:
    said: Mapping[str, Any] = {
        "tools": [
            {"name": each.name, "parameters": each.schema_of()["function"]["parameters"]}
            for each in functions
        ],
        "parallel": parallel,
        "content": content and {"kind": content.kind, "text": content.text},
    }
    return Grammar("tools", json.dumps(said))
