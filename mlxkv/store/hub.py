"""Hugging Face repositories, in huggingface_hub's own cache.

A complete repository is found by the cache's documented layout, without importing the client
and without a request: every run but the first needs no more. HF_HOME, HF_HUB_CACHE,
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxkv.base import regular
from mlxkv.base.disk import check_space
from mlxkv.checkpoint.gguf_names import first_parts, is_mmproj, parts_of
from mlxkv.errors import DownloadError, MlxkvError, ModelNotFound, OutputError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy, HFCacheInfo

WANTED = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
# Sub-folders hold other formats, but for additional_chat_templates and what modules.json names
# (`2_Dense`), which these patterns spare.
_FOLDERS = (
    "[!a0-9]*/*", "a/*", "a[!d]*/*", "ad/*", "ad[!d]*/*",
    "[0-9]/*", "[0-9][!_]*/*", "[0-9]_/*", "[0-9]_[!A-Z]*/*",
)  # fmt: skip
# Never code or pickles; `consolidated` holds the weights once more.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json")
IGNORED = (*_FOLDERS, "consolidated*", "*.bin", "*.py", "*.pth", "*.pt")


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A model repository in the cache.

    Attributes:
        repo_id: `org/name`.
        snapshot: folder of the revision that `main` points to.
        n_bytes: what the repository takes on the disk, all revisions together.
    """

    repo_id: str
    snapshot: Path
    n_bytes: int


def cached_snapshot(repo_id: str) -> Path | None:
    """The folder of the cached `main` revision, complete or not; None if there is none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repo = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    try:
        commit = (repo / "refs" / "main").read_text().strip()
    except OSError:
        return None
    folder = repo / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


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
    return sorted(path.name for path in folder.glob("*.gguf") if not is_mmproj(path.name))


def download(repo_id: str, *, quiet: bool = True) -> Path:
    """Fetch what the cache lacks of config, tokenizer and safetensors; the snapshot's folder.

    Raises:
        ModelNotFound: no such repository, or a private one.
        DownloadError: no network, a gated repository, or the hub answers with an error.
        OutputError: the disk is full.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    hush(quiet)
    check_room(
        repo_id,
        lambda names: filter_repo_objects(
            names, allow_patterns=list(WANTED), ignore_patterns=list(IGNORED)
        ),
    )
    try:
        folder = snapshot_download(
            repo_id, allow_patterns=list(WANTED), ignore_patterns=list(IGNORED)
        )
    except Exception as error:  # the HTTP client behind it differs from version to version
        raise translate(repo_id, error) from error
    return Path(folder)


def check_room(repo_id: str, choose: Callable[[list[str]], Iterable[str]]) -> None:
    """Raise OutputError where the cache's disk has no room for what is to be fetched.

    Args:
        repo_id: `org/name`.
        choose: of the names of all files those that are fetched.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        found = HfApi().model_info(repo_id, files_metadata=True).siblings or []
    except Exception:  # the download meets the same, and says what it was
        return
    sizes = {file.rfilename: file.size or 0 for file in found}
    here = cached_snapshot(repo_id)
    n_bytes = sum(
        sizes[name] for name in choose(list(sizes)) if here is None or not (here / name).exists()
    )
    advice = "make room, or set HF_HUB_CACHE to another disk"
    check_space(Path(constants.HF_HUB_CACHE), n_bytes, f"downloading {repo_id}", advice)


def list_gguf_files(repo_id: str) -> list[str]:
    """Names of the GGUF files of a repository, asked of the hub.

    Raises:
        ModelNotFound, DownloadError: as `download`.
    """
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repo_id)
    except Exception as error:
        raise translate(repo_id, error) from error
    return sorted(name for name in files if name.lower().endswith(".gguf"))


def download_gguf(repo_id: str, filename: str, *, quiet: bool = True) -> Path:
    """Fetch one GGUF file of a repository; its path in the cache.

    Raises:
        ModelNotFound, DownloadError, OutputError: as `download`.
    """
    from huggingface_hub import hf_hub_download

    hush(quiet)
    check_room(repo_id, lambda names: [name for name in names if name == filename])
    try:
        return Path(hf_hub_download(repo_id, filename))
    except Exception as error:
        raise translate(repo_id, error) from error


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


def cached_repos() -> list[CachedRepo]:
    """The model repositories in the cache that hold weights mlxkv can read."""
    cache, found = _scan(), []
    for repo in () if cache is None else cache.repos:
        if repo.repo_type != "model":
            continue
        snapshot = cached_snapshot(repo.repo_id)
        if snapshot and (is_complete(snapshot) or cached_gguf_files(snapshot)):
            found.append(CachedRepo(repo.repo_id, snapshot, repo.size_on_disk))
    return sorted(found, key=lambda repo: repo.repo_id.lower())


def plan_removal(repo_id: str) -> DeleteCacheStrategy | None:
    """Deletes all revisions when executed; None if the repository is not in the cache."""
    cache = _scan()
    if cache is None:
        return None
    for repo in cache.repos:
        if repo.repo_type == "model" and repo.repo_id == repo_id:
            # The client finds a revision by its commit alone, and a duplicated repository has the
            # commits of its original: leave only this one in what it sees.
            alone = dataclasses.replace(cache, repos=frozenset({repo}))
            return alone.delete_revisions(*(revision.commit_hash for revision in repo.revisions))
    return None


def _scan() -> HFCacheInfo | None:
    """What is in the cache; None if there is no cache."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, OSError):
        return None


def hush(quiet: bool = True) -> None:
    """Keep the client from logging and, if quiet, from drawing progress."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if quiet:
        disable_progress_bars()


def translate(repo_id: str, error: Exception) -> MlxkvError:
    """The client's exception as one of ours, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    host = constants.ENDPOINT
    match error:
        case MlxkvError():
            return error
        case GatedRepoError():  # before RepositoryNotFoundError, which is its base class
            return DownloadError(
                f"{repo_id} is gated: accept its terms at {host}/{repo_id}, then `hf auth login`"
            )
        case RepositoryNotFoundError():
            return ModelNotFound(
                f"no model {repo_id!r} at {host} (if it is private: `hf auth login`)"
            )
        case LocalEntryNotFoundError():  # before EntryNotFoundError, its base class
            if isinstance(error.__cause__, HfHubHTTPError):
                return translate(repo_id, error.__cause__)
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        case RevisionNotFoundError() | EntryNotFoundError():
            return ModelNotFound(f"{repo_id}: the hub has no such file or revision")
        case HFValidationError():
            return UsageError(f"{repo_id!r} is not the name of a Hugging Face repository")
        case HfHubHTTPError():
            status = error.response.status_code if error.response is not None else "an error"
            return DownloadError(f"cannot download {repo_id}: {host} answers {status}; try again")
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"no space left to download {repo_id}")
    if constants.HF_HUB_OFFLINE:
        return DownloadError(
            f"{repo_id} is not complete in the cache and HF_HUB_OFFLINE is set: unset it, then "
            f"`mlxkv pull {repo_id}`"
        )
    return DownloadError(
        f"cannot download {repo_id}: {host} cannot be reached ({type(error).__name__}). Check the "
        "network or HF_ENDPOINT, or run a model you have (`mlxkv list`)"
    )
