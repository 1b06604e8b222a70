"""What a chat template may use: steps, and bytes of what it builds.

A `Budget` counts both over one rendering. What one operation may build is known before it runs
(`check_method`, `check_filter`, `check_format`): a rough bound from the sizes of what it is given,
and the exact size where that is too large.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import chain
from sys import getsizeof
from typing import Any

from jinja2.exceptions import SecurityError

# Enough for a template that compares every pair of 1,000 messages; takes a few seconds.
MAX_STEPS = 5_000_000
# Some 16 million tokens of rendered text, past every model's context.
MAX_CHARS = 64 * 1024 * 1024
# All strings and lists that it builds, kept or not: 20,000 tokens take 1 MiB in real templates.
MAX_BYTES = 1024 * 1024 * 1024
_SMALL = 256
"""Characters or items of what is not counted: steps bound how many there are."""
_MAX_INT_BITS = 65_536
_LONG = 4096
"""Characters of a text that is gone through in less than a step takes."""
_PART = 64
"""Bytes of a short string, besides its characters."""

# Widths in format strings, of both kinds; those of arguments' own.
_NUMBER = re.compile(r"\d+")
_FIELD = re.compile(r"%(?:\([^()]{0,64}\))?[-+ #0]*[\d*]*(?:\.[\d*]+)?|\{[^{}]{0,256}[{}]")
_LINES = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_CONTAINERS = (list, tuple, dict, set, frozenset)


class LimitError(SecurityError):
    """A template that runs, writes or builds more than it may."""


class Budget:
    """What a rendering has left."""

    __slots__ = ("max_bytes", "max_chars", "max_steps", "n_bytes", "n_steps")

    def __init__(self, max_steps: int, max_chars: int, max_bytes: int):
        self.max_steps = self.n_steps = max_steps
        self.max_bytes = self.n_bytes = max_bytes
        self.max_chars = max_chars

    def step(self, n: int = 1) -> None:
        """It does something n times."""
        self.n_steps -= n
        if self.n_steps < 0:
            raise LimitError(f"it runs for more than {self.max_steps:,} steps")

    def build(self, n_bytes: int) -> None:
        """It makes something of so many bytes."""
        self.n_bytes -= n_bytes
        if self.n_bytes < 0:
            raise LimitError(f"it builds more than {self.max_bytes:,} bytes")

    def scan(self, value: Any) -> None:
        """It goes through a text or a list: 16 characters take as long as a byte that is built."""
        if isinstance(value, str):
            self.build(len(value) >> 4)
        elif isinstance(value, list | tuple):
            self.step(len(value) >> 3)

    def check_length(self, n: int) -> None:
        """Something is about to become so long."""
        if n > self.max_chars:
            raise LimitError(f"it builds something of a length of up to {n:,}")

    def built(self, value: Any) -> Any:
        """What an operation made; what yields is counted as it does."""
        kind = type(value)
        if kind is str:
            if len(value) > _SMALL:
                self.build(getsizeof(value))
        elif kind is int or kind is bool or value is None:
            pass
        elif isinstance(value, str):
            self.build(getsizeof(value))
        elif isinstance(value, _CONTAINERS):
            self.build(getsizeof(value))
            if len(value) > _SMALL:
                self.step(len(value) >> 3)
        elif isinstance(value, Iterator):
            return self.counted(value)
        return value

    def counted(self, items: Iterable[Any], n_bytes: int = 0) -> Iterator[Any]:
        """The same items; each is a step, and writes so many bytes."""
        for item in items:
            self.n_steps -= 1
            if self.n_steps < 0:
                self.step(0)
            if n_bytes:
                self.build(n_bytes)
            yield item

    def text(self, value: Any) -> str:
        """Something as text."""
        self.text_length(value)
        return str(value)

    def text_length(self, value: Any) -> int:
        """How long something is as text, or a little more: parts that appear twice count twice.

        Raises:
            LimitError: it is too long.
        """
        if type(value) is str:
            return len(value)
        if not isinstance(value, _CONTAINERS):
            return len(value) if isinstance(value, str) else 32
        n, n_parts, waiting = 0, 0, [value]
        while waiting:
            part = waiting.pop()
            n_parts += 1
            n += 4
            if isinstance(part, str):
                n += len(part)
            elif isinstance(part, dict):
                waiting.extend(part)
                waiting.extend(part.values())
            elif isinstance(part, _CONTAINERS):
                waiting.extend(part)
            else:
                n += 28
            if n > self.max_chars:
                raise LimitError(f"it writes a value of more than {self.max_chars:,} characters")
            if n_parts > self.n_steps:
                self.step(n_parts)
        self.step(n_parts >> 3)
        return n


current: ContextVar[Budget | None] = ContextVar("budget of the template that renders", default=None)


def check_binop(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Before `left operator right`, other than `+`.

    Raises:
        LimitError: it would build too much.
    """
    if operator == "%":
        if isinstance(left, str):
            check_format(budget, left, (right,), {})
        return
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        if (sum(bits) if operator == "*" else bits[0] * min(abs(right), 10**9)) > _MAX_INT_BITS:
            raise LimitError("it computes a number that is too large")
        return
    for items, times in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(times, int):
            budget.check_length(len(items) * times)


