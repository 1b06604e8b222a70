"""The gated delta rule against its recurrence in float64.

Tolerance 1e-4 of the largest result: float32 sums of 16 products, over a few hundred tokens.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.nn import delta_rule

B, HK, R, DK, DV = 2, 2, 3, 16, 8


def inputs(L: int, *, alike: bool = False) -> list[np.ndarray]:
    """Queries, keys, values, log-decays, betas and a state; `alike` keys are nearly the same."""
    random = np.random.RandomState(L)
    k = random.standard_normal((B, L, HK, DK)) * (0.01 if alike else 1.0) + alike
    q = random.standard_normal((B, L, HK, DK))
    v = random.standard_normal((B, L, HK, R, DV))
    g = -np.exp(random.standard_normal((B, L, HK, R)) * 2 - (12 if alike else 3))
    beta = 1 / (1 + np.exp(-random.standard_normal((B, L, HK, R)) - 5 * alike))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return [q / DK, k, v, g, beta, random.standard_normal((B, HK, R, DK, DV))]


def recurrence(q, k, v, g, beta, state):
    found = []
    for t in range(q.shape[1]):
        state = state * np.exp(g[:, t])[..., None, None]
        change = beta[:, t][..., None] * (v[:, t] - np.einsum("bhk,bhrkv->bhrv", k[:, t], state))
        state = state + np.einsum("bhk,bhrv->bhrkv", k[:, t], change)
        found.append(np.einsum("bhk,bhrkv->bhrv", q[:, t], state))
    return np.stack(found, axis=1), state


def check(found, wanted) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert np.abs(np.array(a) - b).max() < 1e-4 * np.abs(b).max()


@pytest.mark.any_device
@pytest.mark.parametrize("alike", [False, True], ids=["mixed", "nearly equal keys"])
@pytest.mark.parametrize("L", [2, 3, 63, 64, 65, 200])
def test_a_chunk_is_the_recurrence_over_its_tokens(L, alike):
    given = inputs(L, alike=alike)
    check(delta_rule.chunk(*(mx.array(x.astype(np.float32)) for x in given)), recurrence(*given))


@pytest.mark.any_device
def test_a_step_is_the_recurrence_of_one_token():
    given = inputs(1)
    q, k, v, g, beta, state = (mx.array(x.astype(np.float32)) for x in given)
    qk = mx.stack([q[:, 0], k[:, 0]], axis=2)
    found = delta_rule.step(qk, v[:, 0], mx.exp(g[:, 0])[..., None], beta[:, 0][..., None], state)
    o, behind = recurrence(*given)
    check(found, (o[:, 0], behind))
