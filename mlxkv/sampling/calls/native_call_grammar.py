"""Grammars of calls whose arguments are not JSON: Gemma's, and what they all share.

    call:N{K:V,...}

Strings stand between two tokens of their own. For arguments between tags see `pair_call_grammar`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlxkv.errors import UsageError
from mlxkv.parsers.json_schema import Choice, Schemas
from mlxkv.parsers.notations.in_text import GemmaCalls
from mlxkv.parsers.notations.tools import Tools
from mlxkv.sampling.calls.grammar_strings import literal
from mlxkv.sampling.calls.grammar_values import Gemma, Rules, Values

NamedTools = Sequence[tuple[str, Any]]
"""Names and JSON schemas of their arguments."""


def each_tool(tools: NamedTools, write: Callable[[str, Any], str]) -> Iterator[str]:
    """What is written of each tool; its name is in the errors."""
    for name, schema in tools:
        try:
            yield write(name, schema)
        except UsageError as error:
            raise UsageError(
                f"calls of {name!r} cannot be required of this model: {error}"
            ) from None


def call_rules(name: str, bodies: Iterator[str]) -> list[str]:
    """A rule for each of several calls, and one of that name for any of them."""
    rules = [f"call_{i}: {body}" for i, body in enumerate(bodies)]
    return [f"{name}: {' | '.join(f'call_{i}' for i in range(len(rules)))}", *rules]


def gemma(tools: NamedTools, quote: str, token: str) -> list[str]:
    """Rules of `call`.

    Args:
        tools: those that may be called.
        quote: the text around strings.
        token: the same as a grammar names it.
    """
    rules = Rules()
    notation = Gemma(rules, quote, token)

    def write(name: str, schema: Any) -> str:
        head = f"call:{name}"
        if [each.name for each in GemmaCalls(quote).parse(head + "{}", Tools())] != [name]:
            raise UsageError("such a name cannot be written")
        schemas = Schemas(schema)
        values = Values(rules, notation, schemas)
        return f"{literal(head)} ({values.choices(objects_of(schemas, schema))})"

    return [*call_rules("call", each_tool(tools, write)), *rules.lines]


def objects_of(schemas: Schemas, schema: Any) -> list[Choice]:
    """The ways in which arguments can be."""
    found = [choice for choice in schemas.choices(schema) if choice.kind == "object"]
    if not found:
        raise UsageError("its parameters can be no object")
    return found
