"""Adapters by name: where they lie, those that are here, and reading them for a model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxkv.base.paths import NAME, holds, models_dir
from mlxkv.checkpoint.adapter import MLX_LM, PEFT, Adapter
from mlxkv.checkpoint.adapter_files import FILES, GGUF, is_adapter
from mlxkv.checkpoint.config import read_config
from mlxkv.checkpoint.mlxkv_json import read_record
from mlxkv.errors import ModelNotFound, OutputError, UsageError
from mlxkv.store import hub
from mlxkv.store.refs import REPO, HubRef

if TYPE_CHECKING:
    from mlxkv.models import Family
    from mlxkv.models.adapter_targets import Weighted

OWN = "adapters"
"""In a model's directory: a folder for each adapter that it is always loaded with, `000=WEIGHT`."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter on this machine.

    Args:
        path: its directory, or .gguf file.
        weight: its change is multiplied by this.
    """

    path: Path
    weight: float = 1.0

    @property
    def files(self) -> list[Path]:
        """The files that it is read from."""
        if self.path.suffix == GGUF:
            return [self.path]
        return [file for name in FILES if (file := self.path / name).is_file()]

    @property
    def n_bytes(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self.files)


ModelAdapters = Mapping[str, Sequence[AdapterRef]]
"""A model's directory -> the adapters that it is loaded with."""


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """One line of `mlxkv adapters ls`; `size_bytes` is what `rm` frees."""

    name: str
    path: Path
    size_bytes: int


def adapter_refs(
    given: str | Path | Sequence[str | Path] | None, *, fetch: bool = True
) -> list[AdapterRef]:
    """Find adapters, fetched first if need be.

    Args:
        given: each a path or a Hugging Face repository, which may end in "=WEIGHT".
        fetch: whether the network may be used.

    Raises:
        UsageError: a weight that is no number.
        ModelNotFound, DownloadError: there is no such adapter.
    """
    if given is None:
        return []
    each = [given] if isinstance(given, str | Path) else given
    found = [weighed(str(text)) for text in each]
    return [AdapterRef(find(name, fetch=fetch), weight) for name, weight in found]


def weighed(text: str) -> tuple[str, float]:
    """An adapter's name, and its weight; a path that is there has none behind it.

    Raises:
        UsageError: a weight that is no number.
    """
    return (text, 1.0) if is_there(text) else numbered(text)


def numbered(text: str) -> tuple[str, float]:
    """`weighed` of what is no path."""
    name, sign, number = text.rpartition("=")
    if not sign:
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    if not abs(weight) < float("inf"):
        raise UsageError(f"must end in a number behind '='; got {text!r}", field="adapter")
    return name, weight


