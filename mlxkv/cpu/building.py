"""Build the kernels with the headers that MLX's wheel brings: `python -m mlxkv.cpu.building`.

No built library is shipped: MLX's C++ interface changes with each of its releases, the source fits
all from 0.30.0 on. A built library is kept under a name that depends on all that it is made of, so
a new MLX, another Python or a changed source builds anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlxkv.base.paths import kernels_dir
from mlxkv.cpu.toolchain import BuildError, Mlx, Toolchain, installed_mlx, toolchain
from mlxkv.errors import one_line

SOURCES = Path(__file__).with_name("src")
UNITS = ("mlx", "amx", "avx512", "avx2", "baseline", "pool", "huge_pages")
"""`mlx.cpp` takes in all that needs MLX's headers, which take longest to read."""
FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
    *("-fopenmp-simd", "-DNDEBUG", "-Wno-psabi"),
)
KEPT = 4
"""Built libraries that stay: of other versions of MLX or Python on this machine."""
RETRY_S = 24 * 3600
"""A build that failed is tried again after this time, or with another compiler."""
_PREFIX = "building-"


def built() -> Path | None:
    """The library that fits this Python, MLX and source; None if it was not built yet."""
    try:
        at = place(installed_mlx())
    except (BuildError, OSError):
        return None
    return at if at.exists() else None


def failure(tools: Toolchain) -> str:
    """Why the last build with these tools failed; "" if none did."""
    try:
        note = _note(tools)
        is_recent = time.time() - note.stat().st_mtime < RETRY_S
        return note.read_text(encoding="utf-8") if is_recent else ""
    except OSError:
        return ""


def build(tools: Toolchain | None = None, *, waits: bool = True) -> Path | None:
    """Build the library, unless it is there.

    One process builds at a time; where files cannot be locked, several: the last one's stays.

    Args:
        tools: None for this machine's.
        waits: for a process that is building; else None is returned if there is one.

    Raises:
        BuildError: something is missing, or the build failed, which is noted (`failure`).
    """
    if (there := built()) is not None:
        return there
    tools = tools or toolchain()
    try:
        final = place(tools.mlx)
        final.parent.mkdir(parents=True, exist_ok=True)
        with _alone(final.parent, waits) as is_alone:
            if not is_alone or final.exists():
                return built()
            with tempfile.TemporaryDirectory(dir=final.parent, prefix=_PREFIX) as folder:
                _make(tools, Path(folder)).replace(final)  # whole or not at all
            _forget_old(final)
    except OSError as error:
        raise BuildError(f"{kernels_dir()}: {error.strerror or error}") from error
    return final


def compile_units(tools: Toolchain, folder: Path, flags: Sequence[str], *units: str) -> list[Path]:
    """Compile units of the source (all, if none is named) at a time; returns the object files.

    Raises:
        BuildError: with the compiler's first error.
    """
    include = ("-I", str(tools.mlx.folder / "include"), "-I", str(tools.python))
    define = f'-DBUILT_FOR="{tools.mlx.version}"'
    units = units or UNITS
    objects = [folder / f"{unit}.o" for unit in units]
    jobs = [
        subprocess.Popen(
            [tools.compiler, *flags, define, *include, "-c", SOURCES / f"{unit}.cpp", "-o", at],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for unit, at in zip(units, objects, strict=True)
    ]
    errors = [job.communicate()[1] for job in jobs]
    for job, error in zip(jobs, errors, strict=True):
        if job.returncode:
            raise BuildError(_reason(error, "the compiler failed"))
    return objects


def python_command(module: str) -> list[str]:
    """Run a module of ours in another process of this Python, which finds what this one does."""
    run = f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", f"import runpy, sys; sys.path[:] = {sys.path!r}; {run}"]


def place(mlx: Mlx) -> Path:
    """Where the library lies that fits; its name depends on all that it is made of.

    Raises:
        OSError: a file of it cannot be read.
    """
    status = mlx.library.stat()
    parts = [mlx.version, sys.implementation.cache_tag, sysconfig.get_platform(), FLAGS]
    parts += [status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(repr(parts).encode())
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.read_bytes())
    name = f"{mlx.version}-{sys.implementation.cache_tag}-{digest.hexdigest()[:16]}.so"
    return kernels_dir() / name


def _make(tools: Toolchain, folder: Path) -> Path:
    """Compile, link and try; a failure is noted, so that not every process repeats it."""
    note = _note(tools)
    try:
        made = _link(tools, folder, compile_units(tools, folder, FLAGS))
        _try(made)
    except BuildError as error:
        note.write_text(one_line(error), encoding="utf-8")
        raise
    note.unlink(missing_ok=True)
    return made


def _link(tools: Toolchain, folder: Path, objects: Sequence[Path]) -> Path:
    made = folder / "library.so"
    libraries = [f"-L{tools.mlx.library.parent}", "-lmlx"]
    command = [tools.compiler, "-shared", "-s", "-o", made, *objects, *libraries]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise BuildError(_reason(done.stderr, "the linker failed"))
    return made


def _try(made: Path) -> None:
    """Compute with it in a process of its own, which may crash."""
    command = [*python_command("mlxkv.cpu.trial"), made]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the built kernels crash"]
        raise BuildError(lines[-1][:200])


def _reason(output: str, otherwise: str) -> str:
    return next((line[:200] for line in output.splitlines() if "error" in line), otherwise)


def _note(tools: Toolchain) -> Path:
    """The file that says why a build with these tools failed."""
    at = tools.compiler.resolve()
    compiler = hashlib.sha256(f"{at} {at.stat().st_mtime_ns}".encode()).hexdigest()[:8]
    return place(tools.mlx).with_suffix(f".{compiler}.failed")


@contextlib.contextmanager
def _alone(folder: Path, waits: bool) -> Iterator[bool]:
    """Hold the folder's lock; gives whether this process may build."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        except OSError:  # a file system without locks
            yield True
        else:
            yield True


def _forget_old(final: Path) -> None:
    """Remove what is not used any more, and what builds left that were interrupted."""
    others = sorted(final.parent.glob("*.so"), key=lambda at: at.stat().st_mtime, reverse=True)
    for old in [at for at in others if at != final][KEPT - 1 :]:
        old.unlink(missing_ok=True)
    for folder in final.parent.glob(f"{_PREFIX}*"):
        if time.time() - folder.stat().st_mtime > RETRY_S:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    os.nice(10)  # whoever started it answers meanwhile
    try:
        build(waits="--waits" in sys.argv)
    except BuildError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
