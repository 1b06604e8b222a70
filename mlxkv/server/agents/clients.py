"""Which program a request comes from."""

from __future__ import annotations

import re

from fastapi import Request

UNKNOWN = "unknown"
_PRODUCT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}(?=[/ ]|$)")


def client_of(request: Request) -> str:
    """The first product of the User-Agent header, without its version: `claude-cli`."""
    return client_named(request.headers.get("user-agent", ""))


def client_named(user_agent: str) -> str:
    """`client_of` for the header alone."""
    found = _PRODUCT.match(user_agent)
    return found[0] if found else UNKNOWN
