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
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from mlxkv.checkpoint.sentence import FILES, MODULES
from mlxkv.checkpoint.weights import (
    INDEX,
    MAX_HEADER_BYTES,
    TensorInfo,
    header_length,
    indexed_files,
    read_header,
    weight_files,
)
from mlxkv.errors import DownloadError, MlxkvError, ModelNotFound, OutputError
from mlxkv.store import hub
from mlxkv.store.hub_errors import translate
from mlxkv.store.hub_files import Listing, is_of_module, list_files, plain_weights
from mlxkv.store.resolve import needs_conversion

FIRST_BYTES = 100_000
"""Of each file's first request: most headers are shorter, and a second request costs more."""
_PARALLEL = 8
_DECIDING = ("g_idx", "weight_shape", "_scale", "_scale_2", "_scale_inv")
_OF_INPUTS = ("input_scale", "activation_scale", "input_global_scale", "k_scale", "v_scale")
"""Ends of the names of arrays whose values decide which format a matrix becomes, and of those that
do not."""
_SMALL = 128 << 10
_NEAR, _SPAN = 4 << 10, 4 << 20
"""Bytes between two small arrays that are fetched along, and of a request at most."""
_MOST_REQUESTS = 4000


@contextmanager
def headers_of(repo_id: str, revision: str | None = None) -> Iterator[Path]:
    """A temporary folder with a repository's config.json and the headers of its weights.

    Its safetensors files have the real length and are zero after the header. Of another quantizer's
    checkpoint they are those of what it is converted to. Errors in the block that name the folder
    name the repository instead.

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
        listing = list_files(repo_id, revision)
        _fill(Path(name), listing)
        yield _as_converted(Path(name), listing) if needs_conversion(Path(name)) else Path(name)


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
        whole = [*FILES, *(name for name in modules if name.endswith(".json"))]
        if MODULES in listing.files and "sentence_bert_config.json" not in listing.files:
            whole.append("tokenizer_config.json")  # says how long a text may be
        for name in ("config.json", "hf_quant_config.json", INDEX, *whole):
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


def _as_converted(folder: Path, listing: Listing) -> Path:
    """A folder with the headers of what another quantizer's checkpoint is converted to."""
    from mlxkv.convert import convert  # pyright: ignore[reportMissingImports]
    from mlxkv.convert.write import write_headers  # pyright: ignore[reportMissingImports]

    spans = _spans(
        info
        for path in folder.glob("*.safetensors")
        for name, info in read_header(path).items()
        if _decides(name) and info.nbytes <= _SMALL
    )
    if len(spans) > _MOST_REQUESTS:
        raise DownloadError(
            f"{listing.name} has small arrays in {len(spans):,} places that decide what its "
            f"weights become: `mlxkv pull {listing.name}`, then plan it"
        )
    try:
        with ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(lambda span: _fetch_span(listing, *span), spans))
    except Exception as error:  # the HTTP client behind it differs from version to version
        raise translate(listing.repo_id, error, listing.revision) from error
    converted = folder / "converted"
    plan = convert(folder, converted, dry_run=True).plan
    converted.mkdir()
    write_headers(plan, converted)
    return converted


def _decides(name: str) -> bool:
    """Whether an array's values decide which format a matrix becomes."""
    return "quant_state" in name or (name.endswith(_DECIDING) and not name.endswith(_OF_INPUTS))


def _spans(infos: Iterable[TensorInfo]) -> list[tuple[Path, int, int]]:
    """Parts of files that hold these arrays, neighbours in one: file, first byte and end.

    Files list arrays by dtype, so that single scales of thousands of matrices are neighbours.
    """
    found: list[tuple[Path, int, int]] = []
    for info in sorted(infos, key=lambda info: (info.file, info.offset)):
        end = info.offset + info.nbytes
        file, start, last = found[-1] if found else (None, 0, 0)
        if file == info.file and info.offset - last <= _NEAR and end - start <= _SPAN:
            found[-1] = (info.file, start, end)
        else:
            found.append((info.file, info.offset, end))
    return found


def _fetch_span(listing: Listing, file: Path, start: int, stop: int) -> None:
    """Write a part of a repository's file at its place in the file that stands for it."""
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(_range(listing, file.name, start, stop - start))


def _fetch_start(listing: Listing, name: str, path: Path, n_bytes: int) -> None:
    """Write the first bytes of a repository's file, and read little more than those."""
    path.write_bytes(_range(listing, name, 0, n_bytes) if n_bytes else b"")


def _range(listing: Listing, name: str, start: int, n_bytes: int) -> bytes:
    """Bytes of a repository's file; of a server that ignores ranges the first ones alone."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(listing.repo_id, name, revision=listing.commit)
    wanted = {"Range": f"bytes={start}-{start + n_bytes - 1}", "Accept-Encoding": "identity"}
    headers = build_hf_headers() | wanted
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    found = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:
            raise DownloadError(
                f"{constants.ENDPOINT} sends no parts of files: pull {listing.name}, then plan it"
            )
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) > n_bytes:  # the server ignores the range: the weights are on their way
                break
    if len(found) < n_bytes:
        missing = n_bytes - len(found)
        raise DownloadError(
            f"cannot download {listing.name}: {name} ended {missing:,} bytes early; try again"
        )
    return bytes(found[:n_bytes])
