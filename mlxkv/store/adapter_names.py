"""Adapters by the names of requests: `model+adapter`, and `NAME` of one that is kept here.

A name in a request is never a path. It is one of `mlxkv adapters add`, or a repository in Hugging
Face's cache; `=WEIGHT` may stand behind it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlxkv.checkpoint.adapter import MLX_LM, PEFT, first_layer
from mlxkv.checkpoint.adapter_files import GGUF
from mlxkv.checkpoint.weights import read_header
from mlxkv.errors import CheckpointError, ModelNotFound, OutputError, UsageError, shortened
from mlxkv.store.adapters import (
    AdapterRef,
    StoredAdapter,
    cached,
    copy_files,
    is_keepable,
    is_of,
    is_there,
    kept,
    kept_dir,
    numbered,
    weighed,
)

if TYPE_CHECKING:
    from mlxkv.models.adapter_targets import Weighted

SIGN = "+"
MOST = 8
"""Adapters that a model's name, or a field of a request, may have."""
_BASES = "base_model_name_or_path", "model"


def split(name: str) -> tuple[str, tuple[str, ...]]:
    """A model's name, and those of adapters behind it; a path that is there has none."""
    return (name, ()) if is_there(name) else split_name(name)


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """`split` of what is no path."""
    model, *adapters = name.split(SIGN)
    return model, tuple(adapters)


def named(given: Sequence[str]) -> tuple[str, ...]:
    """Adapters that requests name, as `Request.adapter` takes them, by their paths.

    Raises:
        ModelNotFound: there is none of that name.
        UsageError: a weight that is no number, or too many.
    """
    check_number(len(given))
    found = []
    for text in given:
        name, weight = numbered(text)
        found.append(f"{find_named(name)}={weight!r}")
    return tuple(found)


def check_number(n: int, field: str = "adapter") -> None:
    """Raise UsageError where a field has more than `MOST` adapters."""
    if n > MOST:
        raise UsageError(f"may be {MOST} at most; got {n:,}", field=field)


def find_named(name: str) -> Path:
    """The directory, or .gguf file, of an adapter that a request names; raises as `named`."""
    try:
        return kept(name) or cached(name)
    except ModelNotFound:
        raise ModelNotFound(
            f"adapter {shortened(name)!r} not found: `mlxkv adapters ls` lists those that requests "
            "may name"
        ) from None


def add(name: str, ref: AdapterRef) -> Path:
    """Keep a copy of an adapter under a name that requests may use; its directory.

    Raises:
        UsageError: a name that is no folder's, or one that exists.
        OutputError: it cannot be written.
    """
    if not is_keepable(name):
        raise UsageError(f"an adapter's name has letters, digits, '.', '_' and '-'; got {name!r}")
    folder, work = kept_dir() / name, kept_dir() / f".work-{name}"
    if folder.exists():
        raise UsageError(f"adapter {name!r} exists already; `mlxkv adapters rm` removes it")
    try:
        shutil.rmtree(work, ignore_errors=True)
        copy_files(ref, work)
        work.replace(folder)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {error.strerror}") from error
    return folder


def shown(given: Sequence[str]) -> str:
    """What `named` has made, as requests spell it."""
    names = []
    for text in given:
        name, weight = weighed(text)
        path = Path(name)
        if "snapshots" in path.parts:
            name = path.parts[path.parts.index("snapshots") - 1].removeprefix("models--")
            name = name.replace("--", "/", 1)
        elif path.is_absolute():
            name = path.parent.name if path.suffix == GGUF else path.name
        names.append(name if weight == 1 else f"{name}={weight:g}")
    return SIGN.join(names)


def fitting(model_dir: Path, adapters: Sequence[StoredAdapter]) -> list[StoredAdapter]:
    """Adapters that name the model of a directory as their base."""
    return [each for each in adapters if (base := _base_of(each.path)) and is_of(base, model_dir)]


def first_changed(adapters: Sequence[Weighted], n_layers: int) -> int:
    """The first layer that adapters change of a model, see `checkpoint.adapter.first_layer`."""
    return first_layer([path for each in adapters for path in each.adapter.targets], n_layers)


def first_kept_layer(model_dir: Path, n_layers: int) -> int | None:
    """The first layer that adapters kept here for a model change; None where there are none.

    Only headers are read. What changes something before all layers, llama.cpp's adapters, and what
    cannot be read do not count.
    """
    folders = kept_dir().iterdir() if kept_dir().is_dir() else ()
    found = list[int]()
    for folder in folders:
        files = [file for name in (MLX_LM, PEFT) if (file := folder / name).is_file()]
        if not files or not is_of(_base_of(folder), model_dir):
            continue
        with suppress(CheckpointError):
            found.append(first_layer(read_header(files[0]), n_layers))
    return min((first for first in found if first), default=None)


def _base_of(path: Path) -> str:
    """The base that an adapter's config names; "" where it names none."""
    try:
        raw = json.loads((path / "adapter_config.json").read_text())
        found = [raw.get(key) for key in _BASES]
    except (OSError, ValueError, AttributeError):
        return ""
    return next((base for base in found if isinstance(base, str)), "")
