"""Texts with spans that are no control."""

from __future__ import annotations

import pytest

from mlxkv.text.rendered import Rendered

WHOLE = Rendered.of([("<|a|>", False), ("x<|a|>", True), ("y", True), ("", True), ("<|b|>", False)])


def test_adjacent_plain_segments_are_one_span():
    assert WHOLE == Rendered("<|a|>x<|a|>y<|b|>", ((5, 12),))


def test_segments_joined_are_the_text():
    assert WHOLE.segments() == [("<|a|>", False), ("x<|a|>y", True), ("<|b|>", False)]
    assert Rendered.of(WHOLE.segments()) == WHOLE


@pytest.mark.parametrize("n", range(len(WHOLE.text) + 1))
def test_a_cut_keeps_what_is_plain_on_both_sides(n: int):
    parts = [*WHOLE.before(n).segments(), *WHOLE.behind(n).segments()]
    assert Rendered.of(parts) == WHOLE
