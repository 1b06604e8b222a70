"""The jinja2 environment that chat templates run in; imported when a template first renders.

A template comes with a checkpoint and is not trusted. jinja2's immutable sandbox keeps it from
Python's internals and from changing what it is given; on top of that, this environment bounds how
long it runs (loop rounds, calls, filters and what they go through), how much it writes, and how
many bytes of strings and lists it builds, by operators, filters, methods and blocks: see
`jinja_limits`. To count them, `~`, `+`, `in`, slices and what blocks write become filters; what a
template writes at once is counted where it is rendered.

The rest follows what transformers documents for chat templates: trim_blocks, lstrip_blocks, loop
controls, a tojson that leaves HTML alone, raise_exception, strftime_now, {% generation %} blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType
from typing import Any

from jinja2 import Template, nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg
from markupsafe import soft_str

from mlxkv.chat.jinja.counting import Counting, nests
from mlxkv.chat.jinja.limits import (
    MAX_BYTES,
    MAX_CHARS,
    MAX_STEPS,
    QUICK,
    Budget,
    LimitError,
    check_binop,
    check_filter,
    check_format,
    check_method,
    current,
)

_CALL = 4
"""Steps of a call: it takes as long as that many rounds of a loop."""
_LONG = 4096
"""Characters of a text that is gone through in less than a step takes."""


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """Render to text within the limits.

    Raises:
        LimitError: a limit was passed.
        Exception: whatever the template's own code raises.
    """
    token = current.set(Budget(MAX_STEPS, MAX_CHARS, MAX_BYTES))
    try:
        parts, n_chars = [], 0
        for part in template.generate(variables):
            n_chars += len(part)
            if n_chars > MAX_CHARS:
                raise LimitError(f"it writes more than {MAX_CHARS:,} characters")
            parts.append(part)
        return "".join(parts)
    finally:
        current.reset(token)


def _budget() -> Budget:
    """Of the rendering; jinja2 also runs code of a template while it compiles it."""
    return current.get() or Budget(MAX_STEPS, MAX_CHARS, MAX_BYTES)


# The context argument keeps jinja2 from running the filter of a constant when it compiles.
@pass_context
def _counted(_context: Context, items: Iterable[Any], n_chars: int) -> Iterator[Any]:
    """A loop's items; each round writes so many characters of the template itself."""
    return _budget().counted(items, n_chars)


@pass_context
def _concat(_context: Context, parts: Sequence[Any]) -> str:
    """`a ~ b`."""
    budget = _budget()
    texts = [part if type(part) is str else budget.text(part) for part in parts]
    budget.check_length(sum(map(len, texts)))
    return budget.built("".join(texts))


@pass_context
def _sliced(_context: Context, items: Any, *bounds: Any) -> Any:
    """`items[start:stop:step]`."""
    return _budget().built(items[slice(*bounds)])


@pass_context
def _is_in(_context: Context, item: Any, items: Any) -> bool:
    """`item in items`."""
    if isinstance(items, str | list | tuple) and len(items) > _LONG:
        _budget().scan(items)
    if type(item) in (list, tuple, dict):
        _budget().text_length(items)
    return item in items


@pass_context
def _is_equal(_context: Context, left: Any, right: Any) -> bool:
    """`left == right`; of lists in lists, each appearance of one is compared."""
    if isinstance(left, list | tuple | dict):
        _budget().text_length(left)
    return left == right


@pass_context
def _is_unequal(context: Context, left: Any, right: Any) -> bool:
    """`left != right`."""
    return not _is_equal(context, left, right)


@pass_context
def _add(_context: Context, left: Any, right: Any) -> Any:
    """`left + right`."""
    total = left + right
    return total if type(total) is int else _budget().built(total)


@pass_environment
def _sum(
    environment: Environment,
    items: Iterable[Any],
    attribute: str | int | None = None,
    start: Any = 0,
) -> Any:
    """jinja2's `sum`, which may join lists: each sum counts."""
    budget, total = _budget(), start
    getter = None if attribute is None else make_attrgetter(environment, attribute)
    for item in budget.counted(items):
        total = budget.built(total + (item if getter is None else getter(item)))
    return total


@pass_context
def _output(_context: Context, value: Any) -> Any:
    """What `{{ value }}` writes, in a block that is kept, or where it may be a nested list."""
    budget = _budget()
    if not isinstance(value, str):
        budget.text_length(value)
    elif len(value) > 32:
        budget.build(len(value))
    return value


def _trim(value: Any, chars: str | None = None) -> str:
    """jinja2's `trim`."""
    text = soft_str(value).strip(chars)
    if len(text) > _LONG:
        _budget().build(len(text))
    return text


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
    """The sandbox, counting what a template does and builds."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
        )
        self.nests = True
        self.filters |= {"tojson": _tojson, "sum": _sum}
        self.filters = {
            name: each if name in QUICK else _bounded(name, each)
            for name, each in self.filters.items()
        }
        ours = (_counted, _concat, _sliced, _is_in, _is_equal, _add, _output)
        self.filters |= {each.__name__: each for each in ours}
        self.filters["trim"] = _trim
        self.tests |= dict.fromkeys(("eq", "equalto", "=="), _is_equal)
        self.tests |= {"in": _is_in}
        self.tests |= dict.fromkeys(("ne", "!="), _is_unequal)
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            namespace=_Namespace,
            dict=_Dict(),
        )
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        self.nests = nests(tree)
        return Counting(self, self.nests).visit(tree)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # What jinja2 finds as well, but after checks that take longer than all counting.
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICT:
            return obj[attribute]
        if type(obj) is _Namespace and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        filled = super().wrap_str_format(value)
        if filled is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(_budget(), value.__self__, args, kwargs)
            return filled(*args, **kwargs)

        return checked

    def call(  # the names are jinja2's, chosen not to collide with keyword arguments
        __self,
        __context: Context,
        __obj: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        budget = _budget()
        budget.step(_CALL)
        if isinstance(__obj, BuiltinMethodType):
            of = __obj.__self__
            if type(of) is str:
                args = check_method(budget, __obj.__name__, of, args, kwargs)
            elif type(of) is list:
                budget.scan(of)
        made = super().call(__context, __obj, *args, **kwargs)
        return made if type(made) is bool else budget.built(made)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget()
        check_binop(budget, operator, left, right)
        return budget.built(super().call_binop(context, operator, left, right))


def _bounded(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts what it is given and makes."""
    lead = _LEADS.get(getattr(run, "jinja_pass_arg", None))
    takes_all, is_plain = name in _TAKE_ALL, name == "tojson"

    @pass_context
    @wraps(run)
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget()
        if (
            is_plain
            and not args
            and kwargs.keys() <= _OF_PLAIN
            and not getattr(context.environment, "nests", True)
        ):
            return budget.built(run(value, *args, **kwargs))
        if takes_all and isinstance(value, Iterator):
            value = list(budget.counted(value))
        check_filter(budget, name, value, args, kwargs)
        if lead is None:
            return budget.built(run(value, *args, **kwargs))
        return budget.built(run(lead(context), value, *args, **kwargs))

    return bounded


_OF_PLAIN = frozenset({"ensure_ascii", "sort_keys"})
_OF_DICT = frozenset(dir(dict))
_TAKE_ALL = frozenset({"join", "list", "sort", "string"})
_LEADS: Mapping[Any, Callable[[Context], Any]] = {
    _PassArg.context: lambda context: context,
    _PassArg.eval_context: lambda context: context.eval_ctx,
    _PassArg.environment: lambda context: context.environment,
}


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with '_'")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    _budget().check_length(64 * len(format))
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
