"""Fetch what a request's URLs name, from the servers that the operator allows (`hosts`).

- Every connection goes to an address that was checked, after the name was resolved: one inside the
  network only if the operator gave that address. Redirects are followed one by one, by the same
  rules, and never from https to http.
- No proxy, cookie or credential of this process is used.
- Bounds: bytes, seconds, redirects, and the type that the server says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from mlxkv.server.media.hosts import FetchError, MediaHost, Target, target_of
from mlxkv.server.threads import run_in_threadpool

if TYPE_CHECKING:
    import ssl

    from httpcore import AsyncConnectionPool, Response

FETCH_S = 20.0
"""Seconds that one URL has, its redirects included."""
MAX_URLS = 16
"""Different ones in one request."""
MAX_REDIRECTS = 4
AT_A_TIME = 4
"""URLs of one request that are fetched at a time."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TYPES = {
    "image": ("image/",),
    "audio": ("audio/", "video/mp4", "video/webm", "video/quicktime", "application/ogg"),
}
_ANY_TYPES = ("application/octet-stream", "binary/octet-stream")


@dataclass
class Remote:
    """Fetches URLs of requests.

    Args:
        hosts: whose.
        seconds: that one URL has.
    """

    hosts: Sequence[MediaHost] = ()
    seconds: float = FETCH_S

    async def fetch(self, url: str, kind: str, max_bytes: int) -> bytes:
        """The bytes of a picture or a recording.

        Args:
            url: of http or https.
            kind: `image` or `audio`.
            max_bytes: of it.

        Raises:
            FetchError: it is not allowed, or did not come.
        """
        from httpcore import AsyncConnectionPool  # most servers fetch nothing

        from mlxkv.server.media.network import CheckedNetwork

        target = self._allowed(url)
        try:
            async with asyncio.timeout(self.seconds):
                context = await run_in_threadpool(_ssl_context)
                network = CheckedNetwork(self.hosts)
                async with AsyncConnectionPool(context, network_backend=network) as pool:
                    return await self._follow(pool, target, kind, max_bytes)
        except TimeoutError:
            raise FetchError(f"did not come from {target.host} in {self.seconds:g} s") from None

    def _allowed(self, url: str) -> Target:
        try:
            target = target_of(url)
        except ValueError as error:
            raise FetchError(str(error)) from None
        if not any(host.allows(target) for host in self.hosts):
            raise NotAllowed(target)
        return target

    async def _follow(
        self, pool: AsyncConnectionPool, target: Target, kind: str, max_bytes: int
    ) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            answer = await _ask(pool, target, kind, max_bytes)
            if isinstance(answer, bytes):
                return answer
            try:
                there = self._allowed(urljoin(target.url, answer))
            except FetchError as error:
                raise FetchError(f"is redirected by {target.host} to a URL that {error}") from None
            if (target.scheme, there.scheme) == ("https", "http"):
                raise FetchError(f"is redirected by {target.host} from https to http")
            target = there
        raise FetchError(f"is redirected more than {MAX_REDIRECTS} times")


class NotAllowed(FetchError):
    """A URL of a server that the operator has not named."""

    def __init__(self, target: Target):
        super().__init__(
            f"is on {target.host}, from which this server fetches nothing: send the file itself, "
            f"or have the server's operator allow {target.authority}"
        )


@cache
def _ssl_context() -> ssl.SSLContext:
    from httpcore import default_ssl_context

    return default_ssl_context()


async def _ask(pool: AsyncConnectionPool, target: Target, kind: str, max_bytes: int) -> bytes | str:
    """What a URL has, or where it is redirected to."""
    import httpcore

    url = httpcore.URL(
        scheme=target.scheme.encode(),
        host=target.host.encode(),
        port=target.port,
        target=target.path.encode(),
    )
    headers = [
        ("host", target.authority),
        ("user-agent", "mlxkv"),
        ("accept", f"{kind}/*"),
        ("accept-encoding", "identity"),
    ]
    try:
        async with pool.stream("GET", url, headers=headers) as response:
            return await _read(response, target, kind, max_bytes)
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
        raise FetchError(f"cannot be fetched from {target.host}: the connection failed") from None


async def _read(response: Response, target: Target, kind: str, max_bytes: int) -> bytes | str:
    headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
    if response.status in _REDIRECTS:
        return headers.get(b"location", "")
    if response.status != 200:
        raise FetchError(f"cannot be fetched from {target.host}: its status is {response.status}")
    said = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    if not said.startswith((*_TYPES[kind], *_ANY_TYPES)):
        what = "a picture" if kind == "image" else "sound"
        raise FetchError(f"is not {what}: {target.host} says {said[:80]!r}")
    if headers.get(b"content-encoding", "identity").strip().lower() != "identity":
        raise FetchError(f"is compressed by {target.host}, which was not asked for")
    data = bytearray()
    length = headers.get(b"content-length", "0")
    n_said = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else 0
    if n_said <= max_bytes:
        async for piece in response.aiter_stream():
            data += piece
            if len(data) > max_bytes:
                break
        else:
            return bytes(data)
    raise TooLarge(f"has more than {max_bytes:,} bytes")


class TooLarge(FetchError):
    """What a URL has is larger than allowed."""
