"""Expert blocks against a plain loop over tokens and their experts.

Tolerances: the same products in another order of summation differ by float32 rounding, 1e-5 of the
results' size; in bfloat16 by a few of its steps, 3e-2.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxkv.base import device
from mlxkv.nn import moe
from mlxkv.nn.layers import gated
from mlxkv.nn.moe import ExpertLinear, GatedExperts, QuantizedExpertLinear
from tests.support.loading import assert_rounded

N_EXPERTS, DIM, HIDDEN = 6, 64, 96
MODES = [("affine", 4, 32), ("affine", 8, 32), ("affine", 3, 32), ("mxfp4", 4, 32),
         ("mxfp8", 8, 32), ("nvfp4", 4, 16)]  # fmt: skip
# SORTED_ROWS, one at a time, cores.
PATHS = {
    "gathered": (10**9, False, 1),
    "sorted": (1, False, 1),
    "one-by-one": (1, True, 1),
    "divided": (1, False, 3),
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Each of the ways to compute the same, whatever the number of rows."""
    sorted_rows, one_by_one, n_cores = PATHS[request.param]
    streams = [mx.default_stream(mx.default_device())]
    streams += [mx.new_stream(mx.default_device()) for _ in range(n_cores - 1)]
    monkeypatch.setattr(device, "core_streams", lambda: tuple(streams))
    monkeypatch.setattr(moe, "SPLIT_ROWS", 1)
    monkeypatch.setattr(moe, "SORTED_ROWS", sorted_rows)
    monkeypatch.setattr(moe, "_one_at_a_time", lambda part, n_rows: one_by_one)
    return request.param


def experts(bias: bool = True, dtype: mx.Dtype = mx.float32, seed: int = 0) -> GatedExperts:
    mx.random.seed(seed)
    block = GatedExperts(N_EXPERTS, DIM, HIDDEN, gated("silu"), bias)
    for name in ("gate_proj", "up_proj", "down_proj"):
        part = block[name]
        for key in part:
            scale = 1 if key == "bias" else part[key].shape[-1] ** -0.5
            part[key] = (mx.random.normal(part[key].shape) * scale).astype(dtype)
    return block


