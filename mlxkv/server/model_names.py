"""Names of models in requests that speak of models that are here.

No name of a request is a path, except one that the operator gave. A model that is not here is not
fetched to answer a request: clients are told to pull it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastapi.concurrency import run_in_threadpool

from mlxkv.base.paths import NAME, models_dir, slug
from mlxkv.engine.messages import Ask, Engine
from mlxkv.errors import ModelNotFound, UsageError
from mlxkv.generation.request import Request
from mlxkv.server.config import ServerConfig
from mlxkv.store import catalog, hub, resolve
from mlxkv.store.refs import (
    REPO,
    CatalogRef,
    HubRef,
    StoredRef,
    check_spelling,
    is_model,
    locate,
    stored_folder,
)

LATEST = ":latest"
_HOSTS = ("hf.co/", "huggingface.co/")
_MAX_CHARS = 256


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine.

    Args:
        name: by which the engine knows it.
        path: its directory; None for a name that the engine resolves.
    """

    name: str
    path: Path | None = None

    def ask(self, request: Request, owner: str, keep_alive_s: float | None = None) -> Ask:
        """A request to it; arguments as for `Ask`."""
        return Ask(self.name, request, owner, keep_alive_s, self.path)


async def present(engine: Engine, config: ServerConfig, name: str) -> LocalModel:
    """A model on this machine. A request's name is resolved here or by the engine, and once.

    Args:
        engine: models in memory may have any name.
        config: and so may the operator's.
        name: as a request has it, with or without `:latest`.

    Raises:
        ModelNotFound: it is not here, or no name.
    """
    known = {*config.models, *engine.names()}
    for spelling in spellings(name):
        if spelling in known:
            return LocalModel(spelling)
    return await run_in_threadpool(find, name)


def find(name: str) -> LocalModel:
    """A model that is stored here, apart from those that engine and operator name.

    Raises:
        ModelNotFound: as `present`.
    """
    for spelling in spellings(name):
        ref = _ref(spelling)
        if ref is not None and (path := resolve.local(ref)) is not None:
            return LocalModel(spelling, path)
    raise _not_found(name)


def stored_name(name: str) -> str:
    """The name of a model that is stored here, though it may be incomplete.

    Raises:
        ModelNotFound: as `present`.
    """
    for spelling in spellings(name):
        if _is_here(spelling):
            return spelling
    raise _not_found(name)


def pullable_name(name: str) -> str:
    """A model that can be fetched: of the catalog, or a Hugging Face repository.

    Raises:
        ModelNotFound: there is none of that name.
    """
    for spelling in spellings(name):
        ref = _ref(spelling)
        if isinstance(ref, CatalogRef | HubRef | StoredRef):
            return spelling
    raise ModelNotFound(
        f"model {_short(name)} not found: give a built-in model, or a Hugging Face repository "
        "(org/name)"
    )


def new_name(name: str) -> str:
    """A name under which a model may be stored here.

    Raises:
        UsageError: it is no name, or one that is taken.
    """
    name = name.removesuffix(LATEST)
    if len(name) > _MAX_CHARS or not NAME.fullmatch(name) or name.endswith(".gguf"):
        raise UsageError(
            f"a model's name has letters, digits, '.', '_', '-' and one ':'; got {_short(name)}"
        )
    if catalog.find(name):
        raise UsageError(f"{_short(name)} is the name of a built-in model; choose another")
    if stored_folder(name):
        raise UsageError(f"model {_short(name)} exists already; delete it first")
    check_spelling(name)
    return name


def spellings(name: str) -> Iterator[str]:
    """What a client may mean by a name: Ollama's clients add `:latest`, or leave it out."""
    for host in _HOSTS:
        name = name.removeprefix(host)
    bare = name.removesuffix(LATEST)
    if "/" not in name:
        yield name
    if "/" in name or bare != name:
        yield bare
    elif ":" not in name:
        yield name + LATEST


def _ref(name: str) -> StoredRef | CatalogRef | HubRef | None:
    """What a name means; None if it is none, or a path."""
    if len(name) > _MAX_CHARS or not (NAME.fullmatch(name) or REPO.fullmatch(name)):
        return None
    try:
        ref = locate(name)
    except ModelNotFound:
        return None
    return ref if isinstance(ref, StoredRef | CatalogRef | HubRef) else None


def _is_here(name: str) -> bool:
    match _ref(name):
        case StoredRef():
            return True
        case CatalogRef(model):
            return is_model(models_dir() / slug(model.name))
        case HubRef(repo_id):
            return hub.cached_snapshot(repo_id) is not None
    return False


def _not_found(name: str) -> ModelNotFound:
    return ModelNotFound(f"model {_short(name)} not found: pull it first, or GET /api/tags")


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")
