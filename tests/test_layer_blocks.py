"""Blocks of `layers.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlxkv import device, layers
from mlxkv.layers import compiled, residual, soft_cap

FUSED = {
    "residual": (lambda x: residual(x, x[:, ::-1]), mx.float16),
    "soft_cap": (lambda x: soft_cap(x, 30.0), mx.bfloat16),
    "gated": (lambda x: layers.gated("silu")(x, x[:, ::-1]), mx.bfloat16),
}
"""Blocks that are one kernel on a GPU, and a dtype in which they are more than one operation."""

Function = Callable[[mx.array], mx.array]
fused = pytest.mark.parametrize(("function", "dtype"), FUSED.values(), ids=FUSED)


@pytest.fixture
def compiling(monkeypatch):
    """Blocks compile as on a GPU; skips where MLX's compiler is switched off."""
    traced = []
    function = mx.compile(lambda x: (traced.append(x), x + x)[1])
    for _ in range(2):
        function(mx.array(1.0))
    if len(traced) > 1:
        pytest.skip("MLX's compiler is switched off")
    monkeypatch.setattr(device, "on_cpu", lambda: False)


def _count_calls(function: Callable[[mx.array], mx.array]) -> int:
    calls = []

    def counted(x: mx.array) -> mx.array:
        calls.append(x)
        return function(x)

    called = compiled(counted)
    for _ in range(2):
        called(mx.array(2.0))
    return len(calls)


def test_the_cpu_backend_compiles_nothing(monkeypatch):
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    assert _count_calls(lambda x: x + x) == 2


def test_a_gpu_compiles_a_block_once(compiling):
    assert _count_calls(lambda x: x + x) == 1


@fused
def test_a_gpu_gets_one_kernel(compiling, tmp_path: Path, function: Function, dtype: mx.Dtype):
    graph = tmp_path / "graph.dot"
    x = mx.zeros((1, 4), dtype)
    mx.eval(x)
    mx.export_to_dot(str(graph), function(x))
    names = [line for line in graph.read_text().splitlines() if "shape=rectangle" in line]
    kernels = [name for name in names if "Slice" not in name]
    assert len(kernels) == 1 and "Compiled" in kernels[0], names


@pytest.mark.skipif(shutil.which("g++") is None, reason="the CPU backend compiles with g++")
@fused
def test_compiling_changes_no_bit(monkeypatch, compiling, function: Function, dtype: mx.Dtype):
    x = mx.random.normal((3, 64), key=mx.random.key(0)).astype(dtype) * 40
    on_gpu = function(x)
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    assert mx.array_equal(on_gpu, function(x))


def test_float16_residuals_stay_finite():
    x = mx.full((1, 2), 60000.0, dtype=mx.float16)
    assert residual(x, x).tolist() == [[65504.0, 65504.0]]
    assert residual(-x, -x).tolist() == [[-65504.0, -65504.0]]
