"""Log-probabilities told beside tokens: whose, how many, and in which order."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxkv.sampling.logprobs import tell
from mlxkv.sampling.math import log_normalizer
from tests.support.branches import BRANCHES, Branches

V = 60


@pytest.mark.parametrize("branches", BRANCHES)
@given(asked=st.lists(st.none() | st.sampled_from([0, 1, 3, V, V + 9]), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_each_row_is_told_what_it_asks_for(branches: Branches, asked: list[int | None]):
    rng = np.random.default_rng(len(asked))
    logits = rng.normal(size=(len(asked), V)).astype(np.float32)
    tokens = rng.integers(0, V, len(asked))
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    with branches():
        told = tell(mx.array(logits), mx.array(tokens), asked)
    wanted = {i: n for i, n in enumerate(asked) if n is not None}
    assert (told is None) == (not wanted)
    found = told.by_row() if told is not None else {}
    assert found.keys() == wanted.keys()
    for row, n in wanted.items():
        logprob, top = found[row]
        assert logprob == pytest.approx(exact[row, tokens[row]], abs=1e-5)
        likeliest = np.argsort(-exact[row])[:n]
        assert [token for token, _ in top] == likeliest.tolist()
        np.testing.assert_allclose([p for _, p in top], exact[row][likeliest], atol=1e-5)


def test_a_normalizer_that_is_known_is_not_computed_again():
    logits, tokens = mx.array(np.eye(2, V, dtype=np.float32)), mx.array([0, 5])
    known = log_normalizer(logits)
    first, second = tell(logits, tokens, [2, 2]), tell(logits, tokens, [2, 2], known + 1)
    assert first is not None and second is not None
    np.testing.assert_allclose(first.logprobs, second.logprobs + 1, atol=1e-6)
    assert first.by_row().keys() == {0, 1}
