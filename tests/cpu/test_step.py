"""Operations of a decode step against the ones that they stand for: equal, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cpu.formats import NO_ACT, clamped
from tests.cpu.reference import packed
from tests.cpu.test_products import normal

D, HALF, CAPACITY = 64, 24, 600
FREQUENCIES = mx.array([10000 ** (-i / HALF) for i in range(HALF)])
PLACES = [
    ((5,), (5,), (6,)),
    ((900,), (3,), (CAPACITY,)),
    ((7, 511, 0), (7, 511, 0), (8, 512, 1)),
]
"""Positions, columns and lengths; the second in a ring that is full."""


def same(got: mx.array, expected: mx.array) -> bool:
    return np.array_equal(np.array(got), np.array(expected))


@pytest.mark.parametrize("places", PLACES, ids=["one", "ring", "batch"])
@pytest.mark.parametrize(("H", "Hk"), [(9, 3), (4, 1)])
@pytest.mark.parametrize("is_plain", [True, False])
def test_a_step_of_attention(ops, places, H, Hk, is_plain):
    positions, columns, lengths = places
    B = len(positions)
    qkv = normal(B, 1, (H + 2 * Hk) * D)
    k, v = normal(B, Hk, CAPACITY, D, seed=1), normal(B, Hk, CAPACITY, D, seed=2)
    norms = (None, None) if is_plain else (normal(D, seed=3), normal(D, seed=4))
    cap, sinks = (0.0, None) if is_plain else (20.0, normal(H, seed=5))
    how = H, Hk, positions, 1.25, *norms, 1e-5

    heads = ops.rotate(qkv, FREQUENCIES, *how)
    q, own_k, own_v = mx.split(heads, (H, H + Hk), axis=1)
    at = mx.broadcast_to(mx.array(columns)[:, None, None, None], own_k.shape)
    keys = mx.put_along_axis(k, at, own_k, axis=2)
    values = mx.put_along_axis(v, at, own_v, axis=2)
    expected = [
        ops.attend(q[b : b + 1], keys[b : b + 1, :, :n], values[b : b + 1, :, :n], 0.125, cap,
                   False, None, sinks)
        for b, n in enumerate(lengths)
    ]  # fmt: skip

    before = np.array(k)
    got, got_k, got_v = ops.attend_step(
        qkv, FREQUENCIES, k, v, *how, columns, lengths, (), 0.125, cap, sinks
    )
    assert same(got, mx.concatenate(expected))
    assert same(got_k, keys) and same(got_v, values)
    assert same(k, mx.array(before)), "what is read elsewhere stays as it is"


@pytest.mark.parametrize("window", [CAPACITY, 40])
def test_tokens_of_one_sequence_are_its_steps(ops, window):
    n, H, first = 4, 3, 300
    qkv, how = normal(n, 1, 3 * H * D), (1.0, None, None, 0.0)
    k, v = normal(1, H, CAPACITY, D, seed=1), normal(1, H, CAPACITY, D, seed=2)
    at = range(first, first + n)
    starts = tuple(max(0, i + 1 - window) for i in at)
    seen = tuple(i + 1 - start for i, start in zip(at, starts, strict=True))
    got = ops.attend_step(
        qkv, FREQUENCIES, k, v, H, H, (*at,), *how, (*at,), seen, starts, 0.125, 0.0, None
    )
    outs = []
    for i, row in enumerate(at):
        out, k, v = ops.attend_step(
            qkv[i : i + 1], FREQUENCIES, k, v, H, H, (row,), *how, (row,), seen[i : i + 1],
            starts[i : i + 1], 0.125, 0.0, None,
        )  # fmt: skip
        outs.append(out)
    assert same(got[0], mx.concatenate(outs)) and same(got[1], k) and same(got[2], v)


def test_a_buffer_that_nothing_else_reads_is_written_in_place(ops):
    qkv, k, v = normal(1, 1, 3 * D), normal(1, 1, CAPACITY, D), normal(1, 1, CAPACITY, D)
    mx.eval(k, v)
    places = [address(x) for x in (k, v)]
    for i in range(3):
        out, k, v = ops.attend_step(
            qkv,
            FREQUENCIES,
            k,
            v,
            1,
            1,
            (i,),
            1.0,
            None,
            None,
            0.0,
            (i,),
            (i + 1,),
            (),
            1.0,
            0.0,
            None,
        )
        mx.eval(out, k, v)
    assert [address(x) for x in (k, v)] == places


def address(x: mx.array) -> int:
    return np.array(x, copy=False).__array_interface__["data"][0]


@pytest.mark.parametrize("change", ["columns", "lengths", "starts", "positions", "heads", "dtype"])
def test_places_that_do_not_fit_are_refused(ops, change):
    n = 2 if change == "heads" else 1
    k = normal(1, n, CAPACITY, D).astype(mx.float16 if change == "dtype" else mx.float32)
    columns = (CAPACITY,) if change == "columns" else (0,)
    lengths = (CAPACITY + 1,) if change == "lengths" else (1,)
    positions = (0, 1) if change == "positions" else (0,)
    starts = (CAPACITY,) if change == "starts" else (0,)
    how = 1, 1, positions, 1.0, None, None, 0.0, columns, lengths, starts, 1.0, 0.0, None
    with pytest.raises(ValueError):
        ops.attend_step(normal(1, 1, 3 * D), FREQUENCIES, k, k, *how)


@pytest.mark.parametrize("act", [(1, 0.0, 0.0), clamped(1.702, 7.0)])
@pytest.mark.parametrize("n_rows", [1, 3, 8])
def test_an_mlp_is_its_two_products(ops, n_rows, act):
    E, hidden = 96, 160
    up = (*packed(normal(2 * hidden, E), "affine", 4, 32)[0][:5], normal(2 * hidden, seed=1))
    down = packed(normal(E, hidden, seed=2), "affine", 8, 32)[0]
    x, scale, plus = normal(n_rows, 1, E), normal(E, seed=3), normal(n_rows, 1, E, seed=4)
    for norm, eps, residual in ((None, -1.0, None), (scale, 1e-5, plus), (None, 1e-5, plus)):
        between = ops.linear(x, up, norm, eps, None, act)
        expected = ops.linear(between, down, None, -1.0, residual, NO_ACT)
        assert same(ops.gated_mlp(x, up, norm, eps, down, residual, act), expected)
    with pytest.raises(ValueError, match="many rows"):
        ops.gated_mlp(normal(9, 1, E), up, None, -1.0, down, None, act)
