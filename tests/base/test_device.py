"""What is set up before MLX, each case in a process of its own; what MLX says of the device."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest

import mlxkv
from mlxkv.base import device
from mlxkv.bench import doctor
from mlxkv.engine.engine import ThreadedEngine
from tests.support.command_line import chat_model

SET = 10 << 30
"""What the fake device recommends."""


def blas_seen(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code + "; from mlxkv.base import device; print(device.load_blas())"],
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def openblas() -> str:
    name = "libopenblas.so.0"
    try:
        ctypes.CDLL(name)
    except OSError:
        pytest.skip("no OpenBLAS is installed")
    return name


def test_an_openblas_that_was_preloaded_is_seen_when_mlx_came_first(openblas):
    assert "openblas" in blas_seen("import mlx.core", LD_PRELOAD=openblas)


def test_mlx_that_came_first_keeps_the_blas_it_has():
    assert blas_seen("import mlx.core", LD_PRELOAD="") == "None"


def test_the_reference_blas_can_be_asked_for():
    assert blas_seen("pass", MLXKV_BLAS="0", LD_PRELOAD="") == "None"


def test_the_arrays_that_a_process_may_have_are_those_that_a_gpu_names(monkeypatch):
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    assert device.max_arrays() is None
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: {"resource_limit": 499_000})
    assert device.max_arrays() == 499_000
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": 2**34})
    assert device.max_arrays() is None


class FakeMetal:
    """The wired limits that were set, with the thread that set each; 7 was there before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.limits, self.threads = [7], [""]
        monkeypatch.setattr(device, "on_cpu", lambda: False)
        monkeypatch.setattr(device, "hold_wired", device.WiredLimit().hold)
        monkeypatch.setattr(
            mx, "device_info", lambda: {"max_recommended_working_set_size": SET, "memory_size": 2}
        )
        monkeypatch.setattr(mx, "set_wired_limit", self.set)

    def set(self, limit: int) -> int:
        assert limit <= SET
        self.limits.append(limit)
        self.threads.append(threading.current_thread().name)
        return self.limits[-2]


@pytest.fixture
def metal(monkeypatch) -> FakeMetal:
    gc.collect()  # models of other tests, which would give back what they hold in this one's
    return FakeMetal(monkeypatch)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("device") / "m")


def test_the_wired_limit_is_what_a_model_may_take_and_is_put_back(metal, path):
    llm = mlxkv.load(path, dtype="float32", memory="1GiB")
    assert metal.limits == [7, 1 << 30]
    llm.generate("hello", max_tokens=3)
    llm.close()
    llm.close()
    assert metal.limits == [7, 1 << 30, 7]


def test_the_wired_limit_is_never_more_than_the_recommended_set(metal, path):
    with mlxkv.load(path, dtype="float32", memory="1TiB"):
        assert metal.limits == [7, SET]
    with mlxkv.load(path, dtype="float32"):
        assert metal.limits == [7, SET, 7, SET]


def test_the_wired_limit_is_that_of_all_models_together(metal, path):
    first = mlxkv.load(path, dtype="float32", memory="1GiB")
    second = mlxkv.load(path, dtype="float32", memory="2GiB")
    first.close()
    second.close()
    assert metal.limits == [7, 1 << 30, 3 << 30, 2 << 30, 7]


def test_a_model_that_is_forgotten_gives_its_wired_memory_back(metal, path):
    llm = mlxkv.load(path, dtype="float32", memory="1GiB")
    del llm
    gc.collect()
    assert metal.limits == [7, 1 << 30, 7]


def test_nothing_is_in_flight_when_the_wired_limit_is_set(metal, monkeypatch):
    order = []
    monkeypatch.setattr(device, "finish", lambda: order.append("finish"))
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: order.append("set") or 0)
    device.hold_wired(1)()
    assert order == ["finish", "set"] * 2


def test_the_engine_wires_its_limit_on_its_own_thread(metal, path):
    engine = ThreadedEngine(dtype="float32", memory=3 << 30)
    engine.start()
    engine.close()
    assert metal.limits == [7, 3 << 30, 7]
    assert metal.threads[1:] == ["mlxkv engine"] * 2


def test_nothing_is_wired_on_the_cpu(metal, monkeypatch, path):
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    mlxkv.load(path, dtype="float32").close()
    assert metal.limits == [7]


def test_doctor_shows_what_is_wired(metal):
    assert "up to 10.0 GiB wired" in doctor._memory({}, "metal").value


_THREADS_THAT_FREE = """
import ctypes, sys, threading
from pathlib import Path
from mlxkv.base import device
if "one" in sys.argv:
    device.keep_one_heap()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
c.free(c.malloc(31 << 20))  # as a chunk does: glibc keeps twice as much from then on
together = threading.Barrier(9)
def work():
    held = [c.malloc(100_000) for _ in range(200)]
    for each in held:
        c.memset(each, 1, 100_000)
    together.wait()
    for each in held:
        c.free(each)
    together.wait()
    together.wait()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
for _ in range(8):
    threading.Thread(target=work).start()
together.wait()
together.wait()
device.trim()
print(resident() - before)
together.wait()
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(os, "confstr"), reason="glibc's")
def test_one_heap_gives_back_what_threads_have_freed():
    kept = {
        how: int(subprocess.check_output([sys.executable, "-c", _THREADS_THAT_FREE, how]))
        for how in ("one", "each")
    }
    assert kept["one"] < 4 << 20 < kept["each"]
