"""What a Hugging Face repository has, asked of the hub, and which of it a model needs.

Without a network the first request ends within `CONNECT_S`; the client alone would try for 23 s.
"""

from __future__ import annotations

import queue
import re
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from mlxkv.checkpoint.gguf_names import is_gguf, parts_of
from mlxkv.checkpoint.sentence import FOLDER
from mlxkv.checkpoint.weights import INDEX
from mlxkv.errors import DownloadError, ModelNotFound
from mlxkv.store import hub
from mlxkv.store.hub_errors import hush, translate

CONNECT_S = 3.0
"""Until a hub that gives no sign counts as unreachable."""
_TEMPLATES = "additional_chat_templates"
_TEXT_FILES = ("tokenizer.model", "tiktoken.model", "merges.txt")
_NOT_NEEDED = ("trainer_state.json",)
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository.

    Args:
        name: its path there.
        n_bytes: None where the hub does not tell.
        key: what the hub calls its content, SHA-256 of large files; None where it does not tell.
    """

    name: str
    n_bytes: int | None
    key: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit.

    Args:
        revision: that was asked for; None for the default one.
        files: by name.
    """

    repo_id: str
    revision: str | None
    commit: str
    files: Mapping[str, HubFile]

    @property
    def name(self) -> str:
        """`org/name`, or `org/name@revision`."""
        return hub.full_name(self.repo_id, self.revision)

    @property
    def gguf(self) -> list[str]:
        """Names of the GGUF files."""
        return sorted(name for name in self.files if is_gguf(name))

    def nothing_to_read(self) -> ModelNotFound:
        """The error for a repository with neither safetensors nor GGUF files."""
        text = f"{self.name} holds neither safetensors nor GGUF files, which are what mlxkv reads"
        if any(name.endswith((".bin", ".pth", ".pt")) for name in self.files):
            text += "; its weights are pickled, which could run code: look for another upload"
        return ModelNotFound(text)


def list_files(repo_id: str, revision: str | None = None) -> Listing:
    """Ask the hub for the files of a repository.

    Args:
        repo_id: `org/name`.
        revision: a branch, tag or commit; None for the default branch.

    Raises:
        ModelNotFound: no such repository or revision, or a private one.
        DownloadError: no network, or the hub answers with an error.
    """
    from huggingface_hub import HfApi, constants

    hush()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        check_reachable(constants.ENDPOINT, offline=constants.HF_HUB_OFFLINE)
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
    except Exception as error:  # the HTTP client behind it differs from version to version
        raise translate(repo_id, error, revision) from error
    if not info.sha or not _KEY.fullmatch(info.sha):
        raise DownloadError(f"{constants.ENDPOINT} does not say which commit of {repo_id} it has")
    files = (_file(sibling) for sibling in info.siblings or ())
    safe = {file.name: file for file in files if _is_inside(file.name)}
    return Listing(repo_id, revision, info.sha, safe)


def _file(sibling: Any) -> HubFile:
    lfs = getattr(sibling, "lfs", None)
    key = getattr(lfs, "sha256", None) or getattr(sibling, "blob_id", None)
    size = sibling.size
    known = isinstance(size, int) and 0 <= size < 2**63
    return HubFile(sibling.rfilename, size if known else None, checked_key(key))


def checked_key(key: object) -> str | None:
    """A key that can name a file; None for others."""
    return key if isinstance(key, str) and _KEY.fullmatch(key) else None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and path.parts != () and ".." not in path.parts


def small_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that a checkpoint needs beside its weights.

    Never code or pickles. Sub-folders hold other formats, but for further chat templates and an
    embedding model's modules.
    """
    return [name for name in names if _is_small(name)]


def _is_small(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    if is_of_module(name):
        return base.endswith((".json", ".safetensors"))
    if folder:
        return folder == _TEMPLATES and base.endswith(".jinja")
    if base in _NOT_NEEDED or (base.endswith(".index.json") and base != INDEX):
        return False
    return base.endswith((".json", ".jinja")) or base in _TEXT_FILES


def is_of_module(name: str) -> bool:
    """Whether a file lies in the folder of an embedding model's module (`2_Dense`)."""
    folder, _, base = name.partition("/")
    return FOLDER.fullmatch(folder) is not None and base != "" and "/" not in base


def plain_weights(names: Iterable[str]) -> list[str]:
    """The safetensors files of a repository, those left out that hold the weights once more."""
    found = [
        name
        for name in names
        if name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")
    ]
    whole = [name for name in found if name == "model.safetensors"]
    if whole and INDEX not in names:
        return whole
    return found


def gguf_and_encoders(listing: Listing, wanted: str | None) -> list[str]:
    """The parts of the GGUF file that `wanted` means, the first one first, and its encoders.

    Raises:
        ModelNotFound, UsageError: as `hub.choose_gguf`.
    """
    from mlxkv.checkpoint.gguf_names import is_mmproj

    if not listing.gguf:
        raise listing.nothing_to_read()
    chosen = hub.choose_gguf(listing.name, listing.gguf, wanted)
    parts = [str(part) for part in parts_of(PurePosixPath(chosen))]
    missing = [part for part in parts if part not in listing.files]
    if missing:
        raise ModelNotFound(f"{listing.name}: {missing[0]}, a part of {chosen}, is not there")
    encoders = [name for name in listing.gguf if is_mmproj(name)]
    return parts + (encoders if len(encoders) == 1 else [])


def check_reachable(endpoint: str, *, offline: bool = False) -> None:
    """Connect to a hub, or to the proxy before it, within `CONNECT_S`, name resolution included.

    Args:
        endpoint: its address.
        offline: do nothing; the client refuses every request.

    Raises:
        OSError: it cannot be reached.
    """
    if offline:
        return
    host, port = _next_host(endpoint)
    came: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection((host, port), CONNECT_S).close()
            came.put(None)
        except Exception as error:
            came.put(error)

    # A thread, because resolving a name knows no timeout.
    threading.Thread(target=connect, daemon=True).start()
    try:
        error = came.get(timeout=CONNECT_S)
    except queue.Empty:
        raise TimeoutError(f"no answer from {host}") from None
    if error is not None:
        raise error


def _next_host(endpoint: str) -> tuple[str, int]:
    """The host that is connected to: the hub's, or that of a proxy."""
    url = urlsplit(endpoint)
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    default = {"http": 80, "socks5": 1080, "socks5h": 1080}.get(url.scheme, 443)
    return url.hostname or "", url.port or default
