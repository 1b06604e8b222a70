"""Values in the notations that models use: JSON, and Python literals. See `loose` for mixtures."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

LITERALS: Mapping[str, Any] = {
    "true": True, "false": False, "null": None, "True": True, "False": False, "None": None,
}  # fmt: skip
"""Words of JSON and of Python that are values."""


class Unreadable(Exception):
    """Text that is not what it should be; says where."""


def read_json(text: str) -> Any:
    """A JSON value, and nothing that JSON does not have (NaN, an endless number).

    Raises:
        Unreadable: it is none.
    """
    try:
        return json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=no_key_twice
        )
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON at character {error.pos}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from None


def read_json_prefix(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, and what follows it.

    Raises:
        Unreadable: it begins with none.
    """
    decoder = json.JSONDecoder(
        parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=no_key_twice
    )
    start = len(text) - len(text.lstrip())
    try:
        value, end = decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON at character {error.pos}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from None
    return value, text[end:]


def read_object(text: str) -> dict[str, Any]:
    """A JSON object; nothing at all is an empty one.

    Raises:
        Unreadable: it is none.
    """
    if not text.strip():
        return {}
    value = read_json(text)
    if isinstance(value, str):  # some templates write the object as a JSON string
        value = read_json(value)
    if not isinstance(value, dict):
        raise Unreadable(f"not a JSON object but {type(value).__name__}")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large")
    return number


def no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object.

    Raises:
        ValueError: a key has two values: nothing says which of them is meant.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"the key {key[:40]!r} comes twice")
        found[key] = value
    return found


def read_literal(text: str) -> Any:
    """A value as JSON writes it, or a word, a list or a dict as Python does.

    Raises:
        Unreadable: it is neither.
    """
    try:
        return read_json(text)
    except Unreadable as error:
        word = text.strip()
        if word in LITERALS:
            return LITERALS[word]
        if word[:1] not in ("[", "{"):
            raise
        try:
            return _literal(_python(word))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise error from None


def _python(text: str) -> ast.expr:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backslash in a string
        return ast.parse(text.strip(), mode="eval").body


def read_python_calls(text: str) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """Calls written as Python: `name(key="text")`, or a list of them.

    Nothing is run. JSON's true, false and null are read as well.

    Returns:
        (name, positional values, keyword values) of each.

    Raises:
        Unreadable: it is something else.
    """
    try:
        tree = _python(text)
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unreadable(f"not a call: {error}") from None


def _python_call(node: ast.expr) -> tuple[str, list[Any], dict[str, Any]]:
    if not isinstance(node, ast.Call):
        raise ValueError("no call")
    keywords = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("** in a call")
        keywords[keyword.arg] = _literal(keyword.value)
    return _dotted(node.func), [_literal(arg) for arg in node.args], keywords


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    raise ValueError("the function has no name")


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | bool() | int() | None as value):
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.Name(id=name) if name in LITERALS:
            return LITERALS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List() | ast.Tuple():
            return [_literal(item) for item in node.elts]
        case ast.Dict(keys=keys, values=values):
            return no_key_twice([*zip(map(_key, keys), map(_literal, values), strict=True)])
    raise ValueError("a value that is no literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("a key that is no string")
