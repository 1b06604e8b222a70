"""Rounding to affine formats against `mx.quantize`, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.nn import kernels

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def rows(dtype: mx.Dtype) -> mx.array:
    """Finite values `[n, 384]` of every kind that a group may have."""
    random = np.random.default_rng(0)
    normal = random.standard_normal((12, 384))
    most = 65504.0 if dtype == mx.float16 else 3.38e38
    kinds = [
        *(normal * 10.0 ** np.arange(-42, 30, 6)[:, None]),
        *np.abs(normal[:2]), *-np.abs(normal[:2]),
        *(np.zeros(384) + c for c in (0, -0.0, 1, -3, 1e-7, 1e-42, 1e32, -1e34, most, -most)),
        *(np.where(random.random(384) < 0.05, c, normal[0]) for c in (0, 30, -30, most, -most)),
        *(random.integers(0, 2**bits, 384) / 2.0 - 3 for bits in (1, 2, 5, 9)),  # ties, ends alike
        random.choice([-most, most], 384), random.choice([0, -0.0, -2e-7], 384),
        1 + 1e-3 * normal[1], 1e4 + 1e-3 * normal[2], np.sign(normal[3]),
    ]  # fmt: skip
    limited = np.clip(np.array(kinds), -most, most).astype(np.float32)
    return mx.array(limited).astype(dtype)


def bits_of(arrays: tuple[mx.array, ...]) -> list[np.ndarray]:
    return [np.array(x.view(mx.uint32 if x.itemsize == 4 else mx.uint16)) for x in arrays]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_codes_scales_and_biases_are_mlxs(ops, dtype):
    values = rows(dtype)
    assert np.isfinite(np.array(values.astype(mx.float32))).all()
    for bits in BITS:
        for group in GROUPS:
            expected = bits_of(mx.quantize(values, group, bits))
            for got, one in zip(bits_of(ops.quantize(values, group, bits)), expected, strict=True):
                assert got.dtype == one.dtype
                np.testing.assert_array_equal(got, one, f"{bits} bits, groups of {group}")


def test_stacks_and_rows_that_are_views(ops):
    values = mx.random.normal((6, 4, 256))[::2, :, :128].astype(mx.bfloat16)
    for got, one in zip(ops.quantize(values, 32, 4), mx.quantize(values, 32, 4), strict=True):
        assert got.shape == one.shape and mx.array_equal(got, one)


def test_what_is_no_affine_format_is_refused(ops):
    values = mx.zeros((2, 96))
    for group, bits, x in ((64, 4, values), (16, 4, values), (32, 7, values), (32, 4, values[0])):
        with pytest.raises(ValueError, match=r"group|bits|rows"):
            ops.quantize(x, group, bits)


def test_without_kernels_the_result_is_the_same(ops, monkeypatch):
    stream = mx.default_stream(mx.Device(mx.cpu))
    values = rows(mx.bfloat16)
    fast = kernels.quantized(values, 64, 5, stream)
    monkeypatch.setattr(kernels, "kernels", lambda: None)
    for got, one in zip(fast, kernels.quantized(values, 64, 5, stream), strict=True):
        assert mx.array_equal(got, one, equal_nan=True)
