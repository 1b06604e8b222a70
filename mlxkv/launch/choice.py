"""Which server and which model a program gets."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from mlxkv.errors import ModelNotFound, UsageError
from mlxkv.server.client import Server
from mlxkv.server.config import is_loopback
from mlxkv.store import last_model, library, resolve
from mlxkv.store.encoders import encoders_in
from mlxkv.store.settings import effective

WORKS_FROM = 16_384
"""Below this context, system prompt and tools of an agent leave no room to work."""
_CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about a served model.

    Args:
        context: tokens of prompt and answer together.
        tools: whether its chat template knows tools.
        sees: whether it takes pictures.
    """

    context: int
    tools: bool
    sees: bool = False

    def warnings(self, model: str, title: str) -> list[str]:
        """What a user should know before a program gets this model."""
        found = []
        if self.context < WORKS_FROM:
            found.append(
                f"{model} has a context of {self.context:,} tokens; {title} needs {WORKS_FROM:,} "
                "or more to work"
            )
        if not self.tools:
            found.append(f"the chat template of {model} has no tools, which {title} works with")
        return found


def running_server(address: str | None, key: str | None) -> Server | None:
    """The server to use; None to start one.

    Args:
        address: the user's; None for MLXKV_SERVER, or this machine.
        key: API key; None for MLXKV_API_KEY, or no key.

    Raises:
        UsageError: an address of the user's at which no mlxkv answers, or an invalid one.
    """
    server = Server.at(address, key)
    chosen = address is not None or bool(os.environ.get("MLXKV_SERVER"))
    if not _listens(server) and address is None and is_loopback(server.host):
        return None
    if "mlxkv" in server.ask("GET", "/api/version"):
        return server
    if chosen:
        raise UsageError(f"the server at {server} is not `mlxkv serve`")
    return None


def _listens(server: Server) -> bool:
    try:
        socket.create_connection((server.host, server.port), _CONNECT_S).close()
    except OSError:
        return False
    return True


def served_model(server: Server) -> str:
    """The model to use of a running server.

    The model that was run last here if the server has it, else the only one in memory, else the
    only one on its machine.

    Raises:
        UsageError: there are several, or none.
    """
    rows, loaded = _models(server, "/api/tags"), list(_models(server, "/api/ps"))
    listed = list(rows)
    last = last_model.recall()
    if last in {*listed, *loaded}:
        return str(last)
    if len(set(rows.values())) == 1:  # one model, whose aliases come behind it
        listed = listed[:1]
    return _only(loaded) or _only(listed) or _ask_for_one([*loaded, *listed])


def stored_model() -> str:
    """The model to use of this machine: the one that was run last, else the only one stored.

    Raises:
        UsageError: there are several, or none.
    """
    last = last_model.recall()
    if last is not None and _is_here(last):
        return last
    names = [model.name for model in library.list_models()]
    return _only(names) or _ask_for_one(names)


def _models(server: Server, path: str) -> dict[str, str]:
    """The names and digests of models."""
    rows = server.ask("GET", path).get("models", [])
    return {str(row["name"]): str(row["digest"]) for row in rows}


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _ask_for_one(names: list[str]) -> str:
    if not names:
        raise UsageError("there is no model yet: fetch one with `mlxkv pull`")
    known = ", ".join(sorted(set(names)))
    raise UsageError(f"must name one of several models: {known}", field="model")


def _is_here(name: str) -> bool:
    try:
        resolve.resolve(name, fetch=False)
    except ModelNotFound:
        return False
    return True


def check_stored(name: str) -> None:
    """Raise ModelNotFound unless a model is on this machine."""
    resolve.resolve(name, fetch=False)


def stored_facts(name: str) -> Facts:
    """What the files of a model on this machine say; its template is not read.

    Raises:
        ModelNotFound, CheckpointError: it is not here, or cannot be read.
    """
    path = resolve.resolve(name, fetch=False)
    return Facts(effective(path).context.value, True, "image" in encoders_in(path))


def facts(server: Server, model: str) -> Facts:
    """What a server says about a model.

    Raises:
        ModelNotFound: it does not have it.
    """
    shown = server.ask("POST", "/api/show", {"model": model})
    info = shown.get("model_info", {})
    context = int(info.get(f"{info.get('general.architecture')}.context_length", 0))
    able = shown.get("capabilities", ())
    return Facts(context, "tools" in able, "vision" in able)
