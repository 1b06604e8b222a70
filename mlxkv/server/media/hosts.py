"""Which servers a request's URLs may name: those of `mlxkv serve --allow-media-from`, no other.

A name is allowed on the port of its scheme alone, unless it is given with a port, and only where it
leads to public addresses. An address that the operator gives may be inside the network.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from mlxkv.errors import UsageError

PORTS = {"http": 80, "https": 443}
_MAX_URL = 8192


class FetchError(Exception):
    """A URL cannot be fetched; the text goes on from its field."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that was taken apart once, so that what is checked is what is asked.

    Args:
        scheme: `http` or `https`.
        host: name or address, in small letters.
        port: of the server.
        path: with its query.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host and port, as a Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL, without a fragment."""
        return f"{self.scheme}://{self.authority}{self.path}"


@dataclass(frozen=True, slots=True)
class MediaHost:
    """A server that the operator allows.

    Args:
        name: a host, an address, or with `*.` before it all names below a host.
        port: its port; None for that of the scheme.
    """

    name: str
    port: int | None = None

    def allows(self, target: Target) -> bool:
        """Whether a URL is of this server."""
        if target.port != (self.port or PORTS[target.scheme]):
            return False
        if self.name.startswith("*."):
            return target.host.endswith(self.name[1:]) and not is_address(target.host)
        return target.host == self.name


def media_hosts(texts: Iterable[str]) -> tuple[MediaHost, ...]:
    """Hosts as an operator writes them: HOST, *.HOST, an address, each perhaps with a port.

    Raises:
        UsageError: one is none of these.
    """
    return tuple(_media_host(text) for text in texts)


def target_of(url: str) -> Target:
    """Take a URL apart.

    Raises:
        ValueError: not a URL of http or https; the text says what is wrong.
    """
    url = url.strip()
    if len(url) > _MAX_URL:
        raise ValueError(f"is a URL of more than {_MAX_URL:,} characters")
    if not url.isascii() or any(char <= " " or char in "\\\x7f" for char in url):
        raise ValueError("is a URL with characters that URLs do not have: percent-encode them")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is not a URL") from None
    scheme = parts.scheme.lower()
    if scheme not in PORTS or not host:
        raise ValueError("must be a data URL, or an http or https URL")
    if "@" in parts.netloc:
        raise ValueError("is a URL with a user name, which is not allowed")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(scheme, _canonical(host), PORTS[scheme] if port is None else port, path)


def is_address(host: str) -> bool:
    """Whether a host is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _canonical(host: str) -> str:
    """A host in the one form in which hosts are compared."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().removesuffix(".")


def _media_host(text: str) -> MediaHost:
    bare = text.strip().removeprefix("*.")
    try:
        target = target_of(f"http://{bare}")
        port = urlsplit(f"http://{bare}").port
    except ValueError:
        target, port = None, None
    is_wide = text.strip().startswith("*.")
    if (
        target is None
        or target.path != "/"
        or not bare
        or any(char in bare for char in "/?#*")
        or (is_wide and is_address(target.host))
    ):
        raise UsageError(
            f"must be HOST, *.HOST or an address, perhaps with a port; got {text[:80]!r}",
            field="media_hosts",
        )
    return MediaHost(f"*.{target.host}" if is_wide else target.host, port)
