"""Connections for `remote`, to addresses that are checked after their names are resolved."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from typing import Any

from httpcore import AnyIOBackend, AsyncNetworkBackend, AsyncNetworkStream, ConnectError

from mlxkv.server.media.hosts import FetchError, MediaHost, is_address
from mlxkv.store.outgoing import also_allowed, is_public


class CheckedNetwork(AsyncNetworkBackend):
    """Connects to checked addresses alone.

    Args:
        hosts: that the operator allows.
    """

    def __init__(self, hosts: Iterable[MediaHost]):
        self._hosts = hosts

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> AsyncNetworkStream:
        addresses = await self._addresses(host, port)
        for address in addresses:
            try:
                with also_allowed([(address, port)]):
                    return await AnyIOBackend().connect_tcp(address, port, timeout=timeout)
            except ConnectError:
                continue
        raise ConnectError("no address answers")

    async def connect_unix_socket(self, *args: Any, **options: Any) -> AsyncNetworkStream:
        raise FetchError("is not on a server")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a host, all of which are checked."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise FetchError(f"cannot be fetched: there is no host {host}") from None
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        is_given = is_address(host) and any(each.name == host for each in self._hosts)
        if not is_given and not all(map(is_public, addresses)):
            raise FetchError(
                f"cannot be fetched: {host} leads into the server's own network, where only an "
                "address that its operator has given is allowed"
            )
        return addresses
