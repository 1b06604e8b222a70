"""Resolve the model names of requests to models on this machine.

A request's name is never a path, unless the operator named that path. A missing model is not
downloaded: the error tells clients to pull it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlxkv.base.paths import NAME, models_dir, slug
from mlxkv.engine.messages import Ask, Engine
from mlxkv.errors import MlxkvError, ModelNotFound, UsageError, shortened
from mlxkv.generation.request import Request
from mlxkv.server.config import ServerConfig
from mlxkv.server.threads import run_in_threadpool
from mlxkv.store import adapter_names, catalog, hub, library, resolve
from mlxkv.store.adapters import stored_adapters
from mlxkv.store.aliases import stored_aliases
from mlxkv.store.library import StoredModel
from mlxkv.store.refs import (
    REPO,
    CatalogRef,
    HubRef,
    StoredRef,
    check_spelling,
    is_model,
    locate,
    stored_folder,
    unaliased,
)
from mlxkv.store.settings import Given, draft_model, effective, own_context

LATEST = ":latest"
_HOSTS = ("hf.co/", "huggingface.co/")
_MAX_CHARS = 256


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine.

    Args:
        name: its name in the engine.
        path: its directory; None if the engine resolves the name.
        adapter: those that the name has behind the model's, found as `store.adapter_names.named`
            finds them.
    """

    name: str
    path: Path | None = None
    adapter: tuple[str, ...] = ()

    def ask(self, request: Request, owner: str, keep_alive_s: float | None = None) -> Ask:
        """A request to this model; arguments as for `Ask`."""
        if self.adapter:
            request = replace(request, adapter=(*self.adapter, *request.adapter))
        return Ask(self.name, request, owner, keep_alive_s, self.path)


def listed(config: ServerConfig) -> list[StoredModel]:
    """The models on this machine, those under an alias included."""
    aliases = stored_aliases() | dict(config.aliases)
    return library.with_aliases(library.list_models(), aliases)


def adapted(models: Sequence[StoredModel]) -> list[tuple[StoredModel, StoredModel]]:
    """Models under adapters that name them as their base, by the name that requests use: each with
    the model itself."""
    found, adapters = [], stored_adapters()
    for model in models:
        for each in adapter_names.fitting(model.path, adapters):
            name = f"{model.name}{adapter_names.SIGN}{each.name}"
            found.append((replace(model, name=name, size_bytes=each.size_bytes), model))
    return found


def context_of(path: Path, config: ServerConfig) -> int | None:
    """Tokens that prompt and answer may have together here; None if the files do not tell."""
    try:
        return effective(path, Given(context=config.context)).context.value
    except UsageError:  # the operator's context is past the model's own
        return own_context(path)
    except MlxkvError:
        return None


async def present(engine: Engine, config: ServerConfig, name: str) -> LocalModel:
    """Find a model on this machine.

    Args:
        engine: has the names of the models in memory.
        config: has the operator's models.
        name: the request's name, with or without `:latest`; adapters may stand behind it.

    Raises:
        ModelNotFound: no such model on this machine, or no such adapter.
        UsageError: an adapter's weight that is no number.
    """
    known = {*config.models, *engine.names()}
    for spelling in spellings(name):
        if spelling in known:
            return LocalModel(spelling)
    aliases = dict(config.aliases)
    for spelling in spellings(name):
        if (model := aliases.get(spelling)) is not None:
            return (
                LocalModel(model) if model in known else await run_in_threadpool(_of, name, model)
            )
    model, adapter = adapter_names.split_name(name.removesuffix(LATEST))
    if adapter:
        found = await present(engine, config, model)
        return replace(found, adapter=await run_in_threadpool(adapter_names.named, adapter))
    return await run_in_threadpool(find, name)


async def with_named(engine: Engine, config: ServerConfig, model: LocalModel, ask: Ask) -> Ask:
    """A request whose adapters and draft model, if its fields name any, are found on this machine.

    Args:
        engine: as for `present`, and so is the next.
        config: the server's.
        model: that made the request; its own adapters are found already.
        ask: the request.

    Raises:
        ModelNotFound: no such model or adapter on this machine.
        UsageError: an adapter's weight that is no number.
    """
    if others := ask.request.adapter[len(model.adapter) :]:
        found = await run_in_threadpool(adapter_names.named, others)
        request = replace(ask.request, adapter=(*model.adapter, *found))
        ask = replace(ask, request=request)
    if (name := draft_model(ask.request.draft)) is None:
        return ask
    model = await present(engine, config, name)
    request = replace(ask.request, draft=model.name)
    return replace(ask, request=request, draft_path=model.path)


def without_adapters(model: LocalModel) -> LocalModel:
    """A model for what no adapter changes.

    Raises:
        UsageError: its name has some.
    """
    if model.adapter:
        raise UsageError("takes no adapters here: they change what a model writes", field="model")
    return model


def find(name: str) -> LocalModel:
    """Find a complete model in the store, which may have an alias; raises as `present`."""
    for spelling in spellings(name):
        if (model := unaliased(spelling)) != spelling:
            return _of(name, model)
        ref = _ref(spelling)
        if ref is not None and (path := resolve.local(ref)) is not None:
            return LocalModel(spelling, path)
    raise _not_found(name)


def _of(name: str, model: str) -> LocalModel:
    """The model of an alias, which may be a path; raises as `present`."""
    try:
        return LocalModel(model, resolve.resolve(model, fetch=False))
    except ModelNotFound:
        raise _not_found(name) from None


def stored_name(name: str) -> str:
    """The name of a stored model, which may be incomplete; raises as `present`."""
    for spelling in spellings(name):
        if _is_here(spelling):
            return spelling
    raise _not_found(name)


def pullable_name(name: str) -> str:
    """The name of a model that can be downloaded: a built-in one or a Hugging Face repository.

    Raises:
        ModelNotFound: no such model.
    """
    for spelling in spellings(name):
        ref = _ref(spelling)
        if isinstance(ref, CatalogRef | HubRef | StoredRef):
            return spelling
    raise ModelNotFound(
        f"model {_short(name)} not found: name a built-in model or a Hugging Face repository "
        "(org/name)"
    )


def new_name(name: str) -> str:
    """Check a name for a new model.

    Raises:
        UsageError: an invalid name, or one that exists.
    """
    name = name.removesuffix(LATEST)
    if len(name) > _MAX_CHARS or not NAME.fullmatch(name) or name.endswith(".gguf"):
        raise UsageError(
            f"a model's name must be letters, digits, '.', '_', '-' and one ':'; got {_short(name)}"
        )
    if catalog.find(name):
        raise UsageError(f"{_short(name)} is the name of a built-in model; choose another")
    if stored_folder(name):
        raise UsageError(f"model {_short(name)} exists already; delete it first")
    check_spelling(name)
    return name


def spellings(name: str) -> Iterator[str]:
    """Names that a client may mean: Ollama's clients add `:latest`, or leave it out."""
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
    """The model that a name or alias refers to; None for an invalid name or a path."""
    name = unaliased(name)
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
        case HubRef(repo_id=repo_id, revision=revision):
            return hub.cached_snapshot(repo_id, revision) is not None
    return False


def _not_found(name: str) -> ModelNotFound:
    return ModelNotFound(f"model {_short(name)} not found: pull it; GET /api/tags lists all")


def _short(name: str) -> str:
    return repr(shortened(name))
