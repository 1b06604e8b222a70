"""Fields that are taken and change nothing: named in a response header, and in the log.

`mlxkv serve --strict` refuses a field that no API here declares; one that is declared and has no
effect (`NoEffect`) is taken there too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel

from mlxkv.server.config import ServerConfig
from mlxkv.server.fields import LeftOut, NoEffect

_log = logging.getLogger(__name__)

HEADER = b"mlxkv-ignored"
_MAX_NAMES = 32
_MAX_CLIENTS = 1024
_MAX_PATHS = 10_000
"""Fields of one request that are looked at."""
_UNPRINTABLE = re.compile(r"[^A-Za-z0-9_.$-]")

Path = tuple[str, ...]


class Ignored:
    """What the clients of one server send that changes nothing.

    Args:
        config: whether unknown fields are refused.
    """

    def __init__(self, config: ServerConfig):
        self._strict = config.strict
        self._named: dict[str, set[str]] = {}

    def note(self, request: Request, body: BaseModel) -> None:
        """Name the fields of a request that change nothing.

        Raises:
            RequestValidationError: the server is strict, and one is not known.
        """
        unknown = dict.fromkeys(islice(_unknown(body), _MAX_PATHS))
        if self._strict and unknown:
            raise RequestValidationError(
                [
                    {"type": "extra_forbidden", "loc": path, "msg": "not supported"}
                    for path in islice(unknown, _MAX_NAMES)
                ]
            )
        without = dict.fromkeys(islice(_without_effect(body), _MAX_PATHS))
        self.name(request, [".".join(path) for path in [*unknown, *without]])

    def name(self, request: Request, fields: list[str]) -> None:
        """Name fields, or parts of a prompt, in the response's header and in the log."""
        if not fields:
            return
        known = request.scope.setdefault("state", {}).setdefault("ignored", {})
        known |= dict.fromkeys(_UNPRINTABLE.sub("_", name)[:80] for name in fields)
        client = f"{request.state.owner[:8]} {request.headers.get('user-agent', '?')[:120]}".strip()
        if client not in self._named and len(self._named) >= _MAX_CLIENTS:
            self._named.pop(next(iter(self._named)))
        told = self._named.setdefault(client, set())
        if len(told) < _MAX_NAMES and (new := [name for name in known if name not in told]):
            told.update(new)
            shown = ", ".join(new[:_MAX_NAMES])
            _log.warning("%r sends fields that change nothing here: %s", client, shown)


def note(request: Request, body: BaseModel) -> None:
    """`Ignored.note` of the server that a request came to."""
    request.app.state.ignored.note(request, body)


def header(state: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """The response header for what `Ignored.note` found."""
    names = list(state.get("ignored", ()))
    if not names:
        return []
    more = [f"and_{len(names) - _MAX_NAMES}_more"] if len(names) > _MAX_NAMES else []
    return [(HEADER, ", ".join([*names[:_MAX_NAMES], *more]).encode("ascii"))]


def _unknown(value: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of fields that are not declared, without the indices of lists."""
    if isinstance(value, LeftOut):
        yield (*path, str(getattr(value, "type", "?")))
        return
    for name, inner in _parts(value):
        yield from _unknown(inner, (*path, name) if name else path)
    if isinstance(value, BaseModel):
        yield from (
            (*path, name) for name, given in (value.model_extra or {}).items() if given is not None
        )


def _without_effect(value: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of fields that are declared and were sent, and change nothing."""
    for name, inner in _parts(value):
        yield from _without_effect(inner, (*path, name) if name else path)
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        for name in value.model_fields_set & fields.keys():
            is_marked = any(isinstance(each, NoEffect) for each in fields[name].metadata)
            if is_marked and getattr(value, name) is not None:
                yield (*path, fields[name].alias or name)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value is made of, by name; "" for the items of a list."""
    if isinstance(value, BaseModel):
        for name, info in type(value).model_fields.items():
            inner = getattr(value, name)
            if isinstance(inner, BaseModel | list):
                yield info.alias or name, inner
    elif isinstance(value, list):
        yield from (("", item) for item in value if isinstance(item, BaseModel))
