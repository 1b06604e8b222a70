"""The models on this machine: list them, remove one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlxkv.base.paths import NAME, is_listed, models_dir, slug
from mlxkv.errors import MlxkvError, ModelNotFound, OutputError, UsageError
from mlxkv.store import catalog, hub
from mlxkv.store.refs import REPO, HubRef, PathRef, is_model, locate, stored, unaliased


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One line of `mlxkv list`.

    Attributes:
        family: the config's model_type; "?" if it cannot be read.
        size_bytes: what `rm` frees.
        quantization: such as `affine4 g32`, or the dtype of the weights.
        context: 0 if not known.
        source: `wheel`, `hub`, `gguf` or `converted`.
    """

    name: str
    path: Path
    family: str
    size_bytes: int
    quantization: str
    context: int
    source: str


@dataclass(frozen=True, slots=True)
class Removal:
    """What `remove` deletes: directories of the models folder, and a cached repository."""

    name: str
    folders: tuple[Path, ...]
    repo: hub.Removal | None
    n_bytes: int


def list_models() -> list[StoredModel]:
    """The models on this machine: the models folder, then the Hugging Face cache."""
    ours = [_row(record.name, path, _size(path), record.source) for path, record in stored()]
    cached = hub.cached_repos()
    return ours + [_row(repo.name, repo.snapshot, repo.n_bytes, "hub") for repo in cached]


def with_aliases(models: Sequence[StoredModel], aliases: Mapping[str, str]) -> list[StoredModel]:
    """Models, and behind them each again under its aliases.

    Args:
        models: as `list_models` returns them.
        aliases: name and model of each; those of models that are not here are left out.
    """
    names = {model.name for model in models}
    found = {name: _target(models, aliases[name]) for name in sorted(aliases.keys() - names)}
    return [*models, *(replace(model, name=name) for name, model in found.items() if model)]


def _target(models: Sequence[StoredModel], name: str) -> StoredModel | None:
    """The listed model, or the model directory, that an alias names."""
    for model in models:
        if model.name == name:
            return model
    try:
        ref = locate(name)
    except MlxkvError:
        return None
    if isinstance(ref, HubRef) and ref.wanted:
        begin, part = f"{ref.repo}:", ref.wanted.lower()
        named = (model for model in models if model.name.startswith(begin))
        return next((model for model in named if part in model.name.lower()), None)
    if isinstance(ref, PathRef) and is_model(ref.path):
        return _row(name, ref.path, _size(ref.path), "converted")
    return None


def _row(name: str, path: Path, n_bytes: int, source: str) -> StoredModel:
    from mlxkv.store.info import summarize

    try:
        family, quantization, context = summarize(path)
    except MlxkvError:
        family, quantization, context = "?", "?", 0
    if not is_model(path):
        family, quantization = "-", "gguf"
    return StoredModel(name, path, family, n_bytes, quantization, context, source)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def plan_removal(name: str) -> Removal:
    """What `remove` would delete, and the bytes that would be free.

    Raises:
        UsageError: a path, an alias, or a name that leads out of the models folder.
        ModelNotFound: no such model here.
    """
    model = catalog.find(name)
    repo_name = REPO.fullmatch(name)
    if model is None and not NAME.fullmatch(name) and not repo_name:
        raise UsageError(
            f"rm takes a name that `mlxkv list` shows; got {name!r}. Delete a directory of your "
            "own yourself"
        )
    if (target := unaliased(name)) != name:
        raise UsageError(f"{name} is an alias of {target}: delete the alias, or name the model")
    root = models_dir()
    folders = [root / slug(model.name if model else name)]
    repo = None
    if repo_name and repo_name["wanted"] is None:
        # Of a repository all revisions go, of a revision only that.
        begins = (f"{name}/",) if repo_name["revision"] else (f"{name}/", f"{name}@")
        folders += [path for path, record in stored() if record.origin.startswith(begins)]
        repo = hub.plan_removal(repo_name["repo"], repo_name["revision"])
    folders = [path for path in folders if path.is_dir() and path.parent == root]
    folders = [path for path in folders if is_listed(path)]
    if not folders and repo is None:
        raise ModelNotFound(f"no model {name!r} is on this machine; `mlxkv list` lists what is")
    n_bytes = sum(_size(path) for path in folders if not path.is_symlink())
    return Removal(name, tuple(folders), repo, n_bytes + (repo.n_bytes if repo else 0))


def remove(name: str) -> int:
    """Deletes a model; the bytes freed.

    Raises:
        UsageError, ModelNotFound: as `plan_removal`.
        OutputError: a file cannot be deleted.
    """
    plan = plan_removal(name)
    for folder in plan.folders:
        doomed = folder.with_name(f".work-{folder.name}")
        try:
            if folder.is_symlink():
                folder.unlink()
                continue
            shutil.rmtree(doomed, ignore_errors=True)
            folder.replace(doomed)  # no longer a model, even if what follows fails
            shutil.rmtree(doomed)
        except OSError as error:
            raise OutputError(f"{folder}: {error.strerror}") from error
    if plan.repo is not None:
        try:
            plan.repo.execute()
        except OSError as error:
            raise OutputError(f"{error.filename or name}: {error.strerror}") from error
    return plan.n_bytes
