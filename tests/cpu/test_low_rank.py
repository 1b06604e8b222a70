"""Products whose rows have changes of low rank, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cpu.formats import NO_ACT
from tests.cpu import reference
from tests.cpu.reference import array, assert_near, packed
from tests.cpu.test_products import normal

K, N = 96, 192
PARTS = ((3, 0, 48), (9, 64, 192))
"""Ranks and columns; those from 48 to 64 stay as they are."""
OF = (1, -1, 0, 0, 1)
SILU = (1, 0.0, 0.0)


def changes(dtype: mx.Dtype, n_out: int = N, n_in: int = K, seed: int = 10):
    """Two changes as the kernels take them, and their sums `[n, out, in]`."""
    a, blocks = normal(2, 12, n_in, seed=seed).astype(dtype), []
    scales = 0.5 * normal(2, 12, seed=seed + 9)
    whole, at = np.zeros((2, n_out, n_in)), 0
    for i, (rank, start, stop) in enumerate(PARTS):
        stop = min(stop, n_out)
        b = normal(2, rank, stop - start, seed=seed + 1 + i).astype(dtype)
        own = slice(at, at + rank)
        scaled = array(b) * array(scales)[:, own, None]
        whole[:, start:stop] = scaled.swapaxes(1, 2) @ array(a)[:, own]
        blocks.append(mx.unflatten(b, -1, (-1, 16)).swapaxes(1, 2).flatten(1))
        at += rank
    numbers = (0, 3, *PARTS[0][1:], 3, 12, 64, min(192, n_out))
    return a, mx.concatenate(blocks, axis=1), numbers, scales, whole


def low_of(dtype: mx.Dtype, of: tuple[int, ...] = OF, **sizes: int):
    a, b, numbers, scales, whole = changes(dtype, **sizes)
    return (a, b, None, None, of, numbers, scales), whole


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("act", [NO_ACT, SILU])
def test_each_row_has_its_own_change(ops, dtype, act):
    weight, values = packed(normal(N, K), "affine", 4, 32)
    bias, scale = normal(N, seed=1), normal(K, seed=2)
    factor, shift = normal(2, N, seed=3), normal(2, N, seed=4)
    (a, b, _, _, _, numbers, scales), whole = low_of(dtype)
    # Rows of a step, of two passes, of a chunk, and of one with one change.
    for n, L, of in ((1, 1, OF), (2, 1, OF), (1, 20, OF), (1, 20, (1,))):
        x = 3 * normal(5 * n, L, K, seed=5)
        plus = normal(5 * n, L, N // 2 if act[0] else N, seed=6)
        own = of * n if L == 1 or len(of) == 1 else tuple(i for i in of for _ in range(L))
        low = (a, b, factor, shift, own, numbers, scales)
        got = ops.changed_linear(x, (*weight[:-1], bias), scale, 1e-5, plus, act, low)
        rows = reference.normed(array(x), array(scale), 1e-5).reshape(-1, K)
        expected = rows @ values.T + array(bias)
        for i, change in enumerate(own * (len(rows) // len(own))):
            if change >= 0:
                expected[i] = expected[i] * array(factor)[change] + array(shift)[change]
                expected[i] += whole[change] @ rows[i]
        expected = reference.gated(act, expected) if act[0] else expected
        assert_near(got, expected.reshape(plus.shape) + array(plus))


def test_rows_are_equal_to_each_alone_bit_for_bit(ops):
    weight, _ = packed(normal(N, K), "affine", 4, 32)
    low, _ = low_of(mx.float32)
    x, how = normal(5, 1, K), (None, -1.0, None, NO_ACT)
    got = ops.changed_linear(x, weight, *how, low)
    for i, change in enumerate(OF):
        alone = ops.changed_linear(x[i : i + 1], weight, *how, (*low[:4], (change,), *low[5:]))
        assert mx.array_equal(got[i : i + 1], alone).item(), i
    assert mx.array_equal(got[1:2], ops.linear(x[1:2], weight, *how)).item()


def test_an_mlp_is_its_two_products(ops):
    up, down = (packed(normal(*shape), "affine", 4, 32)[0] for shape in ((N, K), (K, N // 2)))
    lows = low_of(mx.float32)[0], low_of(mx.float32, n_out=K, n_in=N // 2)[0]
    x, norm, plus = normal(5, 1, K), normal(K, seed=7), normal(5, 1, K, seed=8)
    between = ops.changed_linear(x, up, norm, 1e-5, None, SILU, lows[0])
    expected = ops.changed_linear(between, down, None, -1.0, plus, NO_ACT, lows[1])
    got = ops.changed_mlp(x, up, norm, 1e-5, down, plus, SILU, *lows)
    assert mx.array_equal(got, expected).item()


@pytest.mark.parametrize("change", ["number", "rows", "columns", "size", "dtype", "scales"])
def test_changes_that_do_not_fit_are_refused(ops, change):
    weight, _ = packed(normal(N, K), "affine", 4, 32)
    (a, b, _, _, of, numbers, scales), _ = low_of(mx.float32)
    if change == "number":
        of = (*of[:-1], 2)
    elif change == "rows":
        of = of[:-1]
    elif change == "columns":
        numbers = (*numbers[:-1], N + 16)
    elif change == "size":
        b = b[:, 16:]
    elif change == "scales":
        scales = scales[:, 1:]
    else:
        a = a.astype(mx.int32)
    with pytest.raises(ValueError):
        ops.changed_linear(
            normal(5, 1, K),
            weight,
            None,
            -1.0,
            None,
            NO_ACT,
            (a, b, None, None, of, numbers, scales),
        )
