"""Settings of the server: address, access and limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlxkv.errors import Hint, UsageError

HOST, PORT = "127.0.0.1", 11434
"""Default address of servers and clients."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """A server's settings.

    Args:
        host: address to listen on.
        port: port to listen on.
        api_keys: a request must carry one of them; none: no key is needed.
        api_key_file: further ones, one a line; read again when it changes.
        origins: further web pages that may ask, such as `https://app.example`; `*` for all.
        hosts: further names that the server goes by, such as `mac-mini.example`.
        media_hosts: servers from which pictures and sound are fetched that requests name by URL,
            see `media.hosts`.
        strict: refuse requests with fields that no API here declares, and wishes that a model can
            meet only in part.
        agent_prompts: tell agents' models what changes behind what stays, see `agents.state`.
        agent_file: where that is remembered for the next start; None for memory alone.
        models: names or paths that the operator gave; requests may name them as they are.
        aliases: further names of models, besides the stored ones: pairs of a name and its model.
        context: tokens of prompt and answer together, for all models; None for each model's own.
        max_body_bytes: size of a request.
        max_bodies_bytes: size of all requests together that are not answered yet.
        max_upload_bytes: size of a file that is sent to make a model of.
        max_connections: at a time; fewer where the process may have fewer files.
        head_s: time in which the head of a request has to come.
        body_s: time in which the body of a request has to come; longer by its size, see
            `min_body_rate`.
        min_body_rate: bytes a second that a long body has to come with.
        end_s: time in which the process ends, once it was told to.
        max_tokens: length of one answer; None for as long as the context allows.
        max_choices: answers to one request (`n`, or a list of prompts).
        first_s: time to wait for the first event before a stream starts. An error before has its
            own HTTP status; later ones are events of the stream.
        ping_s: send a comment after this long without an event.
        stall_s: time after which a client that does not read its stream counts as disconnected.

    Raises:
        UsageError: other machines can reach the address and no API key is set, or an invalid key.
    """

    host: str = HOST
    port: int = PORT
    api_keys: tuple[str, ...] = ()
    api_key_file: Path | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    media_hosts: tuple[str, ...] = ()
    strict: bool = False
    agent_prompts: bool = False
    agent_file: Path | None = None
    models: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    context: int | None = None
    max_body_bytes: int = 32 << 20
    max_bodies_bytes: int = 256 << 20
    max_upload_bytes: int = 4 << 30
    max_connections: int = 1024
    head_s: float = 10.0
    body_s: float = 30.0
    min_body_rate: int = 128 << 10
    end_s: float = 10.0
    max_tokens: int | None = None
    max_choices: int = 16
    first_s: float = 5.0
    ping_s: float = 10.0
    stall_s: float = 30.0

    def __post_init__(self) -> None:
        check_keys(self.api_keys, "api_keys")
        has_keys = self.api_keys or self.api_key_file
        if not has_keys and not is_loopback(self.host):
            raise UsageError(
                f"other machines can reach {self.host}, so an API key is required; or listen on "
                f"127.0.0.1",
                field="host",
                hints=[Hint("api_keys", "KEY"), Hint("api_key_file", "FILE")],
            )


def bodies_bytes(memory_bytes: int) -> int:
    """`max_bodies_bytes` beside a memory limit, which does not count them: a sixteenth of it, but
    two of the largest requests at least, and the default at most."""
    defaults = ServerConfig()
    return min(defaults.max_bodies_bytes, max(2 * defaults.max_body_bytes, memory_bytes // 16))


def check_keys(keys: Iterable[str], field: str) -> None:
    """Check the spelling of API keys; the error names none.

    Raises:
        UsageError: one is invalid.
    """
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError("must be printable ASCII without spaces, and not empty", field=field)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address or name to listen on."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
