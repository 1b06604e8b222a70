"""The library of kernels is built once, kept by what it is made of, and never missed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlxkv.bench import doctor
from mlxkv.cpu import building, library, toolchain
from mlxkv.cpu.toolchain import BuildError
from mlxkv.nn import kernels
from tests.support.paths import ROOT

MODULE = """
#include <Python.h>
static PyObject* use(PyObject*, PyObject*) { return PyUnicode_FromString("small"); }
static PyMethodDef methods[] = {{"use", use, METH_O, nullptr}, {}};
static PyModuleDef module{PyModuleDef_HEAD_INIT, "_mlxkv_cpu", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__mlxkv_cpu() {
  %s
  return PyModule_Create(&module);
}
"""
needs_tools = pytest.mark.skipif(
    not toolchain.is_supported() or not shutil.which("g++"), reason="needs Linux and g++"
)


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """A source of one small file and an empty cache; returns the file."""
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "module.cpp").write_text(MODULE % "")
    monkeypatch.setattr(building, "SOURCES", folder)
    monkeypatch.setattr(building, "UNITS", ("module",))
    monkeypatch.setattr(building, "FLAGS", ("-std=c++20", "-fPIC"))
    monkeypatch.setattr(building, "_try", library.load)
    monkeypatch.setenv("MLXKV_KERNELS_DIR", str(tmp_path / "kernels"))
    monkeypatch.delenv("MLXKV_KERNELS", raising=False)
    forget()
    yield folder / "module.cpp"
    forget()


def forget() -> None:
    library._found.cache_clear()
    library._start_build.cache_clear()


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Commands of builds behind this process's back, which are not run."""
    commands = []

    class Child:
        def __init__(self, command, **kwargs):
            assert kwargs["start_new_session"], "it outlives this process"
            assert kwargs["stdout"] == kwargs["stderr"] == subprocess.DEVNULL
            commands.append(command)

        def wait(self) -> int:
            return 0

    stub = SimpleNamespace(Popen=Child, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(library, "subprocess", stub)
    return commands


@needs_tools
def test_it_is_built_once_and_found_again(small):
    assert building.built() is None
    path = building.build()
    assert path == building.built() == building.build()
    assert library.load(path).__name__ == "_mlxkv_cpu"
    assert {at.name for at in path.parent.iterdir()} == {path.name, "lock"}


@needs_tools
def test_of_built_libraries_those_used_last_stay(small):
    first = building.build()
    assert first is not None
    for i in range(building.KEPT):
        others = first.with_name(f"other-{i}.so")
        others.touch()
        os.utime(others, (i + 1, i + 1))
    os.utime(first, (0, 0))  # the oldest, and then used
    assert library.library() is not None
    small.write_text(MODULE % "// another source")
    assert building.build() != first
    assert first.exists() and not first.with_name("other-0.so").exists()


@needs_tools
def test_another_source_mlx_or_flag_is_another_library(small, monkeypatch):
    mlx = toolchain.installed_mlx()
    names = {building.place(mlx).name, building.place(toolchain.Mlx(mlx.folder, "9.9")).name}
    monkeypatch.setattr(building, "FLAGS", ("-O1",))
    names.add(building.place(mlx).name)
    small.write_text(MODULE % "// changed")
    names.add(building.place(mlx).name)
    assert len(names) == 4


BUILD = """
import sys
from pathlib import Path
from mlxkv.cpu import building
building.SOURCES, building.UNITS = Path({source!r}), ("module",)
building.FLAGS = ("-fPIC",)
building._try = lambda made: None
{more}
print(building.build(waits=sys.argv[1] == "waits"))
"""
NO_LOCKS = """
def refuse(*_):
    raise OSError("no locks here")
building.fcntl.flock = refuse
"""


def build_at_once(source: Path, folder: Path, more: str, *how: str) -> tuple[list[str], int]:
    """What processes that build at a time print, and how often the compiler compiled."""
    folder.mkdir()
    log, real = folder / "log", shutil.which("g++")
    compiler = folder / "g++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo . >>{log}; sleep 1;; esac\n'
                        f'exec {real} "$@"\n')  # fmt: skip
    compiler.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    code = BUILD.format(source=str(source.parent), more=more)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, way], env=env, stdout=subprocess.PIPE, text=True
        )
        for way in how
    ]
    printed = [process.communicate(timeout=60)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0] * len(how)
    return printed, len(log.read_text().splitlines())


@needs_tools
def test_of_two_processes_one_builds_and_the_other_waits_for_it(small, tmp_path):
    printed, n_compiled = build_at_once(small, tmp_path / "bin", "", "waits", "waits")
    assert n_compiled == 1 and printed[0] == printed[1] and Path(printed[0]).exists()


@needs_tools
def test_one_in_the_background_leaves_it_to_the_other(small, tmp_path):
    printed, n_compiled = build_at_once(small, tmp_path / "bin", "", "leaves", "leaves")
    assert n_compiled == 1 and "None" in printed