def is_there(text: str) -> bool:
    """Whether a text is a path at which there is something."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # the home of a user that is not known
        return False
    return holds(path.exists)


def kept_dir() -> Path:
    """Where adapters are kept under names of their own, see `adapter_names.add`."""
    return models_dir() / ".adapters"


def kept(name: str) -> Path | None:
    """The directory, or .gguf file, of an adapter that is kept there; None if there is none."""
    if not is_keepable(name):
        return None
    path = _in_folder(kept_dir() / name)
    return path if path.suffix == GGUF or is_adapter(path) else None


def is_keepable(name: str) -> bool:
    """Whether an adapter may be kept under a name."""
    return NAME.fullmatch(name) is not None and ":" not in name


def _in_folder(folder: Path) -> Path:
    """The adapter that was copied into a folder: its .gguf file, or the folder."""
    return next(folder.glob(f"*{GGUF}"), folder)


def find(name: str, *, fetch: bool = True) -> Path:
    """The directory, or .gguf file, of an adapter.

    Args:
        name: a path, a name of `adapter_names.add`, or a Hugging Face repository as for models:
            `org/name@revision:file.gguf`.
        fetch: whether the network may be used.

    Raises:
        ModelNotFound: nothing of that name, or no adapter.
        DownloadError, OutputError: it cannot be fetched.
    """
    if is_there(name):
        path = Path(name).expanduser()
        path = path.parent if path.name in FILES else path
        if path.suffix != GGUF and not is_adapter(path):
            raise ModelNotFound(f"{path} holds no adapter ({MLX_LM} or {PEFT})")
        return path.absolute()
    if (here := kept(name)) is not None:
        return here
    ref = HubRef.read(name)
    if ref is None:
        raise ModelNotFound(f"{name}: no such adapter; name a directory, a .gguf file or org/name")
    found = _cached(ref)
    if found is None and not fetch:
        raise ModelNotFound(f"{name} is not here; a model that is loaded with it fetches it")
    return _fetch(ref) if found is None else found


def cached(name: str) -> Path:
    """The directory, or .gguf file, of an adapter in Hugging Face's cache: no path is one.

    Raises:
        ModelNotFound: it is not there.
    """
    ref = HubRef.read(name)
    found = ref and _cached(ref)
    if not found:
        raise ModelNotFound(f"no adapter {name!r} is in Hugging Face's cache; name it as org/name")
    return found


def own_adapters(model_dir: Path) -> list[AdapterRef]:
    """The adapters that a model's directory has itself, see `derive`."""
    folder, found = model_dir / OWN, list[AdapterRef]()
    for each in sorted(folder.iterdir()) if folder.is_dir() else ():
        number, _, weight = each.name.partition("=")
        if not number.isdecimal():
            continue
        found.append(AdapterRef(_in_folder(each), float(weight)))
    return found


def key_of_own(model_dir: Path) -> str:
    """What `nn.model.CausalLM.adapter_key` is with `own_adapters` alone."""
    from mlxkv.models.adapters import Weighted, key_of

    return key_of([Weighted(read(ref.path), ref.weight) for ref in own_adapters(model_dir)])


def keep(refs: Sequence[AdapterRef], model_dir: Path) -> None:
    """Copy adapters into a model's directory, behind those that it has.

    Raises:
        CheckpointError: one that does not fit the model.
    """
    from mlxkv.models.adapter_targets import Changes
    from mlxkv.models.loader import lay_out

    layout = lay_out(model_dir)
    for each in read_adapters(refs, layout.checkpoint.raw):
        list(Changes(layout.model, layout.checkpoint.family, each))
    first = len(own_adapters(model_dir))
    for i, ref in enumerate(refs, first):
        copy_files(ref, model_dir / OWN / f"{i:03d}={ref.weight!r}")


def copy_files(ref: AdapterRef, folder: Path) -> None:
    """Copy an adapter's files into a new folder; raises OSError."""
    folder.mkdir(parents=True)
    for file in ref.files:
        shutil.copyfile(file, folder / file.name)


def _cached(ref: HubRef) -> Path | None:
    for snapshot in hub.snapshots(ref.repo_id, ref.revision):
        if ref.wanted is None and is_adapter(snapshot):
            return snapshot
        fitting = [x for x in hub.cached_gguf_files(snapshot) if (ref.wanted or "/") in x]
        if len(fitting) == 1:
            return snapshot / fitting[0]
    return None


def _fetch(ref: HubRef) -> Path:
    from mlxkv.store.hub_fetch import fetch
    from mlxkv.store.hub_files import list_files
    from mlxkv.store.resolve import silent

    listing = list_files(ref.repo_id, ref.revision)
    if ref.wanted is not None:
        file = hub.choose_gguf(ref.repo_id, listing.gguf, ref.wanted)
        return fetch(listing, [file], silent) / file
    names = [name for name in FILES if name in listing.files]
    if not {MLX_LM, PEFT} & set(names):
        raise ModelNotFound(f"{ref.repo_id} holds no adapter ({MLX_LM} or {PEFT})")
    return fetch(listing, names, silent)


