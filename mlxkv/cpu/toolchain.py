"""What the kernels are built with: a C++ compiler, Python.h and the headers of MLX's wheel."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from mlxkv.errors import MlxkvError

MACHINES = ("x86_64", "aarch64")
COMPILERS = ("g++", "c++", "clang++")


class BuildError(MlxkvError):
    """The kernels cannot be built here; the message says why, and what is missing."""


@dataclass(frozen=True, slots=True)
class Mlx:
    """The installed MLX.

    Attributes:
        folder: with `include` and `lib`.
    """

    folder: Path
    version: str

    @property
    def library(self) -> Path:
        return self.folder / "lib" / "libmlx.so"


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What a build needs.

    Attributes:
        compiler: of C++20.
        python: the folder of Python.h.
    """

    compiler: Path
    mlx: Mlx
    python: Path


def is_supported() -> bool:
    """Whether there are kernels for this system."""
    return sys.platform == "linux" and platform.machine() in MACHINES


def toolchain() -> Toolchain:
    """What this machine builds with.

    Raises:
        BuildError: something is missing.
    """
    if not is_supported():
        raise BuildError(f"no kernels for {platform.system()} on {platform.machine()}")
    mlx = installed_mlx()
    compiler = next((at for name in COMPILERS if (at := shutil.which(name))), None)
    if compiler is None:
        raise BuildError("no C++ compiler; on Debian: apt install g++")
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise BuildError("no Python.h; on Debian: apt install python3-dev")
    if not (mlx.folder / "include" / "mlx").is_dir():
        raise BuildError("MLX's wheel brings no headers")
    return Toolchain(Path(compiler), mlx, python)


def installed_mlx() -> Mlx:
    """MLX as it is installed.

    Its version is the one that it names itself, as what loads it has imported it anyway: reading
    that of its package takes 20 ms of every start.

    Raises:
        BuildError: it is not, or without a library to link.
    """
    spec = importlib.util.find_spec("mlx")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("MLX is not installed")
    version = str(importlib.import_module("mlx.core").__version__)
    for folder in map(Path, spec.submodule_search_locations):
        found = Mlx(folder, version)
        if found.library.exists():
            return found
    raise BuildError("MLX's wheel brings no library to link")
