"""Products of the kernels against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxkv.cpu.formats import DENSE, NO_ACT, clamped
from tests.cpu import reference
from tests.cpu.conftest import SETS, held_to
from tests.cpu.reference import assert_near, dense, packed

AFFINE = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMATS = [*AFFINE, ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
ACTS = [NO_ACT, (1, 0.0, 0.0), (2, 0.0, 0.0), clamped(1.702, 7.0)]
ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 40)
"""One to a pass, more than one, and a chunk of panels."""
SHAPES = [(64, 128), (96, 384), (130, 1152)]
"""Rows that panels and lanes divide, and that they do not."""


@pytest.fixture(params=[*SETS, "amx"])
def ops(request):
    """The kernels, held to an instruction set; AMX has nothing of its own but products."""
    yield from held_to(request.param)


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def check(ops, weight, values, n_rows: int) -> None:
    x = normal(1, n_rows, values.shape[-1], seed=n_rows)
    assert_near(ops.linear(x, weight, None, -1.0, None, NO_ACT), reference.array(x) @ values.T)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_of_packed_weights(ops, form):
    for N, K in SHAPES:
        weight, values = packed(normal(N, K), *form)
        for n_rows in ROWS:
            check(ops, weight, values, n_rows)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("form", AFFINE[::3] + AFFINE[1::3], ids=str)
def test_scales_of_16_bits(ops, form, dtype):
    weight, values = packed(normal(96, 384), *form, dtype)
    for n_rows in (1, 3, 20):
        check(ops, weight, values, n_rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_symmetric_weights_need_no_biases(ops, bits):
    (codes, scales, _, *rest), _ = packed(normal(96, 384), "affine", bits, 32)
    biases = scales * -(1 << (bits - 1))
    values = mx.dequantize(codes, scales, biases, group_size=32, bits=bits)
    for n_rows in (1, 3, 20):
        check(ops, (codes, scales, None, *rest), reference.array(values), n_rows)


@pytest.mark.parametrize("dtype", DENSE, ids=str)
def test_products_of_dense_weights(ops, dtype):
    for N, K in SHAPES:
        weight, values = dense(normal(N, K), dtype)
        for n_rows in ROWS:
            check(ops, weight, values, n_rows)


@pytest.mark.parametrize("n_rows", [1, 4, 24])
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_norm_bias_activation_and_residual_are_one_operation(ops, act, n_rows):
    N, K = 128, 384
    weight, values = packed(normal(N, K), "affine", 4, 32)
    bias, x, scale = normal(N, seed=1), 3 * normal(2, n_rows, K, seed=2), normal(K, seed=3)
    plus = normal(2, n_rows, N // 2 if act[0] else N, seed=4)
    got = ops.linear(x, (*weight[:-1], bias), scale, 1e-5, plus, act)
    rows = reference.normed(reference.array(x), reference.array(scale), 1e-5)
    product = rows @ values.T + reference.array(bias)
    expected = reference.gated(act, product) if act[0] else product
    assert_near(got, expected + reference.array(plus))


def test_rows_are_equal_to_each_alone_bit_for_bit(ops):
    for form in FORMATS:
        weight, _ = packed(normal(96, 384), *form)
        x = normal(8, 1, 384)
        whole = ops.linear(x, weight, None, -1.0, None, NO_ACT)
        for i in range(8):
            alone = ops.linear(x[i : i + 1], weight, None, -1.0, None, NO_ACT)
            assert mx.array_equal(whole[i : i + 1], alone).item(), (form, i)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("n_rows", [4, 20])
def test_what_is_no_number_stays_none_and_in_its_row(ops, n_rows, bad):
    """The parts of activations that the tiles of AMX take must not make a number of it."""
    weight, _ = packed(normal(48, 96), "affine", 4, 32)
    x = normal(1, n_rows, 96)
    x[0, 1, 70] = bad
    got = np.isfinite(np.array(ops.linear(x, weight, None, -1.0, None, NO_ACT)))
    assert not got[0, 1].any() and got[0, [0, *range(2, n_rows)]].all()


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("n_rows", [1, 5, 70])
@pytest.mark.parametrize("form", [("affine", 4, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16), None],
                         ids=str)  # fmt: skip
def test_each_row_meets_the_weights_of_its_experts(ops, form, n_rows, is_shared):
    E, k, N, K = 5, 2, 64, 96
    w = normal(E, N, K)
    weight, values = dense(w, mx.bfloat16) if form is None else packed(w, *form)
    bias = normal(E, N, seed=1)
    chosen = mx.random.randint(0, E, (1, n_rows, k), key=mx.random.key(2)).astype(mx.uint32)
    x = normal(1, n_rows, K, seed=3) if is_shared else normal(1, n_rows, k, K, seed=3)
    rows = reference.array(x)[..., None, :] if is_shared else reference.array(x)
    rows = np.broadcast_to(rows, (1, n_rows, k, K))
    at = np.array(chosen)
    product = np.einsum("...k,...nk->...n", rows, values[at]) + reference.array(bias)[at]
    given = (*weight[:-1], bias)
    assert_near(ops.experts(x, given, chosen, NO_ACT), product)
    for act in ACTS[1:]:
        assert_near(ops.experts(x, given, chosen, act), reference.gated(act, product))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_products_of_any_shape(ops, data):
    mode, bits, group = data.draw(st.sampled_from(FORMATS))
    K = max(group, 32) * data.draw(st.integers(1, 8))
    B, L = data.draw(st.sampled_from([(1, 1), (3, 1), (1, 7), (2, 9), (1, 33), (1, 200)]))
    act = data.draw(st.sampled_from(ACTS))
    N = data.draw(st.integers(1, 150)) * (2 if act[0] else 1)
    dtype = data.draw(st.sampled_from([mx.float32, mx.float16, mx.bfloat16]))
    weight, values = packed(normal(N, K), mode, bits, group, dtype)
    x = normal(L, B, K, seed=1).swapaxes(0, 1)  # rows that are not dense, too
    if data.draw(st.booleans()):
        x = mx.concatenate([x, x], axis=-1)[..., :K]
    product = reference.array(x) @ values.T
    got = ops.linear(x, weight, None, -1.0, None, act)
    # By the terms of a sum: one that nearly cancels out is itself no measure.
    size = np.sqrt((reference.array(x) ** 2 @ values.T**2).max())
    assert_near(got, reference.gated(act, product) if act[0] else product, 2e-5, size * (1 + size))


def test_rows_of_another_dtype_or_shape_are_refused(ops):
    """The kernels read what they get as float32: bfloat16 beside it gave other memory's values."""
    weight, _ = packed(normal(96, 128), "affine", 4, 32)
    x, scale, plus = normal(1, 3, 128), normal(128), normal(1, 3, 96)
    mx.eval(ops.linear(x, weight, scale, 1e-5, plus, NO_ACT))
    for rows, norm, added in (
        (x.astype(mx.bfloat16), scale, plus),
        (x, scale.astype(mx.bfloat16), plus),
        (x, scale[:64], plus),
        (x, scale, plus.astype(mx.float16)),
        (x, scale, plus[:, :1]),
    ):
        with pytest.raises(ValueError):
            ops.linear(rows, weight, norm, 1e-5, added, NO_ACT)
    for rows, norm, added in (
        (x.astype(mx.bfloat16), scale, x),
        (x, scale[:64], x),
        (x, scale, plus),
    ):
        with pytest.raises(ValueError):
            ops.rms_norm(rows, norm, 1e-5, added)
