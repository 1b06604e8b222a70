"""Hugging Face repositories in huggingface_hub's own cache.

A complete snapshot is found by the cache's documented layout, without a request, whatever the
refs say: every run but the first needs no more. HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxkv.base import regular
from mlxkv.base.paths import holds
from mlxkv.checkpoint.gguf_names import first_parts, is_mmproj, parts_of
from mlxkv.errors import ModelNotFound, UsageError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model", "merges.txt")
_COMMIT = re.compile("[0-9a-f]{7,40}")
PART = ".mlxkv-part"
"""Ends the names of files that are not finished, among the cache's blobs."""
_SHORT = 12
"""Digits of a commit in a name."""


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A model in the cache, as `mlxkv list` shows it.

    Attributes:
        name: `org/name`, or `org/name@revision` of one that is not the default.
        snapshot: its folder.
        n_bytes: what `rm` of that name frees.
    """

    name: str
    snapshot: Path
    n_bytes: int


def full_name(repo_id: str, revision: str | None) -> str:
    """`org/name`, or `org/name@revision`."""
    return repo_id if revision is None else f"{repo_id}@{revision}"


def repo_folder(repo_id: str) -> Path:
    """A repository's folder in the cache, there or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def snapshots(repo_id: str, revision: str | None = None) -> list[Path]:
    """Folders of a repository's cached snapshots, complete or not, the likeliest first.

    Args:
        repo_id: `org/name`.
        revision: a branch, a tag, or a commit or its beginning: only that. Without, what `main`
            points to, and then the others that no ref names, the newest first: a pull that was
            interrupted leaves `main` at a snapshot that is not complete.
    """
    refs, folder = _refs(repo_id), repo_folder(repo_id) / "snapshots"
    try:
        found = {path.name: path for path in folder.iterdir() if path.is_dir()}
    except OSError:
        return []
    meant = found.get(refs.get(revision or "main", ""))
    if revision is not None:
        if meant is None and _COMMIT.fullmatch(revision):
            return [path for name, path in found.items() if name.startswith(revision)]
        return [] if meant is None else [meant]
    named = set(refs.values())
    others = [path for name, path in found.items() if name not in named]
    others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return others if meant is None else [meant, *others]


def _refs(repo_id: str) -> dict[str, str]:
    """Branches and tags of a repository that the cache knows, each with its commit."""
    root, found = repo_folder(repo_id) / "refs", dict[str, str]()
    if not holds(root.is_dir):
        return found
    for path in root.rglob("*"):
        with contextlib.suppress(OSError, ValueError):  # a folder, or damaged
            found[str(path.relative_to(root))] = path.read_text().strip()
    return found


def complete_revisions(repo_id: str) -> list[str]:
    """Branches and tags whose model is complete in the cache, as `org/name@revision`."""
    root, refs = repo_folder(repo_id) / "snapshots", _refs(repo_id)
    return [full_name(repo_id, ref) for ref in sorted(refs) if is_complete(root / refs[ref])]


def cached_snapshot(
    repo_id: str, revision: str | None = None, holds: Callable[[Path], bool] | None = None
) -> Path | None:
    """The first complete one of `snapshots`, else the first; None if there is none.

    Args:
        repo_id: `org/name`.
        revision: see `snapshots`.
        holds: whether a folder is complete; None for that of a model.
    """
    found, holds = snapshots(repo_id, revision), holds or _is_usable
    return next((path for path in found if holds(path)), found[0] if found else None)


