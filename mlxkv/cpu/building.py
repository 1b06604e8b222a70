"""Build the kernels with the headers that MLX's wheel brings: `python -m mlxkv.cpu.building`.

No built library is shipped: MLX's C++ interface changes with each of its releases, the source fits
all from 0.30.0 on. What is built is kept by everything that it depends on, so a new MLX, another
Python or a changed source builds anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mlxkv.base.paths import cache_dir
from mlxkv.errors import MlxkvError

SOURCES = Path(__file__).with_name("src")
UNITS = ("kernels", "pool", "op", "products", "attention", "module")
FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
    *("-fopenmp-simd", "-DNDEBUG", "-Wno-psabi"),
)
COMPILERS = ("g++", "c++", "clang++")
KEPT = 4
"""Built libraries that stay: of other versions of MLX or Python on this machine."""


class BuildError(MlxkvError):
    """The kernels cannot be built here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What a build needs.

    Attributes:
        compiler: of C++20.
        mlx: MLX's folder, with `include` and `lib`.
        version: MLX's.
        python: the folder of Python.h.
    """

    compiler: str
    mlx: Path
    version: str
    python: Path

    @property
    def library(self) -> Path:
        return self.mlx / "lib" / "libmlx.so"


def toolchain() -> Toolchain:
    """What this machine builds with; imports nothing of MLX.

    Raises:
        BuildError: something is missing.
    """
    mlx, version = _mlx()
    compiler = next((at for name in COMPILERS if (at := shutil.which(name))), None)
    if compiler is None:
        raise BuildError("no C++ compiler; on Debian: apt install g++")
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise BuildError("no Python.h; on Debian: apt install python3-dev")
    found = Toolchain(compiler, mlx, version, python)
    if not (mlx / "include" / "mlx").is_dir() or not found.library.exists():
        raise BuildError("MLX's wheel brings no headers")
    return found


def built() -> Path | None:
    """The library that fits this Python, MLX and source; None if it was not built yet."""
    try:
        at = _place(*_mlx())
    except BuildError:
        return None
    return at if at.exists() else None


def build(tools: Toolchain | None = None) -> Path:
    """Build the library, unless it is there. Several processes may build at a time.

    Raises:
        BuildError: something is missing, or the compiler fails; says how it ended.
    """
    if (there := built()) is not None:
        return there
    tools = tools or toolchain()
    place = _place(tools.mlx, tools.version)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = _compile(tools, Path(folder))
            made.replace(place)  # whole or not at all
        _forget_old(place)
    except OSError as error:
        raise BuildError(f"{place.parent}: {error.strerror}") from error
    return place


def compile_units(
    tools: Toolchain, folder: Path, flags: tuple[str, ...], *units: str
) -> list[Path]:
    """Compile units of the source, all at a time; returns the object files.

    Raises:
        BuildError: with the compiler's first error.
    """
    include = ("-I", str(tools.mlx / "include"), "-I", str(tools.python))
    define = f'-DBUILT_FOR="{tools.version}"'
    objects = [folder / f"{unit}.o" for unit in units]
    jobs = [
        subprocess.Popen(
            [tools.compiler, *flags, define, *include, "-c", f"{SOURCES / unit}.cpp", "-o", at],
            stderr=subprocess.PIPE,
            text=True,
        )
        for unit, at in zip(units, objects, strict=True)
    ]
    errors = [job.communicate()[1] for job in jobs]
    for job, error in zip(jobs, errors, strict=True):
        if job.returncode:
            lines = (line for line in error.splitlines() if "error" in line)
            raise BuildError(next(lines, "the compiler failed"))
    return objects


def _compile(tools: Toolchain, folder: Path) -> Path:
    objects = compile_units(tools, folder, FLAGS, *UNITS)
    made = folder / "library.so"
    link = [tools.compiler, "-shared", "-s", "-o", str(made), *map(str, objects)]
    link += [f"-L{tools.library.parent}", "-lmlx"]
    done = subprocess.run(link, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError((done.stderr.splitlines() or ["the linker failed"])[-1])
    return made


def _mlx() -> tuple[Path, str]:
    """MLX's folder and version, without importing it."""
    spec = importlib.util.find_spec("mlx")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("MLX is not installed")
    folders = [Path(at) for at in spec.submodule_search_locations]
    folder = next((at for at in folders if (at / "lib").is_dir()), folders[0])
    return folder, metadata.version("mlx")


def _place(mlx: Path, version: str) -> Path:
    """Where the library lies that fits; its name depends on all that it is made of."""
    library = mlx / "lib" / "libmlx.so"
    try:
        status = library.stat()
    except OSError as error:
        raise BuildError("MLX's wheel brings no library to link") from error
    parts = [version, sys.implementation.cache_tag, sysconfig.get_platform(), FLAGS]
    parts += [status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(repr(parts).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.read_bytes())
    name = f"{version}-{sys.implementation.cache_tag}-{digest.hexdigest()[:16]}.so"
    return cache_dir() / "cpu" / name


def _forget_old(place: Path) -> None:
    others = sorted(place.parent.glob("*.so"), key=lambda at: at.stat().st_mtime, reverse=True)
    for old in [at for at in others if at != place][KEPT - 1 :]:
        old.unlink(missing_ok=True)


if __name__ == "__main__":
    os.nice(10)
    try:
        build()
    except BuildError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