def stamp_of(refs: Sequence[AdapterRef]) -> str:
    """A hash of adapters' weights and their files' names, sizes and times; "" for none."""
    if not refs:
        return ""
    found = [
        [ref.weight, *([str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats)]
        for ref in refs
        for stats in [[(file, file.stat()) for file in ref.files]]
    ]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def read_adapters(refs: Sequence[AdapterRef], config: Mapping[str, Any]) -> list[Weighted]:
    """Read adapters for the model of this config.json, their arrays lazy.

    Raises:
        CheckpointError: one is damaged, or asks for what is not supported.
    """
    if not refs:
        return []
    from mlxkv.convert.adapter import read_adapter  # pyright: ignore[reportMissingImports]
    from mlxkv.models.adapter_targets import Weighted

    return [Weighted(read_adapter(ref.path, config), ref.weight) for ref in refs]


def read_for(refs: Sequence[AdapterRef], model_dir: Path) -> tuple[Family, list[Weighted]]:
    """A model's family, and adapters read for it; raises as `read_adapters`."""
    from mlxkv.models import family_for

    raw = read_config(model_dir)
    return family_for(raw, str(model_dir / "config.json")), read_adapters(refs, raw)


def other_bases(adapters: Sequence[Weighted], model_dir: Path) -> list[str]:
    """Adapters that by their names are of another model, each in a sentence.

    A copy may have more in its name, such as its quantization. Only names of repositories count.
    """
    if (model := _repo_of(model_dir)) is None:
        return []
    return [
        f"{adapter.source} was trained on {adapter.base}; this model is {model}"
        for adapter in (each.adapter for each in adapters)
        if REPO.fullmatch(adapter.base) and not is_of(adapter.base, model_dir)
    ]


def is_of(base: str, model_dir: Path) -> bool:
    """Whether a base that an adapter names is a model's, by their names."""
    ours, theirs = (
        _plain(name.rpartition("/")[2]) for name in (_repo_of(model_dir) or model_dir.name, base)
    )
    return bool(theirs) and (theirs in ours or ours in theirs)


def _repo_of(model_dir: Path) -> str | None:
    """The repository that a model's directory came from; None where that is not known."""
    if (record := read_record(model_dir)) is not None:
        match = REPO.match(record.origin)
        return match["repo"] if match and record.source == "hub" else None
    folder = model_dir.parent.parent.name
    return folder.removeprefix("models--").replace("--", "/") if "models--" in folder else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read(path: Path) -> Adapter:
    """Read an adapter from `find` to show it; raises as `read_adapters`."""
    from mlxkv.convert.adapter import read_adapter  # pyright: ignore[reportMissingImports]

    return read_adapter(path)


def stored_adapters() -> list[StoredAdapter]:
    """The adapters that are kept under names, and those in Hugging Face's cache."""
    folders = sorted(kept_dir().iterdir()) if kept_dir().is_dir() else ()
    own = [(each.name, path) for each in folders if (path := kept(each.name)) is not None]
    return [StoredAdapter(name, path, AdapterRef(path).n_bytes) for name, path in own] + [
        StoredAdapter(repo.name, repo.snapshot, repo.n_bytes)
        for repo in hub.cached_repos(is_adapter)
    ]


def remove(name: str) -> int:
    """Delete an adapter that is kept here or in Hugging Face's cache; the bytes freed.

    Raises:
        UsageError: a path, which is the user's own.
        ModelNotFound: it is not there.
        OutputError: it cannot be deleted.
    """
    if (path := kept(name)) is not None:
        n_bytes = AdapterRef(path).n_bytes
        _deleted(lambda: shutil.rmtree(kept_dir() / name))
        return n_bytes
    ref = HubRef.read(name)
    if ref is None or is_there(name):
        raise UsageError(f"rm takes a name that `mlxkv adapters ls` shows; got {name!r}")
    plan = None
    if any(each.name == name for each in stored_adapters()):
        plan = hub.plan_removal(ref.repo_id, ref.revision)
    if plan is None:
        raise ModelNotFound(f"no adapter {name!r} is here; `mlxkv adapters ls` lists what is")
    _deleted(plan.execute)
    return plan.n_bytes


def _deleted(delete: Callable[[], object]) -> None:
    """Delete something; OutputError where that fails."""
    try:
        delete()
    except OSError as error:
        raise OutputError(f"{error.filename}: {error.strerror}") from error
