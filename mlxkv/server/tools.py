"""A request's tools, in the form that all three APIs convert them to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from mlxkv.errors import UsageError
from mlxkv.sampling.grammar import Grammar
from mlxkv.server.fields import Part

NAME_PATTERN = r"^[A-Za-z0-9_.:/-]{1,128}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class Function(Part):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="With tool_choice required or a name, calls follow the schema."
    )

    def schema_of(self) -> dict[str, Any]:
        """The function in the form that chat templates take."""
        about = {} if self.description is None else {"description": self.description}
        parameters = self.parameters or {"type": "object", "properties": {}}
        function = {"name": self.name, **about, "parameters": parameters}
        return {"type": "function", "function": function}


def tool_options(
    functions: Sequence[Function],
    mode: str = "auto",
    named: Sequence[str] | None = None,
    *,
    parallel: bool = True,
    content: Grammar | None = None,
) -> dict[str, Any]:
    """Keywords of `Request.of` for tools, `tool_choice` and a format.

    The prompt lists all tools, whatever the choice, so that it keeps its prefix.

    Args:
        functions: all tools.
        mode: `auto`, `none`, `required`.
        named: the tools that may be called; None for all.
        parallel: whether there may be several calls.
        content: the grammar of an answer that calls nothing. A required call comes in its place.

    Raises:
        UsageError: an unknown or duplicate name, a required call without tools, or a format beside
            tools that is not JSON.
    """
    allowed = _allowed(functions, mode, named)
    left_out = len(allowed) < len(functions)
    return {
        "tools": [function.schema_of() for function in functions] or None,
        "callable": tuple(function.name for function in allowed) if left_out else None,
        "format": _grammar(allowed, mode, parallel, content),
        "parallel": parallel,
    }


def _allowed(
    functions: Sequence[Function], mode: str, named: Sequence[str] | None
) -> list[Function]:
    """The tools that may be called."""
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


def _grammar(
    allowed: Sequence[Function], mode: str, parallel: bool, content: Grammar | None
) -> Grammar | None:
    """The grammar of an answer that follows `tool_choice` and a format."""
    if mode == "required":
        return _calls(allowed, parallel, None)
    if content is None or not allowed:
        return content
    if content.kind not in ("json_object", "json_schema"):
        raise UsageError(
            "with tools, response_format must be text, json_object or json_schema; or give "
            'tool_choice "none"'
        )
    return _calls(allowed, parallel, content)


def _calls(functions: Sequence[Function], parallel: bool, content: Grammar | None) -> Grammar:
    schemas = [each.schema_of()["function"] for each in functions]
    tools = [{"name": each["name"], "parameters": each["parameters"]} for each in schemas]
    form = content and {"kind": content.kind, "text": content.text}
    return Grammar("tools", json.dumps({"tools": tools, "parallel": parallel, "content": form}))
