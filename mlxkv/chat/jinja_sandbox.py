"""The jinja2 environment that chat templates run in; imported when a template first renders.

A template comes with a checkpoint and is not trusted. jinja2's immutable sandbox keeps it from
Python's internals and from changing what it is given; on top of that, this environment bounds how
long it runs (loop rounds and calls), how much it writes, and what `*` and `**` may build. What a
template can hold in memory besides is not bounded.

The rest follows what transformers documents for chat templates: trim_blocks, lstrip_blocks, loop
controls, a tojson that leaves HTML alone, raise_exception, strftime_now, {% generation %} blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Enough for a template that compares every pair of 1,000 messages; takes a few seconds.
MAX_STEPS = 5_000_000
# Some 16 million tokens of rendered text, past every model's context.
MAX_CHARS = 64 * 1024 * 1024
_MAX_POWER_BITS = 4096

_steps: ContextVar[list[int]] = ContextVar("steps of the template that is rendering")


class LimitError(SecurityError):
    """A template that runs, writes or builds more than it may."""


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """Render to text within the limits.

    Raises:
        LimitError: a limit was passed.
        Exception: whatever the template's own code raises.
    """
    token = _steps.set([MAX_STEPS])
    try:
        parts, n_chars = [], 0
        for part in template.generate(variables):
            n_chars += len(part)
            if n_chars > MAX_CHARS:
                raise LimitError(f"it writes more than {MAX_CHARS:,} characters")
            parts.append(part)
        return "".join(parts)
    finally:
        _steps.reset(token)


def _count_step() -> None:
    left = _steps.get(None)
    if left is None:
        return
    left[0] -= 1
    if left[0] < 0:
        raise LimitError(f"it runs for more than {MAX_STEPS:,} steps")


@pass_context
def _counted(_context: Context, items: Iterable[Any]) -> Iterator[Any]:
    # The context argument keeps jinja2 from folding the filter of a constant at compile time.
    for item in items:
        _count_step()
        yield item


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks an assistant's text for training: a scope."""

    tags = {"generation"}  # noqa: RUF012 - the type that jinja2 declares

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Namespace(Namespace):
    """namespace(), refusing names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        for name in dict(*rest, **kwargs):
            _check_attribute(name)
        Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


class _Dict:
    """dict() without dict's methods, which could change what the sandbox keeps immutable."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, counting loop rounds and calls."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.filters["_counted"] = _counted
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            namespace=_Namespace,
            dict=_Dict(),
        )
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(
                loop.iter, "_counted", [], [], None, None, lineno=loop.lineno, environment=self
            )
        return tree

    def call(  # the names are jinja2's, chosen not to collide with keyword arguments
        __self,
        __context: Context,
        __obj: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _count_step()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, str | list | tuple) and isinstance(times, int):
                    _check_size(len(items) * times)
        elif isinstance(left, int) and isinstance(right, int):
            _check_power(left, right)
        return super().call_binop(context, operator, left, right)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with '_'")


def _check_size(n: int) -> None:
    if n > MAX_CHARS:
        raise LimitError(f"it repeats something to a length of {n:,}")


def _check_power(base: int, exponent: int) -> None:
    if base.bit_length() * exponent > _MAX_POWER_BITS:
        raise LimitError("it computes a power that is too large")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    chosen = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **chosen)
