"""What is set up before MLX, each case in a process of its own; what MLX says of the device."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from mlxkv import device


def blas_seen(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code + "; from mlxkv import device; print(device.load_blas())"],
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
    assert device.on_cpu() and device.max_arrays() is None
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda: {"resource_limit": 499_000})
    assert device.max_arrays() == 499_000
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": 2**34})
    assert device.max_arrays() is None