def check_format(
    budget: Budget, text: str, args: tuple[Any, ...], named: Mapping[Any, Any]
) -> None:
    """Before a format string is filled in.

    Raises:
        LimitError: it would build too much.
    """
    given = [*args, *named.values()]
    fields = _FIELD.findall(text)
    widths = [int(n[:18]) for field in fields for n in _NUMBER.findall(field)]
    if any("*" in field or field[-1:] == "{" for field in fields):  # a width may be an argument
        widths += [abs(n) for n in _flat(given) if isinstance(n, int)]
    longest = max((budget.text_length(each) for each in given), default=0)
    budget.check_length(len(text) + len(fields) * (longest + max(widths, default=0) + 1))


_GROWS = frozenset({
    "replace", "join", "format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs",
    "translate", "split", "rsplit", "splitlines",
})  # fmt: skip
"""Methods of strings that build more than the string, or many parts of it."""


def check_method(
    budget: Budget, name: str, text: str, args: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Before a method of a string is called; its arguments, with what yields as a list.

    Raises:
        LimitError: it would build too much.
    """
    if len(text) > _LONG:
        budget.scan(text)
    if name not in _GROWS:
        return args
    match name:
        case "replace" if len(args) > 1:
            _check_replace(budget, text, args[0], args[1])
        case "join" if args:
            items = args[0]
            if not isinstance(items, str | list | tuple | dict):
                items = list(budget.counted(items))
            _check_join(budget, text, items)
            return (items, *args[1:])
        case "format" | "format_map":
            check_format(budget, text, args, named)
        case "center" | "ljust" | "rjust" | "zfill":
            budget.check_length(_largest([*args, *named.values()]))
        case "expandtabs":
            width = max(8, _largest([*args, *named.values()]))
            budget.check_length(len(text) + text.count("\t") * width)
        case "translate" if args and isinstance(args[0], Mapping):
            longest = max((budget.text_length(each) for each in args[0].values()), default=0)
            budget.check_length(len(text) * max(1, longest))
        case "split" | "rsplit":
            mark = args[0] if args else named.get("sep")
            n = text.count(mark) if isinstance(mark, str) and mark else len(text) >> 1
            budget.build(n * _PART)
        case "splitlines" if len(text) > _SMALL:
            budget.build(sum(1 for _ in _LINES.finditer(text)) * _PART)
    return args


def _replaced(budget: Budget, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    old, new = [*args, *named.values()][:2] if len(args) + len(named) > 1 else ("", "")
    _check_replace(budget, str(value), str(old), str(new))


def _check_replace(budget: Budget, text: Any, old: Any, new: Any) -> None:
    if not (isinstance(old, str) and isinstance(new, str)):
        return
    if len(new) > len(old) and (len(text) + 1) * len(new) > budget.max_chars:
        budget.check_length(len(text) + text.count(old) * (len(new) - len(old)))


def _joined(budget: Budget, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    mark = args[0] if args else named.get("d", "")
    if isinstance(value, str | list | tuple | dict):
        _check_join(budget, str(mark), value)


def _check_join(budget: Budget, mark: str, items: Any) -> None:
    lengths = (len(each) if type(each) is str else budget.text_length(each) for each in items)
    budget.check_length(sum(lengths) + len(mark) * len(items))


def _widened(budget: Budget, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Each line or part of a text gets what the arguments say, at most."""
    given = [*args, *named.values()]
    more = _largest(given) + sum(len(each) for each in given if isinstance(each, str))
    n = budget.text_length(value)
    if (n + 1) * more > budget.max_chars:
        lines = str(value).count("\n") + 1
        budget.check_length(n + lines * more)


def _padded(budget: Budget, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    budget.check_length(_largest([*args, *named.values()]))


def _wrapped(budget: Budget, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Between any two characters of a text, or around each, there may be what is given."""
    given = [each for each in (*args, *named.values()) if isinstance(each, str)]
    budget.check_length((budget.text_length(value) + 1) * (1 + sum(map(len, given))))


def _written(budget: Budget, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    n = budget.text_length(value)
    given = [*args, *named.values()]
    if not given:
        return
    n *= _depth(value)  # each line is indented by so many times the indent, at most
    indent = _largest(given) + sum(len(each) for each in _flat(given) if isinstance(each, str))
    if n * (1 + indent) > budget.max_chars:
        budget.check_length(n * (1 + indent))


def _formatted(budget: Budget, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    check_format(budget, str(value), args, named)


_FILTERS: Mapping[str, Callable[[Budget, Any, tuple[Any, ...], Mapping[str, Any]], None]] = {
    "replace": _replaced,
    "join": _joined,
    "format": _formatted,
    "center": _padded,
    "batch": _padded,
    "indent": _widened,
    "wordwrap": _wrapped,
    "urlize": _wrapped,
    **dict.fromkeys(("tojson", "pprint", "string", "urlencode", "xmlattr"), _written),
    **dict.fromkeys(("escape", "e", "forceescape", "striptags", "title", "wordcount"), _written),
}
QUICK = frozenset({
    "abs", "attr", "count", "d", "default", "first", "float", "int", "last", "length", "round",
})  # fmt: skip
"""Filters that take no longer for what is larger."""
_OF_CHARACTERS = frozenset({
    "list", "sort", "unique", "groupby", "batch", "slice", "wordcount", "wordwrap", "title",
    "urlize",
})  # fmt: skip
"""Filters that take a text apart."""
_COMPARE = frozenset({"sort", "unique", "groupby", "dictsort", "min", "max"})
"""Filters that compare the items of a list."""


def check_filter(
    budget: Budget, name: str, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]
) -> None:
    """Before a filter runs: it counts what that is given.

    Raises:
        LimitError: it would build too much, or all of it has run for too long.
    """
    budget.step()
    if isinstance(value, _CONTAINERS) and name not in QUICK:
        if name in _COMPARE:
            budget.text_length(value)
            budget.step(len(value))
        budget.step(len(value) >> 3)
    elif type(value) is str and len(value) > _SMALL and name not in QUICK:
        budget.build(len(value) * (80 if name in _OF_CHARACTERS else 1))
    if (check := _FILTERS.get(name)) is not None:
        check(budget, value, args, named)


def _depth(value: Any) -> int:
    depth, level = 1, [value]
    while level := [part for each in level if isinstance(each, _CONTAINERS) for part in _in(each)]:
        depth += 1
    return depth


def _in(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _largest(values: Iterable[Any]) -> int:
    return max((abs(each) for each in values if isinstance(each, int)), default=0)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    return chain.from_iterable(
        each if isinstance(each, list | tuple) else (each,) for each in values
    )
