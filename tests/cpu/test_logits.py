"""What is asked of logits in every step, against NumPy."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest


@pytest.mark.parametrize("n", [1, 15, 1000, 32768, 70001])
def test_the_largest_and_its_first_place(ops, n):
    x = np.random.default_rng(n).integers(-99, 99, (3, n)).astype(np.float32)
    x[1] = -math.inf
    x[2, n // 2 :] = 99.5
    assert np.array_equal(ops.first_largest(mx.array(x)), x.argmax(-1))
    assert np.array_equal(ops.largest(mx.array(x)), x.max(-1))


def test_rows_that_are_views(ops):
    x = np.random.default_rng(0).normal(size=(2, 4, 100)).astype(np.float32)
    rows = mx.array(x)[:, 1, ::2]
    assert np.array_equal(ops.first_largest(rows), x[:, 1, ::2].argmax(-1))
    assert np.array_equal(ops.largest(rows), x[:, 1, ::2].max(-1))


@pytest.mark.parametrize("at", [0, 40, 1023, 32769, 69999])
def test_a_nan_shows_wherever_it_is_and_infinity_stays(ops, at):
    x = np.zeros((2, 70000), np.float32)
    x[0, at], x[1, at] = math.nan, math.inf
    nan, infinity = ops.largest(mx.array(x)).tolist()
    assert math.isnan(nan) and infinity == math.inf
    assert ops.first_largest(mx.array(x)).tolist() == [0, at]


def test_other_dtypes_are_refused(ops):
    with pytest.raises(ValueError, match="float32"):
        ops.largest(mx.zeros((2, 8), mx.float16))