def _is_usable(folder: Path) -> bool:
    return is_complete(folder) or bool(cached_gguf_files(folder))


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a config, a tokenizer, every shard of its weights and its modules."""
    tokenizers = (folder / name for name in _TOKENIZERS)
    if not (folder / "config.json").is_file() or not any(path.is_file() for path in tokenizers):
        return False
    if (folder / "modules.json").is_file():
        from mlxkv.checkpoint.sentence import missing_modules

        if missing_modules(folder):
            return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(regular.read_text(index))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # damaged, not missing: the loader says what is wrong with it
    return all((folder / str(shard)).is_file() for shard in shards)


def cached_gguf_files(folder: Path) -> list[str]:
    """Names of the GGUF files of language models in a snapshot."""
    found = (path for path in folder.rglob("*.gguf") if path.is_file() and not is_mmproj(path.name))
    return sorted(str(path.relative_to(folder)) for path in found)


def choose_gguf(repo_id: str, files: Sequence[str], wanted: str | None) -> str:
    """The one GGUF file that `wanted` (a file name or a quantization such as Q4_K_M) means.

    Files of encoders go with a language model's, and are not chosen from. The first part of a split
    model stands for all.

    Raises:
        ModelNotFound: none of the files fits.
        UsageError: more than one fits.
    """
    if wanted is not None and wanted in files:
        wanted = str(parts_of(Path(wanted))[0])
    files = [name for name in first_parts(files) if not is_mmproj(name)]
    if wanted is None:
        fitting = list(files)
    elif wanted in files:
        fitting = [wanted]
    else:
        fitting = [name for name in files if wanted.lower() in name.lower()]
    names = ", ".join(files) or "none"
    if not fitting:
        raise ModelNotFound(f"{repo_id}: no GGUF file fits {wanted!r}; it has: {names}")
    if len(fitting) > 1:
        raise UsageError(
            f"{repo_id} has {len(fitting)} GGUF files that fit; choose one, for example "
            f"{repo_id}:{fitting[0]} (it has: {', '.join(fitting)})"
        )
    return fitting[0]


def cached_repos(holds: Callable[[Path], bool] = _is_usable) -> list[CachedRepo]:
    """The models in the cache that mlxkv can read, or what else `holds` says is complete, each
    revision."""
    from huggingface_hub.constants import HF_HUB_CACHE

    found = []
    for folder in Path(HF_HUB_CACHE).glob("models--*/snapshots"):
        repo_id = folder.parent.name.removeprefix("models--").replace("--", "/")
        default = cached_snapshot(repo_id, holds=holds)
        refs = {commit: ref for ref, commit in sorted(_refs(repo_id).items(), reverse=True)}
        for snapshot in folder.iterdir():
            if not holds(snapshot):
                continue
            if snapshot == default:
                n_bytes = sum(map(_size, _contents(folder.parent)))
                found.append(CachedRepo(repo_id, snapshot, n_bytes))
            else:
                name = full_name(repo_id, refs.get(snapshot.name) or snapshot.name[:_SHORT])
                found.append(CachedRepo(name, snapshot, sum(map(_size, _own(snapshot)))))
    return sorted(found, key=lambda repo: repo.name.lower())


@dataclass(frozen=True, slots=True)
class Removal:
    """What is deleted of the cache.

    Attributes:
        folders: with all that is in them.
        files: beside those.
        n_bytes: that are free afterwards.
    """

    folders: tuple[Path, ...]
    files: tuple[Path, ...]
    n_bytes: int

    def execute(self) -> None:
        """Delete it; raises OSError where something cannot be deleted."""
        for file in self.files:
            file.unlink(missing_ok=True)
        for folder in self.folders:
            shutil.rmtree(folder)


def plan_removal(repo_id: str, revision: str | None = None) -> Removal | None:
    """What to delete of a repository, all of it or one revision; None if none of it is here."""
    repo = repo_folder(repo_id)
    if not holds(repo.is_dir):
        return None
    refs, doomed = _refs(repo_id), snapshots(repo_id, revision)
    if revision in refs and list(refs.values()).count(refs[revision]) > 1:
        return Removal((), (repo / "refs" / revision,), 0)  # another branch or tag has its snapshot
    is_all = bool(doomed) and len(doomed) == len(list((repo / "snapshots").iterdir()))
    if revision is None or is_all:
        locks = repo.parent / ".locks" / repo.name
        folders = (repo, locks) if locks.is_dir() else (repo,)
        return Removal(folders, (), sum(map(_size, _contents(repo))))
    if not doomed:
        return None
    blobs = {blob for snapshot in doomed for blob in _own(snapshot)}
    commits = {snapshot.name for snapshot in doomed}
    refs = [repo / "refs" / ref for ref, commit in refs.items() if commit in commits]
    return Removal(tuple(doomed), (*blobs, *refs), sum(map(_size, blobs)))


def _contents(repo: Path) -> list[Path]:
    """The files of a repository that hold bytes: blobs, and what no link stands for."""
    found = (path for name in ("blobs", "snapshots") for path in (repo / name).rglob("*"))
    return [path for path in found if path.is_file() and not path.is_symlink()]


def _own(snapshot: Path) -> set[Path]:
    """The contents of a snapshot that no other one has."""
    links = {
        folder: {path.resolve() for path in folder.rglob("*") if path.is_file()}
        for folder in snapshot.parent.iterdir()
    }
    mine = links.pop(snapshot)
    return mine.difference(*links.values())


def _size(file: Path) -> int:
    return file.lstat().st_size
