"""Functions as GPT-OSS is told of them: TypeScript types in a namespace.

Equal to openai-harmony 0.0.8, also where that is odd: `anyOf`, `$ref` and a schema without `type`
are `any`, an object's own description stands between a property's name and its type, and examples
that are no texts are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

_STEP = "    "
_VARIANT_STEP = "   "
_PLAIN = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def namespace(name: str, tools: Sequence[Mapping[str, Any]], description: str = "") -> str:
    """A section of the tools of one name space.

    Args:
        name: of the name space.
        tools: functions, each with `name`, `description` and `parameters`.
        description: of the name space; comments where there are functions.
    """
    mark = "// " if tools else ""
    lines = [f"## {name}\n", *(mark + line for line in lines_of(description))]
    if not tools:
        return "\n".join(lines)
    lines.append(f"namespace {name} {{\n")
    for tool in tools:
        lines += [f"// {line}" for line in lines_of(tool.get("description") or "")]
        parameters = tool.get("parameters")
        argument = f"_: {typescript(parameters)}" if parameters else ""
        lines.append(f"type {tool['name']} = ({argument}) => any;\n")
    return "\n".join([*lines, f"}} // namespace {name}"])


def lines_of(text: str) -> list[str]:
    """Lines of a text; an empty last one is none."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def typescript(schema: Any, indent: str = "") -> str:
    """The type that a JSON schema describes."""
    schema = _object(schema)
    if isinstance(variants := schema.get("oneOf"), list):
        return "".join(f"\n{indent} | {_variant(each, indent)}" for each in variants)
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if each == "integer" else each for each in kind if isinstance(each, str)]
        if names:
            return " | ".join(names)
    if kind == "object":
        return _members(schema, indent)
    if kind == "array":
        return f"{typescript(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string" and (values := [v for v in _list(schema, "enum") if isinstance(v, str)]):
        return " | ".join(f'"{value}"' for value in values)
    return _PLAIN.get(kind, "any") if isinstance(kind, str) else "any"


def _members(schema: Mapping[str, Any], indent: str) -> str:
    description = _text(schema, "description")
    head = "" if description is None else f"{indent}// {description}\n"
    required = {name for name in _list(schema, "required") if isinstance(name, str)}
    members = _object(schema.get("properties")).items()
    body = "".join(
        _property(name if name in required else f"{name}?", _object(each), indent)
        for name, each in members
    )
    return f"{head}{{\n{body}{indent}}}"


def _property(name: str, schema: Mapping[str, Any], indent: str) -> str:
    """A member of an object, with its comments.

    Args:
        name: with a question mark where it may be left out.
        schema: its own.
        indent: of its lines.
    """
    out = ""
    if (title := _text(schema, "title")) is not None:
        out += f"{indent}// {title}\n{indent}//\n"
    description = _text(schema, "description")
    if "oneOf" not in schema and description is not None:
        out += f"{indent}// {description}\n"
    if examples := _list(schema, "examples"):
        out += f"{indent}// Examples:\n"
        out += "".join(f'{indent}// - "{each}"\n' for each in examples if isinstance(each, str))
    if isinstance(schema.get("oneOf"), list):
        return out + _choice(name, schema, indent)
    kind = _nullable(typescript(schema, indent + _STEP), schema)
    shows_default = "default" in schema and "oneOf" not in schema
    default = f" // default: {_default(schema)}" if shows_default else ""
    return f"{out}{indent}{name}: {kind},{default}\n"


def _choice(name: str, schema: Mapping[str, Any], indent: str) -> str:
    """A member that is one of several types, each on a line of its own."""
    description, variants = _text(schema, "description"), schema["oneOf"]
    first = _text(_object(variants[0]), "description") if variants else None
    said_above = description is not None and description != first
    out = f"{indent}// {description}\n" if said_above else ""
    if "default" in schema:
        out += f"{indent}// default: {_default(schema)}\n"
    out += f"{indent}{name}:\n"
    for i, each in enumerate(map(_object, variants)):
        comments = []
        said = _text(each, "description")
        if said is not None and said != description and not (i == 0 and said_above):
            comments.append(said)
        if "default" in each:
            comments.append(f"default: {_default(each)}")
        comment = f" // {' '.join(comments)}" if comments else ""
        out += f"{indent} | {_nullable(typescript(each, indent + _VARIANT_STEP), each)}{comment}\n"
    return f"{out}{indent},\n"


def _variant(schema: Any, indent: str) -> str:
    """One of several types where they are no member's own."""
    schema = _object(schema)
    comments = [said] if (said := _text(schema, "description")) is not None else []
    if "default" in schema:
        # Unlike a member's, the default of an enum keeps its quotes.
        value = schema["default"]
        comments.append(f"default: {_json(value) if _is_enum(schema) else _default(schema)}")
    comment = f" // {' '.join(comments)}" if comments else ""
    return _nullable(typescript(schema, indent + _VARIANT_STEP), schema) + comment


def _nullable(kind: str, schema: Mapping[str, Any]) -> str:
    return f"{kind} | null" if schema.get("nullable") is True and "null" not in kind else kind


def _default(schema: Mapping[str, Any]) -> str:
    value = schema["default"]
    if isinstance(value, str):
        return value if _is_enum(schema) else f'"{value}"'
    return _json(value)


def _is_enum(schema: Mapping[str, Any]) -> bool:
    return bool(_list(schema, "enum"))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _text(schema: Mapping[str, Any], key: str) -> str | None:
    value = schema.get(key)
    return value if isinstance(value, str) else None


def _json(value: Any) -> str:
    """JSON without blanks, numbers as serde_json writes them."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_json(k)}:{_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        value = float(value)
    if isinstance(value, float):
        return _float(value)
    return json.dumps(value, ensure_ascii=False)


def _float(value: float) -> str:
    """Shortest digits, in exponents below 1e-5 and from 1e16 on."""
    if not math.isfinite(value):
        return "null"
    digits, _, power = f"{value!r}".partition("e")
    if not power:
        return digits
    exponent = int(power)
    if exponent == -5:  # Python's first with an exponent, Rust's last without one
        sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
        return f"{sign}0.0000{digits.replace('.', '')}"
    return f"{digits}e{exponent}"
