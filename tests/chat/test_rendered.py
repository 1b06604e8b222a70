"""Texts with spans that are no control."""

from __future__ import annotations

import pytest

from mlxkv.chat.rendered import Known, Rendered, Segment

WHOLE = Rendered.of(
    [
        Segment("<|a|>", False),
        Segment("x<|a|>"),
        Segment("y"),
        Segment(""),
        Segment("<|b|>", False),
    ]
)
OWN = Rendered.of(
    [Segment("x"), Segment("<|a|>own", False, [7, 8]), Segment("<|b|>"), Segment("z", False)]
)


def test_adjacent_plain_segments_are_one_span():
    assert WHOLE == Rendered("<|a|>x<|a|>y<|b|>", ((5, 12),))


def test_segments_joined_are_the_text():
    assert WHOLE.segments() == [
        ("<|a|>", False, None),
        ("x<|a|>y", True, None),
        ("<|b|>", False, None),
    ]
    assert [part.tokens for part in OWN.segments()] == [None, [7, 8], None, None]
    for rendered in (WHOLE, OWN):
        assert Rendered.of(rendered.segments()) == rendered


@pytest.mark.parametrize("n", range(len(WHOLE.text) + 1))
def test_a_cut_keeps_what_is_plain_on_both_sides(n: int):
    parts = [*WHOLE.before(n).segments(), *WHOLE.behind(n).segments()]
    assert Rendered.of(parts) == WHOLE


@pytest.mark.parametrize("n", range(len(OWN.text) + 1))
def test_a_cut_keeps_known_tokens_that_are_whole(n: int):
    before, behind = OWN.before(n), OWN.behind(n)
    joined = Rendered.of([*before.segments(), *behind.segments()])
    assert (joined.text, joined.plain) == (OWN.text, OWN.plain)
    assert joined.known == (() if 1 < n < 9 else (Known(1, 9, [7, 8]),))
