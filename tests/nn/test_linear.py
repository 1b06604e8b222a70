"""Packed products: divided over cores, or dequantized for long chunks, they stay the same."""

from __future__ import annotations

import gc

import mlx.core as mx
import pytest

from mlxkv.base import device
from mlxkv.nn import kernels, linear
from mlxkv.nn.kernels import settle
from mlxkv.nn.linear import DENSE_ROWS, Embedding, Linear

MODES = [("affine", 4, 32), ("affine", 8, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


@pytest.fixture
def three_cores(monkeypatch, without_kernels):
    streams = tuple(mx.new_stream(mx.Device(mx.cpu)) for _ in range(3))
    monkeypatch.setattr(device, "core_streams", lambda: streams)


def rows(n: int, dim: int) -> mx.array:
    return mx.random.normal((1, n, dim), key=mx.random.key(n))


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
@pytest.mark.parametrize("n_out", [768, 1000, 255])
def test_a_product_divided_over_cores_is_the_whole_product(
    three_cores, mode, bits, group_size, n_out
):
    packed = Linear(64, n_out, bias=True).to_quantized(group_size, bits, mode)
    x = rows(2, 64)
    whole = packed(x)
    settle(packed)
    assert ("_parts" in packed) == (n_out >= 2 * linear.SPLIT_ROWS)
    # Each row is summed by the same kernel in the same order: nothing may differ.
    assert mx.array_equal(packed(x), whole).item()


def test_dividing_adds_no_memory_and_leaves_the_parameters_as_they_are(three_cores):
    packed = Linear(256, 1024, bias=False).to_quantized(32, 4)
    mx.eval(packed.parameters())
    gc.collect()  # models of other tests, which would give back what they hold in this one's
    names, before = set(packed.parameters()), mx.get_active_memory()
    settle(packed)
    assert set(packed.parameters()) == names
    assert mx.get_active_memory() == before


def test_a_divided_tied_head_is_the_whole_head(three_cores):
    packed = Embedding(1000, 64).to_quantized(32, 8)
    x = rows(1, 64)
    whole = packed.as_linear(x)
    settle(packed)
    assert mx.array_equal(packed.as_linear(x), whole).item()


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_a_long_chunk_gives_what_its_rows_give_alone(monkeypatch, mode, bits, group_size):
    monkeypatch.setattr(linear, "_dense_is_faster", lambda: True)
    packed = Linear(128, 96, bias=True).to_quantized(group_size, bits, mode)
    x = rows(DENSE_ROWS + 5, 128)
    alone = mx.concatenate([packed(x[:, i : i + 1]) for i in range(x.shape[1])], axis=1)
    # float32 sums in another order: a few units in the last place of sums of 128 products.
    assert mx.abs(packed(x) - alone).max().item() < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [4, None])
def test_a_product_with_some_rows_is_that_part_of_the_whole(bits, bias):
    product = Linear(64, 96, bias=bias)
    product = product if bits is None else product.to_quantized(32, bits)
    x = rows(2, 64)
    assert mx.allclose(product.of_rows(x, 40, 72), product(x)[..., 40:72], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("factor", "dtype"), [(1.0, mx.float16), (1.001, mx.float32)])
def test_scales_of_an_embedding_are_kept_in_16_bits_where_that_loses_nothing(factor, dtype):
    if kernels.kernels() is None:
        pytest.skip("the kernels are not built")
    packed = Embedding(96, 64).to_quantized(32, 8)
    packed.scales = packed.scales.astype(mx.float16).astype(mx.float32) * factor
    packed.biases = packed.scales * -128
    packed.compute_dtype = mx.float32
    x, tokens = rows(2, 64), mx.array([[3, 95]])
    settled, head = packed(tokens), packed.as_linear(x)
    settle(packed)
    assert packed.scales.dtype == packed.biases.dtype == dtype
    assert mx.array_equal(packed(tokens), settled).item()
    assert mx.allclose(packed.as_linear(x), head, atol=1e-5).item()
