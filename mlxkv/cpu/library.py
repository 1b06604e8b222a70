"""The built kernels as a Python module; without them everything runs on MLX's own operations."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from types import ModuleType

from mlxkv.cpu import building
from mlxkv.cpu.building import BuildError

SWITCH = "MLXKV_KERNELS"
"""`1` has the kernels used where they can be; `baseline`, `avx2` or `avx512` names their instruction
set. They are left out by default, until `plan` and the budget count their scratch memory."""


def library() -> ModuleType | None:
    """The kernels, if they are built and fit; else they are built behind this process's back, for
    the next one.
    """
    return _loaded()[0]


def state() -> tuple[str, str]:
    """For `mlxkv doctor`: what runs, and what to do for the kernels ("" if nothing)."""
    if not is_wanted():
        return f"MLX's own ({SWITCH}=1 for faster ones)" if sys.platform == "linux" else "MLX's own", ""
    found, why = _loaded()
    if found is not None:
        return f"built ({found.use(_named())})", ""
    try:
        building.toolchain()
    except BuildError as error:
        return "MLX's own", str(error)
    if why:
        return "MLX's own", why
    return "being built", ""


def is_wanted() -> bool:
    """Whether this system has kernels, and they are switched on."""
    return sys.platform == "linux" and os.environ.get(SWITCH, "0") not in ("", "0")


@functools.cache
def _loaded() -> tuple[ModuleType | None, str]:
    """The module, or why there is none."""
    if not is_wanted():
        return None, ""
    path = building.built()
    if path is None:
        return None, _build_aside()
    try:
        import mlx.core  # noqa: F401  # brings the library that the kernels are linked against

        loader = importlib.machinery.ExtensionFileLoader("_mlxkv_cpu", str(path))
        spec = importlib.util.spec_from_file_location("_mlxkv_cpu", path, loader=loader)
        if spec is None:
            return None, "the built kernels cannot be loaded"
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        module.use(_named())
    except (ImportError, OSError, ValueError) as error:
        return None, str(error)
    return module, ""


def _named() -> str | None:
    name = os.environ.get(SWITCH)
    return None if name == "1" else name


def _build_aside() -> str:
    """Start a build that outlives this process; why it cannot be, or ""."""
    try:
        building.toolchain()
        subprocess.Popen(
            [sys.executable, "-m", "mlxkv.cpu.building"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (BuildError, OSError) as error:
        return str(error)
    return ""
