"""Blocks of `layers.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import pytest

from mlxkv.base import device
from mlxkv.nn import layers
from mlxkv.nn.layers import NormedHeads, OffsetRMSNorm, RMSNorm, compiled, residual, soft_cap
from mlxkv.nn.linear import Linear

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


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the CPU backend compiles with g++"
)


@needs_compiler
def test_what_was_compiled_for_one_token_serves_many(compiling):
    function = compiled(lambda x, each, row: x + each * row)
    for B, L in ((1, 1), (1, 5), (3, 1)):
        x, each, row = (mx.random.normal(shape) for shape in ((2, B, L, 8), (B, L, 1), (8,)))
        assert mx.allclose(function(x, each, row), x + each * row, rtol=1e-6, atol=1e-6)


@needs_compiler
@fused
def test_compiling_changes_no_bit(monkeypatch, compiling, function: Function, dtype: mx.Dtype):
    x = mx.random.normal((3, 64), key=mx.random.key(0)).astype(dtype) * 40
    on_gpu = function(x)
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    assert mx.array_equal(on_gpu, function(x))


class Heads(NormedHeads):
    """Norms alone: 3 heads of queries and 2 of keys."""

    def __init__(self, norm: type[OffsetRMSNorm] | type[RMSNorm], dtype: mx.Dtype):
        super().__init__()
        self.n_heads, self.n_kv_heads = 3, 2
        self.q_norm, self.k_norm = norm(8, 1e-5), norm(8, 1e-5)
        for i, part in enumerate((self.q_norm, self.k_norm)):
            part.weight = mx.random.normal((8,), key=mx.random.key(i)).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize("norm", [OffsetRMSNorm, RMSNorm])
@pytest.mark.parametrize("prepared", [False, True])
def test_heads_normed_together_are_those_normed_apart_bit_for_bit(norm, dtype, prepared):
    block, heads = Heads(norm, dtype), mx.random.normal((1, 4, 7, 8)).astype(dtype)
    for part in (block.q_norm, block.k_norm):
        if isinstance(part, OffsetRMSNorm):
            part.prepare()
    q, k = block.q_norm(heads[:, :, :3]), block.k_norm(heads[:, :, 3:5])
    if prepared:
        block.prepare()
        assert set(block.parameters()) == {"q_norm", "k_norm"}  # as many bytes as before
    qk, plain = block.normed(heads, 1e-5)
    assert mx.array_equal(qk, mx.concatenate([q, k], axis=2))
    assert mx.array_equal(plain, mx.fast.rms_norm(heads, None, 1e-5))


def test_the_weight_of_a_norm_keeps_what_16_bits_would_round_away():
    norm = OffsetRMSNorm(1, 1e-6)
    norm.weight = mx.array([2**-9 + 2**-16], mx.bfloat16)
    assert norm.scale.item() == mx.array(1 + 2**-9 + 2**-16).astype(mx.bfloat16).item()


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("L", [1, 3])
def test_parts_of_a_projection_are_those_of_the_whole(monkeypatch, on_cpu, L):
    monkeypatch.setattr(device, "on_cpu", lambda: on_cpu)
    block, x = layers.GatedMLP(8, 6, "silu", bias=True), mx.random.normal((1, L, 8))
    block.prepare()
    parts = block.project_apart("gate_up_proj", x, (5, 4, 3))
    assert [part.shape[-1] for part in parts] == [5, 4, 3]
    whole = block.project("gate_up_proj", x)
    assert mx.allclose(mx.concatenate(parts, axis=-1), whole, rtol=1e-6, atol=1e-6)


def test_float16_residuals_stay_finite():
    x = mx.full((1, 2), 60000.0, dtype=mx.float16)
    assert residual(x, x).tolist() == [[65504.0, 65504.0]]
    assert residual(-x, -x).tolist() == [[-65504.0, -65504.0]]


class Projections(layers.Fusing):
    fusions: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}

    def __init__(self, bits: tuple[int, int, int]):
        super().__init__()
        for name, rows, width in zip(self.fusions["qkv_proj"], (6, 4, 4), bits, strict=True):
            self[name] = Linear(32, rows).to_quantized(group_size=32, bits=width)


@pytest.mark.parametrize(("bits", "products"), [
    ((4, 4, 4), {"qkv_proj"}),
    ((4, 4, 8), {"qkv_proj", "v_proj"}),
    ((4, 8, 8), {"q_proj", "k_proj", "v_proj"}),
])  # fmt: skip
def test_projections_of_several_formats_are_fused_but_for_the_last(bits, products):
    block, x = Projections(bits), mx.random.normal((1, 3, 32))
    expected = mx.concatenate([block[name](x) for name in block.fusions["qkv_proj"]], axis=-1)
    block.prepare()
    assert set(block.children()) == products
    assert mx.allclose(block.project("qkv_proj", x), expected, rtol=1e-5, atol=1e-5)
    q, kv = block.project_apart("qkv_proj", x, (6, 8))
    assert mx.allclose(mx.concatenate([q, kv], axis=-1), expected, rtol=1e-5, atol=1e-5)
