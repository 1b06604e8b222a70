"""The built kernels as a Python module; without them everything runs on MLX's own operations."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import subprocess
import threading
from pathlib import Path
from types import ModuleType

from mlxkv.base.paths import kernels_dir
from mlxkv.cpu import building
from mlxkv.cpu.toolchain import BuildError, is_supported, toolchain

SWITCH = "MLXKV_KERNELS"
"""`0` leaves the kernels out; `baseline`, `avx2`, `avx512` or `amx` names their instruction set."""
_NAME = "_mlxkv_cpu"


def library() -> ModuleType | None:
    """The kernels, if they are switched on, built and fit.

    Where they are only not built yet, a process behind this one's back builds them, for the next
    model that is loaded.
    """
    return _found()[0]


def look_again() -> None:
    """Look for the library anew, if there was none: it may have been built meanwhile."""
    if _found()[0] is None:
        _found.cache_clear()


def state() -> tuple[str, str]:
    """For people: what computes, and why it is not the kernels ("" if it is, or is meant to be)."""
    if not is_wanted():
        return "MLX's own" + (f" ({SWITCH}=0)" if is_supported() else ""), ""
    found, why = _found()
    if found is not None:
        return f"built ({found.use(_instruction_set())})", ""
    return ("MLX's own", why) if why else ("being built, MLX's own until then", "")


def is_wanted() -> bool:
    """Whether there are kernels for this system, and they are not switched off."""
    return is_supported() and os.environ.get(SWITCH, "") != "0"


def load(path: Path) -> ModuleType:
    """Load a built library.

    Raises:
        ImportError: it does not fit this MLX or Python.
    """
    import mlx.core  # noqa: F401  # brings the library that the kernels are linked against

    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    assert spec is not None, "there is a loader"
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def _found() -> tuple[ModuleType | None, str]:
    """The module, or why there is none; "" while it is built."""
    if not is_wanted():
        return None, ""
    path = building.built()
    if path is None:
        return None, _start_build()
    try:
        module = load(path)
        module.use(_instruction_set())
    except (ImportError, ValueError) as error:
        return None, str(error)
    with contextlib.suppress(OSError):
        path.touch()  # those used last stay: see `building.KEPT`
    return module, ""


def _instruction_set() -> str | None:
    """What the environment names; None for the best that this machine has."""
    name = os.environ.get(SWITCH, "")
    return None if name in ("", "1") else name


@functools.cache
def _start_build() -> str:
    """Start a build that outlives this process, once; why it cannot be, or ""."""
    try:
        if failed := building.failure(toolchain()):
            return f"they cannot be built here: {failed}"
        kernels_dir().mkdir(parents=True, exist_ok=True)
        if not os.access(kernels_dir(), os.W_OK):
            return f"{kernels_dir()} cannot be written; MLXKV_KERNELS_DIR names another folder"
        child = subprocess.Popen(
            building.python_command("mlxkv.cpu.building"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        threading.Thread(target=child.wait, name="mlxkv-kernels", daemon=True).start()
    except (BuildError, OSError, RuntimeError) as error:
        return str(error)
    return ""