def tokens(B: int, L: int, k: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    mx.random.seed(7)
    x = mx.random.normal((B, L, DIM)).astype(dtype)
    chosen = mx.argsort(mx.random.normal((B, L, N_EXPERTS)), axis=-1)[..., :k]
    return x, chosen


def dense(part: ExpertLinear) -> mx.array:
    if not isinstance(part, QuantizedExpertLinear):
        return part["weight"]
    return mx.dequantize(
        part["weight"],
        part["scales"],
        part.get("biases"),
        group_size=part.group_size,
        bits=part.bits,
        mode=part.mode,
        dtype=mx.float32,
    )


def plain(block: GatedExperts, x: mx.array, indices: mx.array) -> mx.array:
    """One token and one expert at a time, in float32."""
    names = ("gate_proj", "up_proj", "down_proj")
    weights = {name: dense(block[name]).astype(mx.float32) for name in names}

    def product(name: str, e: int, row: mx.array) -> mx.array:
        y = weights[name][e] @ row
        return y + block[name]["bias"][e].astype(mx.float32) if "bias" in block[name] else y

    def one(row: mx.array, e: int) -> mx.array:
        gate, up = product("gate_proj", e, row), product("up_proj", e, row)
        return product("down_proj", e, gate * mx.sigmoid(gate) * up)

    B, L, k = indices.shape
    chosen = np.array(indices)
    rows = [
        one(x[b, t].astype(mx.float32), int(chosen[b, t, i]))
        for b in range(B)
        for t in range(L)
        for i in range(k)
    ]
    return mx.stack(rows).reshape(B, L, k, -1)


def assert_close(got: mx.array, want: mx.array, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    off = np.abs(np.array(got.astype(mx.float32)) - np.array(want)).max()
    assert off < tolerance * np.abs(np.array(want)).max()


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, L, k", [(1, 1, 1), (1, 1, 4), (2, 5, 3), (1, 40, 2)])
def test_every_row_goes_through_its_own_expert(path, B, L, k, bias, prepared):
    block = experts(bias)
    x, indices = tokens(B, L, k)
    want = plain(block, x, indices)
    if prepared:
        block.prepare()
        assert "gate_up_proj" in block and "gate_proj" not in block
    assert_close(block(x, indices), want)


@pytest.mark.parametrize("mode, bits, group_size", MODES)
def test_packed_experts_are_the_dequantized_ones(path, mode, bits, group_size):
    block = experts()
    nn.quantize(block, group_size=group_size, bits=bits, mode=mode)
    assert isinstance(block["gate_proj"], QuantizedExpertLinear)
    x, indices = tokens(1, 20, 3)
    want = plain(block, x, indices)
    assert_close(block(x, indices), want)
    block.prepare()
    assert "gate_up_proj" in block
    assert_close(block(x, indices), want)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("L", [1, 20])
def test_16_bits_keep_their_dtype_and_their_rounding(dtype, L):
    block = experts(dtype=dtype)
    x, indices = tokens(1, L, 3, dtype)
    want = plain(block, x, indices)
    block.prepare()
    got = block(x, indices)
    assert got.dtype == dtype
    assert_close(got, want, 3e-2)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("L", [1, 20])
def test_experts_with_scales_in_float32_keep_them_and_the_dtype_of_their_rows(path, dtype, L):
    """Each product is exact up to its rounding; scales in 16 bits would differ by whole codes."""
    part = experts(bias=False)["up_proj"].to_quantized(32, 4, "affine")
    x = mx.random.normal((L, DIM), key=mx.random.key(3)).astype(dtype)
    exact = x.astype(mx.float32) @ dense(part)[1].T
    indices = mx.ones((L,), mx.uint32)
    for got in (part(x[:, None], indices)[:, 0], part.of(1, x)):
        assert got.dtype == dtype
        assert_rounded(got, exact)


def test_an_expert_that_no_token_chose_and_one_that_all_chose(path):
    block = experts()
    x, _ = tokens(1, 30, 1)
    indices = mx.full((1, 30, 1), 4)
    assert_close(block(x, indices), plain(block, x, indices))


def test_projections_of_two_formats_are_not_fused_and_still_right(path):
    block = experts()
    block.gate_proj = block["gate_proj"].to_quantized(32, 8, "affine")
    block.up_proj = block["up_proj"].to_quantized(32, 4, "mxfp4")
    x, indices = tokens(1, 20, 3)
    want = plain(block, x, indices)
    block.prepare()
    assert "gate_up_proj" not in block
    assert_close(block(x, indices), want)


def test_names_and_shapes_are_those_of_mlx_lms_switch_mlp():
    from mlx_lm.models.switch_layers import SwitchGLU

    block, theirs = experts(), SwitchGLU(DIM, HIDDEN, N_EXPERTS, bias=True)
    for quantize in (False, True):
        if quantize:
            nn.quantize(block, 32, 4)
            nn.quantize(theirs, 32, 4)
        for part in ("gate_proj", "up_proj", "down_proj"):
            ours = {key: value.shape for key, value in block[part].parameters().items()}
            assert ours == {key: value.shape for key, value in theirs[part].parameters().items()}


def test_a_packed_block_saves_and_loads_the_same_bits():
    block, other = experts(seed=1), experts(seed=2)
    for each in (block, other):
        nn.quantize(each, 32, 4, mode="mxfp4")
    other.update(block.parameters())
    x, indices = tokens(1, 3, 2)
    assert mx.array_equal(block(x, indices), other(x, indices))


@pytest.mark.skipif(not device.on_cpu(), reason="the CPU backend's choice")
def test_long_chunks_go_expert_by_expert_only_where_a_blas_makes_it_faster(monkeypatch):
    block = experts()
    part = block["down_proj"]
    monkeypatch.setattr(device, "load_blas", lambda: "libopenblas.so.0")
    few = N_EXPERTS * part.dense_rows - 1
    assert not moe._one_at_a_time(part, few) and moe._one_at_a_time(part, few + 1)
    packed = part.to_quantized(32, 4, "mxfp4")
    assert not moe._one_at_a_time(packed, few + 1)
    monkeypatch.setattr(device, "load_blas", lambda: None)
    assert not moe._one_at_a_time(part, 10**6)


def test_mxfp4_is_unpacked_bit_for_bit_as_mlx_does():
    words = mx.arange(256, dtype=mx.uint8).reshape(16, 16)
    words = mx.concatenate([words, words[:, ::-1]], axis=0).view(mx.uint32)  # [32, 4]
    for exponent in (1, 64, 120, 127, 130, 200, 250):
        scales = mx.full((32, 1), exponent, mx.uint8)
        want = mx.dequantize(words, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
        np.testing.assert_array_equal(
            np.array(moe._mxfp4_dense(words, scales, mx.float32)), np.array(want)
        )
