"""Folders and file names: where models and KV lie, and how a name becomes a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(:[A-Za-z0-9][A-Za-z0-9._-]*)?")


def models_dir() -> Path:
    """The models folder: MLXKV_MODELS, else `mlxkv/models` in the user's cache folder."""
    return _folder("MLXKV_MODELS", "models")


def kv_dir() -> Path:
    """Where KV is kept on disk: MLXKV_KV, else `mlxkv/kv` in the user's cache folder."""
    return _folder("MLXKV_KV", "kv")


def asleep_dir() -> Path | None:
    """Where answers are put away: with the KV; None where KV on disk is switched off."""
    is_off = os.environ.get("MLXKV_KV_DISK", "").strip() == "0"
    return None if is_off else kv_dir() / "asleep"


def kernels_dir() -> Path:
    """Where the built kernels of the CPU backend lie: MLXKV_KERNELS_DIR, else `mlxkv/cpu` in the
    user's cache folder.
    """
    return _folder("MLXKV_KERNELS_DIR", "cpu")


def logs_dir() -> Path:
    """Where logs of servers lie that mlxkv starts itself."""
    return cache_dir() / "logs"


def _folder(variable: str, name: str) -> Path:
    chosen = os.environ.get(variable)
    return Path(chosen).expanduser().absolute() if chosen else cache_dir() / name


def cache_dir() -> Path:
    """The folder `mlxkv` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    return base / "mlxkv"


def slug(name: str) -> str:
    """The folder's name for a model's name: a colon does not go well in file names."""
    return name.replace("/", "--").replace(":", "--" if "/" in name else "-")


def is_listed(path: Path) -> bool:
    """Whether a file or folder is spelled exactly so where it lies.

    A file system that ignores case (APFS as macOS formats it) opens `book` for `BOOK`.
    """
    try:
        return path.name in os.listdir(path.parent)  # noqa: PTH208
    except OSError:
        return False


def holds(test: Callable[[], bool]) -> bool:
    """What a path's `is_file` or the like says; False where the system takes no such long name."""
    try:
        return test()
    except OSError:
        return False
