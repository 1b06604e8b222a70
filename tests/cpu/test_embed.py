"""Rows of packed weights against MLX's own, number by number."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cpu.formats import KINDS
from tests.cpu.test_products import AFFINE, normal


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("form", AFFINE[::3] + AFFINE[1::3], ids=str)
def test_rows_are_those_that_mlx_unpacks(ops, form, dtype):
    mode, bits, group = form
    codes, scales, biases = mx.quantize(normal(40, 192 * 2).astype(dtype), group, bits)
    wide = scales.astype(mx.float32), biases.astype(mx.float32)
    expected = np.array(mx.dequantize(codes, *wide, group_size=group, bits=bits))
    weight = (codes, scales, biases, KINDS[mode, bits], group, None)
    for ids in ([[0, 39, 7]], [[[39]]], [list(range(39, 0, -1))]):
        got = np.array(ops.embed(mx.array(ids), weight, 384))
        assert np.array_equal(got, expected[np.array(ids)])


def test_other_weights_and_ids_are_refused(ops):
    codes, scales, biases = mx.quantize(normal(4, 64), 32, 4)
    with pytest.raises(ValueError, match="affine"):
        ops.embed(mx.array([0]), (codes, scales, None, 2, 32, None), 64)
    with pytest.raises(ValueError, match="integers"):
        ops.embed(mx.array([0.0]), (codes, scales, biases, 2, 32, None), 64)
