"""Norms, rotary positions and attention of the kernels against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cpu import reference
from tests.cpu.reference import array, assert_near
from tests.cpu.test_products import normal


@pytest.mark.parametrize("dim", [3, 15, 64, 576, 1000])
def test_rms_norm(ops, dim):
    for n_rows in (1, 3, 300):
        x, scale, plus = (
            5 * normal(1, n_rows, dim),
            normal(dim, seed=1),
            normal(1, n_rows, dim, seed=2),
        )
        for w in (None, scale):
            expected = reference.normed(array(x), None if w is None else array(w), 1e-5)
            assert_near(ops.rms_norm(x, w, 1e-5, None), expected)
            assert_near(ops.rms_norm(x, w, 1e-5, plus), expected + array(plus))


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize(
    ("B", "L", "offsets"), [(1, 1, (7,)), (1, 70, (200,)), (3, 1, (0, 5, 4000)), (2, 3, (9,))]
)
@pytest.mark.parametrize(("D", "half"), [(64, 32), (48, 12), (128, 64)])
def test_heads_are_normed_and_rotated(ops, D, half, B, L, offsets, is_normed):
    H, Hk = 4, 2
    x = normal(B, L, (H + 2 * Hk) * D)
    frequencies = mx.array([10000 ** (-i / half) for i in range(half)])
    norms = (normal(D, seed=1), normal(D, seed=2)) if is_normed else (None, None)
    got = ops.rotate(x, frequencies, H, Hk, offsets, 1.0, *norms, 1e-5)
    heads = array(x).reshape(B, L, H + 2 * Hk, D).transpose(0, 2, 1, 3)
    q, k, v = np.split(heads, [H, H + Hk], axis=1)
    if is_normed:
        q, k = (reference.normed(h, array(n), 1e-5) for h, n in zip((q, k), norms, strict=True))
    turned = [reference.rotated(h, array(frequencies), offsets) for h in (q, k)]
    # Angles are float32, as everywhere: one of 4,000 radians is off by 2.4e-4.
    furthest = max(offsets) + L
    assert_near(got, np.concatenate([*turned, v], axis=1), 1e-5 + 4e-7 * furthest)


def causal(L: int, S: int) -> np.ndarray:
    return np.arange(S) <= np.arange(S - L, S)[:, None]


CASES = [
    (H, Hk, D, V) for H, Hk in ((1, 1), (9, 3), (16, 1)) for D, V in ((16, 16), (64, 64), (96, 32))
]


@pytest.mark.parametrize(("H", "Hk", "D", "V"), CASES)
@pytest.mark.parametrize(
    ("B", "L", "S"), [(1, 1, 1), (1, 1, 300), (3, 1, 40), (1, 5, 9), (1, 70, 330)]
)
def test_attention(ops, H, Hk, D, V, B, L, S):
    q, k, v = normal(B, H, L, D), normal(B, Hk, S, D, seed=1), normal(B, Hk, S, V, seed=2)
    sinks = normal(H, seed=3)
    is_causal = L > 1
    seen = causal(L, S) if is_causal else None
    wide = [array(x) for x in (q, k, v)]
    for cap, sink in ((0.0, None), (2.0, None), (0.0, sinks)):
        got = ops.attend(q, k, v, D**-0.5, cap, is_causal, None, sink)
        given = None if sink is None else array(sink)
        assert_near(got, reference.attended(*wide, D**-0.5, cap, seen, given))


@pytest.mark.parametrize("L", [1, 12])
def test_masked_keys_are_not_seen(ops, L):
    B, H, Hk, S, D = 2, 4, 2, 90, 32
    q, k, v = normal(B, H, L, D), normal(B, Hk, S, D, seed=1), normal(B, Hk, S, D, seed=2)
    if L == 1:  # a row for each sequence
        mask = mx.arange(S) < mx.array([[[[17]]], [[[90]]]])
    else:
        mask = mx.array(causal(L, S) & (np.arange(S) > np.arange(S - L, S)[:, None] - 30))
    got = ops.attend(q, k, v, D**-0.5, 0.0, False, mask, None)
    assert_near(got, reference.attended(array(q), array(k), array(v), D**-0.5, seen=np.array(mask)))


@pytest.mark.parametrize(
    ("widths", "D"), [((4, 4), 64), ((8, 4), 64), ((8, 8), 32), ((8, 4), 48), ((4, 4), 48)]
)
@pytest.mark.parametrize(("L", "S"), [(1, 1), (1, 300), (20, 100)])
def test_attention_on_quantized_kv(ops, widths, D, L, S):
    B, H, Hk = 1, 6, 2
    q = normal(B, H, L, D)
    rows, values = [], []
    for seed, bits in zip((1, 2), widths, strict=True):
        x = normal(B, Hk, S, D, seed=seed)
        group = 64 if D % 64 == 0 else 32
        padded = mx.pad(x, [(0, 0)] * 3 + [(0, -D % group)])
        codes, scales, biases = mx.quantize(padded, group_size=group, bits=bits)
        rows.append((codes, scales, biases, bits, group, D))
        values.append(
            array(mx.dequantize(codes, scales, biases, group_size=group, bits=bits))[..., :D]
        )
    got = ops.attend_codes(q, *rows, D**-0.5, 0.0, L > 1, None, None)
    seen = causal(L, S) if L > 1 else None
    assert_near(got, reference.attended(array(q), *values, D**-0.5, seen=seen))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_attention_of_any_shape(ops, data):
    Hk, G = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 16))
    D, V = (16 * data.draw(st.integers(1, 9)) for _ in range(2))
    L = data.draw(st.integers(1, 80))
    B = data.draw(st.integers(1, 3)) if L == 1 else 1
    S = L + data.draw(st.sampled_from([0, 1, 63, 64, 255, 256, 700]))
    q = normal(B, L, Hk * G, D).swapaxes(1, 2)
    k, v = normal(B, Hk, S + 9, D, seed=1)[:, :, :S], normal(B, Hk, S, V, seed=2)
    got = ops.attend(q, k, v, D**-0.5, 0.0, L > 1, None, None)
    seen = causal(L, S) if L > 1 else None
    assert_near(got, reference.attended(array(q), array(k), array(v), D**-0.5, seen=seen))
