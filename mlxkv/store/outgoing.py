"""Where a server's process may connect to: public addresses, and what its operator named.

A client of the server chooses which repository is pulled, and a hub may redirect each download. The
check is made on the address that a socket connects to, thus after names were resolved, and for
each redirect: a name that resolves to another address the second time changes nothing. It is a hook
of the interpreter (`sys.addaudithook`), because the hub's client has another HTTP library in each
major version, and it stays for the process. Code that is not Python connects unseen: Xet's client
is turned off.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from mlxkv.errors import DownloadError, UsageError

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Host = tuple[str, int]


_more: ContextVar[tuple[Host, ...]] = ContextVar("_more", default=())


@contextmanager
def also_allowed(hosts: Iterable[Host]) -> Iterator[None]:
    """Allow more hosts within this block, in this task or thread alone: its caller checks them."""
    token = _more.set((*_more.get(), *hosts))
    try:
        yield
    finally:
        _more.reset(token)


def only_public(allowed: Iterable[str] = ()) -> None:
    """Refuse connections from this process into its network, from here on.

    The hosts of HF_ENDPOINT and of proxies are the operator's and allowed.

    Args:
        allowed: further ones, each as HOST or HOST:PORT; the port is 443 otherwise.

    Raises:
        UsageError: one of them is no host.
    """
    hosts = [*operator_hosts(os.environ), *(_host(each) for each in allowed)]
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

    def check(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.connect":
            _check(args[1], (*hosts, *_more.get()))

    sys.addaudithook(check)


def operator_hosts(environment: Mapping[str, str]) -> list[Host]:
    """Hosts that the environment names: of the hub, and of proxies."""
    names = {name.lower(): value for name, value in environment.items()}
    urls = [names.get(name, "") for name in ("hf_endpoint", *_PROXIES)]
    found = []
    for url in filter(None, urls):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.hostname:
            found.append((parts.hostname, parts.port or _PORTS.get(parts.scheme, 443)))
    return found


def is_public(address: str) -> bool:
    """Whether an IP address is outside of this machine and its networks."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return ip.is_global and not ip.is_multicast


def _check(address: Any, hosts: Iterable[Host]) -> None:
    """Refuse an address to connect to; sockets of files and pipes have none."""
    if not isinstance(address, tuple) or is_public(str(address[0])):
        return
    given = str(address[0]), address[1]
    if any(given in _addresses(host) for host in hosts):
        return
    raise DownloadError(
        f"{given[0]} port {given[1]} is inside the server's network, and a download may not go "
        "there unless its operator allows that host"
    )


def _addresses(host: Host) -> set[Host]:
    name, port = host
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {(str(each[4][0]), port) for each in found}


def _host(text: str) -> Host:
    """`HOST`, `HOST:PORT` or `[IPv6]:PORT`."""
    try:
        parts = urlsplit(f"//{text}")
        if parts.hostname and parts.netloc == text and "@" not in text:
            return parts.hostname, parts.port or 443
    except ValueError:
        pass
    raise UsageError(f"must be HOST or HOST:PORT; got {text[:80]!r}", field="pull_hosts")