@needs_tools
def test_two_may_build_where_files_cannot_be_locked(small, tmp_path):
    printed, n_compiled = build_at_once(small, tmp_path / "bin", NO_LOCKS, "waits", "waits")
    assert n_compiled == 2 and printed[0] == printed[1]
    assert library.load(Path(printed[0])).__name__ == "_mlxkv_cpu"


@needs_tools
def test_a_failed_build_is_noted_and_not_tried_again_at_every_start(small, started, monkeypatch):
    small.write_text("broken;")
    with pytest.raises(BuildError, match=r"error: .*broken"):
        building.build()
    assert kernels.state()[0] == "MLX's own" and "cannot be built here" in kernels.state()[1]
    assert library.library() is None and started == []
    monkeypatch.setattr(building, "RETRY_S", 0)
    forget()
    assert library.library() is None and len(started) == 1


@needs_tools
def test_what_computes_nonsense_is_not_kept(small, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("MLXKV_KERNELS_DIR", str(small.parent.parent / "kernels"))
    monkeypatch.setattr(building, "SOURCES", small.parent)
    monkeypatch.setattr(building, "UNITS", ("module",))
    monkeypatch.setattr(building, "FLAGS", ("-fPIC",))
    with pytest.raises(BuildError, match="has no attribute 'linear'"):
        building.build()
    assert building.built() is None


@needs_tools
def test_one_that_does_not_fit_is_left_out_and_named(small, monkeypatch):
    small.write_text(MODULE % 'PyErr_SetString(PyExc_ImportError, "laid out otherwise"); return 0;')
    monkeypatch.setattr(building, "_try", lambda made: None)
    building.build()
    assert library.library() is None
    assert kernels.state() == ("MLX's own", "laid out otherwise")


@needs_tools
def test_the_first_use_starts_a_build_and_goes_on_without(small, started):
    assert library.library() is None and library.library() is None
    assert len(started) == 1 and "mlxkv.cpu.building" in started[0][-1]
    assert kernels.state() == ("being built, MLX's own until then", "")
    building.build()
    assert library.library() is None, "a loaded model keeps to what it has"
    library.look_again()
    assert library.library() is not None and kernels.state() == ("built (small)", "")


@needs_tools
@pytest.mark.parametrize(
    ("name", "advice"), [("g++", "apt install g++"), ("Python.h", "apt install python3-dev")]
)
def test_what_is_missing_is_named_and_how_to_get_it(small, started, monkeypatch, tmp_path, name,
                                                    advice):  # fmt: skip
    if name == "g++":
        monkeypatch.setattr(toolchain.shutil, "which", lambda _: None)
    else:
        monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda _: str(tmp_path))
    value, why = kernels.state()
    assert value == "MLX's own" and advice in why and started == []
    (found,) = doctor._kernels("cpu")
    assert found.state == "advice" and advice in found.advice


def test_a_folder_that_cannot_be_written_is_named(small, started, monkeypatch):
    monkeypatch.setattr(library.os, "access", lambda *_: False)
    if toolchain.is_supported() and shutil.which("g++"):
        assert "MLXKV_KERNELS_DIR" in kernels.state()[1]
    assert started == []


def test_a_mac_a_gpu_and_other_machines_build_nothing(small, started, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("mlxkv.base.device.on_cpu", lambda: False)
        assert kernels.kernels() is None and doctor._kernels("metal") == []
    for system, machine in (("darwin", "arm64"), ("linux", "riscv64")):
        forget()
        monkeypatch.setattr(toolchain.sys, "platform", system)
        monkeypatch.setattr(toolchain.platform, "machine", lambda machine=machine: machine)
        assert kernels.kernels() is None and kernels.state() == ("MLX's own", "")
    assert started == []


@needs_tools
def test_they_can_be_switched_off(small, started, monkeypatch):
    monkeypatch.setenv("MLXKV_KERNELS", "0")
    assert kernels.kernels() is None and started == []
    assert kernels.state() == ("MLX's own (MLXKV_KERNELS=0)", "")


def test_an_unknown_instruction_set_is_named_and_leaves_them_out(monkeypatch):
    if library.library() is None:
        pytest.skip("the kernels are not built")
    monkeypatch.setenv("MLXKV_KERNELS", "mmx")
    forget()
    try:
        assert kernels.state() == ("MLX's own", "this machine has no mmx")
    finally:
        forget()


def test_the_wheel_has_the_sources():
    with (ROOT / "pyproject.toml").open("rb") as file:
        data = tomllib.load(file)["tool"]["setuptools"]["package-data"]
    folder = ROOT / "mlxkv" / "cpu"
    packed = {at for pattern in data["mlxkv.cpu"] for at in folder.glob(pattern)}
    assert packed == {at for at in (folder / "src").rglob("*") if at.is_file()}
