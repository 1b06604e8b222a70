"""What a model's name refers to, and the names in the models folder.

A name is a path, a name of the catalog, a directory of the models folder, an alias of one of these,
or a Hugging Face repository. Nothing here touches the network.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from mlxkv.base.paths import NAME, holds, is_listed, models_dir, slug
from mlxkv.checkpoint.mlxkv_json import Record, read_record
from mlxkv.errors import ModelNotFound, OutputError, UsageError
from mlxkv.store import catalog
from mlxkv.store.aliases import check_alias_spelling, stored_aliases, write_aliases
from mlxkv.store.catalog import CatalogModel

REPO = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>\w[\w-]*(?:[./][\w-]+)*))?"
    r"(?::(?P<wanted>[\w.-]+))?",
    re.ASCII,
)
"""`org/name`, with `@` and a branch, tag or commit, and `:` and a GGUF file or its quantization."""
_PATH_STARTS = ("/", "./", "../", "~")


@dataclass(frozen=True, slots=True)
class PathRef:
    """A directory or a .gguf file of the user's."""

    path: Path


@dataclass(frozen=True, slots=True)
class CatalogRef:
    """A built-in model."""

    model: CatalogModel


@dataclass(frozen=True, slots=True)
class StoredRef:
    """A directory in the models folder."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class HubRef:
    """A Hugging Face repository, or one GGUF file of it.

    Args:
        repo_id: `org/name`.
        wanted: a GGUF file's name, or a quantization.
        revision: a branch, tag or commit; None for the default branch.
    """

    repo_id: str
    wanted: str | None
    revision: str | None = None

    @classmethod
    def read(cls, name: str) -> HubRef | None:
        """What a name says; None where it names no repository."""
        found = REPO.fullmatch(name)
        return found and cls(found["repo"], found["wanted"], found["revision"])

    @property
    def repo(self) -> str:
        """`org/name`, or `org/name@revision`."""
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"

    @property
    def name(self) -> str:
        """As a user names it."""
        return self.repo if self.wanted is None else f"{self.repo}:{self.wanted}"


Ref = PathRef | CatalogRef | StoredRef | HubRef


def stored_folder(name: str) -> Path | None:
    """The folder of a model in the models folder; None if none has exactly this name."""
    folder = models_dir() / slug(name)
    return folder if is_model(folder) and is_listed(folder) else None


def check_spelling(name: str) -> None:
    """Refuse a new model's name that is an alias, or differs from a stored one's in case only.

    Raises:
        UsageError: it is or does.
    """
    if name in stored_aliases():
        raise UsageError(f"{name} is an alias; delete the alias first, or choose another name")
    wanted = slug(name)
    for folder, record in stored():
        if folder.name.lower() == wanted.lower() and folder.name != wanted:
            raise UsageError(
                f"model {name!r} would share a folder with {record.name!r} where case is ignored, "
                "as on most Macs; choose another name"
            )


def is_model(folder: Path) -> bool:
    """Whether a folder is a model directory."""
    return holds((folder / "config.json").is_file)


def unaliased(name: str) -> str:
    """The model's name that an alias stands for; any other name as it is.

    Raises:
        MlxkvError: the file of aliases is damaged.
    """
    return _alias(name) or name


def _alias(name: str) -> str | None:
    """The model of an alias; None for other names, and where a model has the name by now."""
    model = stored_aliases().get(name)
    return None if model is None or _is_model_name(name) else model


def _is_model_name(name: str) -> bool:
    """Whether a built-in model has a name, or a stored one."""
    return bool(catalog.find(name) or stored_folder(name)) or _is_cached(name)


def alias_target(name: str, model: str) -> str:
    """Check a new alias, and return the name of its model.

    Args:
        name: the alias.
        model: a name as for `locate`; an alias stands for its own model, a path is made absolute.

    Raises:
        UsageError: the name is none, or is that of a built-in or stored model.
        ModelNotFound: no such model.
    """
    check_alias_spelling(name)
    if catalog.find(name):
        raise UsageError(f"{name} is the name of a built-in model; choose another")
    if _is_model_name(name):
        raise UsageError(f"{name} is the name of a stored model; choose another")
    target = unaliased(model)
    ref = locate(target)
    if not isinstance(ref, PathRef):
        return target
    if not ref.path.exists():
        raise ModelNotFound(f"{ref.path}: no such file or directory")
    return str(ref.path.absolute())


def add_alias(name: str, model: str) -> str:
    """Give a model a further name, and return the model's; raises as `alias_target`.

    Raises:
        OutputError: it cannot be stored.
    """
    target = alias_target(name, model)
    if target == name:
        raise UsageError(f"{name} cannot stand for itself; delete the alias instead")
    write_aliases(stored_aliases() | {name: target})
    return target


def remove_alias(name: str) -> None:
    """Remove a stored alias.

    Raises:
        ModelNotFound: there is none of that name.
        OutputError: it cannot be removed.
    """
    aliases = stored_aliases()
    if name not in aliases:
        known = ", ".join(sorted(aliases)) or "none"
        raise ModelNotFound(f"no alias named {name!r}; aliases: {known}")
    write_aliases({key: model for key, model in aliases.items() if key != name})


def _is_cached(name: str) -> bool:
    """Whether a repository of this name is in the Hugging Face cache."""
    repo = REPO.fullmatch(name)
    if repo is None:
        return False
    from mlxkv.store import hub

    return hub.cached_snapshot(repo["repo"], repo["revision"]) is not None


def locate(name: str) -> Ref:
    """What a name refers to.

    A built-in or stored model goes before an alias, and both before a path, so that a folder in
    the current directory does not change what a name means; `./name` is always a path.

    Raises:
        ModelNotFound: nothing of that name.
        UsageError: an empty name.
    """
    if not name.strip():
        raise UsageError("the model's name is empty; `mlxkv list` lists what is here")
    if name.startswith(_PATH_STARTS):
        return PathRef(Path(name).expanduser())
    model = catalog.find(name)
    if model is not None:
        return CatalogRef(model)
    if NAME.fullmatch(name) or REPO.fullmatch(name):
        folder = stored_folder(name)
        if folder is not None:
            return StoredRef(name, folder)
    if (target := _alias(name)) is not None:
        return _locate_target(name, target)
    path = Path(name)
    if is_model(path) or (path.suffix == ".gguf" and holds(path.is_file)):
        return PathRef(path)
    repo, exists = HubRef.read(name), holds(path.exists)
    if repo and not exists:
        return repo
    if exists or name.endswith(".gguf") or "/" in name:
        return PathRef(path)
    raise ModelNotFound(f"no model named {name!r}{_did_you_mean(name)}")


def _locate_target(alias: str, target: str) -> Ref:
    if target in stored_aliases():
        raise ModelNotFound(f"alias {alias!r} names the alias {target!r}; give it a model")
    try:
        return locate(target)
    except ModelNotFound as error:
        raise ModelNotFound(f"alias {alias!r}: {error}") from None


def _did_you_mean(name: str) -> str:
    known = [model.name for model in catalog.CATALOG] + [record.name for _, record in stored()]
    known += stored_aliases()
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return (
        f". Known: {', '.join(sorted(set(known)))}; or give a path, or a Hugging Face repository "
        "as org/name or org/name@revision"
    )


def looks_like_model(text: str) -> bool:
    """Whether a single argument of `mlxkv run` is a model, not a prompt.

    Known names, paths that exist or are written as one (./, ../, /, ~, .gguf), `org/name` and
    `name:tag` do, and so do words that begin like the name of a family (`llama3.2`, `qwen3`).
    """
    if not text or any(c.isspace() for c in text):
        return False
    if text.startswith(_PATH_STARTS) or text.endswith(".gguf"):
        return True
    if is_model(Path(text)):
        return True
    text = text.partition("+")[0]  # adapters may stand behind it
    if catalog.find(text) or REPO.fullmatch(text):
        return True
    if text in stored_aliases():
        return True
    if not NAME.fullmatch(text):
        return False
    begins = ("llama", "mistral", "gemma", "smollm", "qwen", "phi-", "phi3", "phi4", "gpt-oss")
    begins += ("deepseek", "glm-", "glm4", "granite", "olmo")
    known = stored_folder(text) is not None
    return known or (":" in text and text[0].isalpha()) or text.lower().startswith(begins)


def stored() -> list[tuple[Path, Record]]:
    """The models folder's directories, each with its record."""
    try:
        folders = sorted(path for path in models_dir().iterdir() if not path.name.startswith("."))
    except OSError:
        return []
    found = []
    for folder in folders:
        if is_model(folder):
            record = read_record(folder) or Record(folder.name, "converted", "")
            found.append((folder, record))
    return found


def output_path(name: str) -> Path:
    """Where a converted model is written: a bare name means the models folder.

    Raises:
        UsageError: the name of a built-in model, one that differs from a stored model's in case
            only, or one that is no name.
    """
    if "/" in name or name in (".", "..") or name.startswith("~"):
        return Path(name).expanduser()
    if catalog.find(name):
        raise UsageError(
            f"{name!r} is the name of a built-in model; choose another", field="output"
        )
    if not NAME.fullmatch(name):
        raise UsageError(
            f"must be a path (./{name}) or a name of letters, digits, '.', '_' and '-'; got "
            f"{name!r}",
            field="output",
        )
    try:
        models_dir().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{models_dir()}: {error.strerror}") from error
    check_spelling(name)
    return models_dir() / slug(name)


def is_adapter_alone(path: Path) -> bool:
    """Whether a snapshot, or a GGUF file, is an adapter and no model."""
    from mlxkv.checkpoint.adapter_files import is_adapter

    if path.is_dir():
        return not is_model(path) and is_adapter(path)
    from mlxkv.convert.gguf.file import open_gguf  # pyright: ignore[reportMissingImports]

    return open_gguf(path).metadata.get("general.type") == "adapter"
