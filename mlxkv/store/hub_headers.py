"""What a plan needs of a Hugging Face repository that is not on this machine: all but its weights.

A safetensors file begins with a header that names every tensor's dtype and shape: kilobytes of
gigabytes. The headers are fetched by HTTP range into a temporary folder, as sparse files of the
real length, so that the code that reads a model directory's headers can read these.

Invariants:
- Nothing goes into huggingface_hub's cache, where half a snapshot might pass for a whole one.
- Little more than a file's header is read, even from a server that ignores ranges and sends all.
- Files are named by the repository's list, without folders but for those of an embedding model's
  modules, and never by what is in a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from mlxkv.checkpoint.sentence import MODULES
from mlxkv.checkpoint.weights import (
    INDEX,
    MAX_HEADER_BYTES,
    header_length,
    indexed_files,
    weight_files,
)
from mlxkv.errors import DownloadError, MlxkvError, ModelNotFound, OutputError
from mlxkv.store import hub
from mlxkv.store.hub_errors import translate
from mlxkv.store.hub_files import Listing, is_of_module, list_files, plain_weights

FIRST_BYTES = 100_000
"""Of each file's first request: most headers are shorter, and a second request costs more."""
_PARALLEL = 8


@contextmanager
def headers_of(repo_id: str, revision: str | None = None) -> Iterator[Path]:
    """A temporary folder with a repository's config.json and the headers of its weights.

    Its safetensors files have the real length and are zero after the header. Errors in the block
    that name the folder name the repository instead.

    Raises:
        ModelNotFound: no such repository, or no safetensors in it.
        DownloadError: no network, a gated repository, or the hub answers with an error.
        CheckpointError: an index or a header that lies.
        OutputError: no room for a temporary folder.
    """
    try:
        temporary = TemporaryDirectory(prefix="mlxkv-plan-")
    except OSError as error:
        raise OutputError(f"no temporary folder ({error.strerror}); set TMPDIR") from error
    with temporary as name, _naming(hub.full_name(repo_id, revision), Path(name)):
        _fill(Path(name), list_files(repo_id, revision))
        yield Path(name)


@contextmanager
def _naming(repo_id: str, folder: Path) -> Iterator[None]:
    """Errors about a file of the folder name the repository, which is what the user knows."""
    try:
        yield
    except MlxkvError as error:
        if str(folder) not in str(error):
            raise
        raise type(error)(str(error).replace(str(folder), repo_id)) from error


def _fill(folder: Path, listing: Listing) -> None:
    found = plain_weights(listing.files)
    if not found:
        raise _without_safetensors(listing)
    try:
        modules = [name for name in listing.files if is_of_module(name)]
        for name in modules:
            (folder / name).parent.mkdir(exist_ok=True)
        whole = [MODULES, *(name for name in modules if name.endswith(".json"))]
        for name in ("config.json", INDEX, *(whole if modules else ())):
            if name in listing.files:
                size = min(_size(listing, name), MAX_HEADER_BYTES)
                _fetch_start(listing, name, folder / name, size)
        index = folder / INDEX
        names = indexed_files(index) if index.exists() else weight_files(found)
        # One that the index names and the repository lacks is for `open_weights` to report.
        needed = [name for name in names if name in listing.files]
        needed += [name for name in modules if name.endswith(".safetensors")]
        with ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(lambda name: _stand_in(listing, name, folder / name), needed))
    except Exception as error:  # the HTTP client behind it differs from version to version
        raise translate(listing.repo_id, error, listing.revision) from error


def _size(listing: Listing, name: str) -> int:
    from huggingface_hub import constants

    size = listing.files[name].n_bytes
    if size is None:
        raise DownloadError(
            f"{constants.ENDPOINT} does not say how long {listing.name}/{name} is: pull it, then "
            "plan it"
        )
    return size


def _without_safetensors(listing: Listing) -> ModelNotFound:
    if not listing.gguf:
        return listing.nothing_to_read()
    first = listing.gguf[0].rpartition("/")[2]
    return ModelNotFound(
        f"{listing.name} holds GGUF files only, which have to be here to be planned: fetch one "
        f"first (`mlxkv pull {listing.name}:{first}`), then plan it by that name"
    )


def _stand_in(listing: Listing, name: str, path: Path) -> None:
    """A sparse file with the header of the repository's file of that name, and as long."""
    size = _size(listing, name)
    first = min(FIRST_BYTES, size)
    _fetch_start(listing, name, path, first)
    with path.open("rb") as file:
        end = 8 + header_length(file.read(8), size, path)
    if end > first:
        _fetch_start(listing, name, path, end)
    try:
        os.truncate(path, end)
        os.truncate(path, size)
    except OSError as error:
        raise OutputError(
            f"{gettempdir()} takes no sparse file of {size:,} bytes ({error.strerror}); set TMPDIR "
            "to a folder of another disk"
        ) from error


def _fetch_start(listing: Listing, name: str, path: Path, n_bytes: int) -> None:
    """Write the first bytes of a repository's file, and read little more than those."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if not n_bytes:  # which no range can say
        path.touch()
        return
    url = hf_hub_url(listing.repo_id, name, revision=listing.commit)
    wanted = {"Range": f"bytes=0-{n_bytes - 1}", "Accept-Encoding": "identity"}
    headers = build_hf_headers() | wanted
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    missing = n_bytes
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        with path.open("wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk[:missing])
                missing -= len(chunk)
                if missing < 0:  # the server ignores the range: the weights are on their way
                    break
    if missing > 0:
        raise DownloadError(
            f"cannot download {listing.name}: {name} ended {missing:,} bytes early; try again"
        )
