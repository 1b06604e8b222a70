"""What is proposed, and how much of it is worth a pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mlxkv.generation.drafts import lookup
from mlxkv.generation.drafts.drafter import Proposal
from mlxkv.generation.drafts.drafting import Drafting
from mlxkv.generation.drafts.drafts import GRAMMAR, Drafts
from mlxkv.generation.drafts.following import Following
from mlxkv.generation.drafts.lookup import GRAM, Lookup, PastTokens
from mlxkv.generation.drafts.pace import (
    BACKOFF,
    FIRST_SLOPE,
    LATEST,
    Chance,
    Costs,
    Rates,
    drafted,
    tried,
)
from mlxkv.generation.drafts.short import FIRST_KIND, BehindForced, Short


def proposed(drafter: Lookup, most: int = 9) -> list[int]:
    found = drafter.propose(most)
    return [] if found is None else found.tokens


def test_what_followed_the_longest_common_run_is_proposed():
    lookup = Lookup([9, 1, 2, 3, 40, 8, 1, 2, 3, 50, 7, 1, 2, 3, 60, 0, 8, 1, 2, 3])
    assert proposed(lookup, 3) == [50, 7, 1]
    for token in (50, 7, 1, 2, 3):  # now the latest is the longest
        lookup.add(token)
    assert proposed(lookup, 2) == [60, 0]


def test_of_equal_runs_the_latest_is_proposed_and_a_loop_goes_on():
    assert proposed(Lookup([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 0, 1, 2, 3]), 1) == [5]
    lookup = Lookup([7])
    for token in (1, 2, 1, 2, 1, 2):
        lookup.add(token)
    assert proposed(lookup, 5) == [1, 2, 1, 2, 1]


@given(st.lists(st.integers(-1, 2), max_size=40), st.lists(st.integers(0, 2), max_size=20))
def test_a_sorted_text_has_the_places_of_one_that_was_taken_in(first, added):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "SORTED_FROM", GRAM + 1)
        sorted_text, plain = lookup.Ngrams(first), lookup.Ngrams()
    plain.tokens += first
    for token in added:
        for text in (sorted_text, plain):
            text.tokens.append(token)
        if min(last := plain.tokens[-GRAM:]) >= 0 and len(last) == GRAM:
            key = lookup.key_of(last)
            assert sorted_text.places(key) == plain.places(key)


def test_media_are_in_no_proposal():
    assert proposed(Lookup([1, 2, 3, 4, -5, 6, 1, 2, 3])) == [4]
    assert proposed(Lookup([-1, 2, 3, 4, -1, 2, 3])) == []
    assert proposed(Lookup(range(GRAM - 1))) == []


def test_earlier_answers_of_the_same_owner_are_looked_up_and_of_no_other():
    drafting = Drafting()
    drafting.of_answer("one").end([1, 2, 3, 4, 5])
    assert drafting.of_answer("one").begin([1, 2, 3]).propose(9).tokens == [4, 5]  # pyright: ignore
    assert drafting.of_answer("two").begin([1, 2, 3]).propose(9) is None


def test_what_is_kept_of_earlier_answers_is_bounded():
    past = PastTokens(most=100)
    for i in range(50):
        past.add([i, *range(1000 + 10 * i, 1010 + 10 * i)])
        assert past.n_tokens <= 100
        assert sum(len(text.tokens) for text in past.texts) <= 2 * 100 + 20
    assert proposed(Lookup([1490, 1491, 1492], past), 2) == [1493, 1494]
    past.add([*range(40)])
    past.add([*range(50)])
    assert past.n_tokens <= 100 - 11 + 50
    assert tuple(range(40)) not in past._sequences


def measured(*seconds: float, n_rows: int = 1) -> Costs:
    costs = Costs()
    for i, each in enumerate(seconds):
        costs.record(n_rows, n_rows + i, 99.0)  # the first of its width
        costs.record(n_rows, n_rows + i, each)
    return costs


@pytest.mark.parametrize(
    ("right", "n"), [(0.0, 0), (0.2, 0), (0.5, 2), (0.9, 4), (1.0, 4)], ids=str
)
def test_as_many_are_drafted_as_give_the_most_tokens_a_second(right: float, n: int):
    costs = measured(1.0, 1.25, 1.4, 1.5, 1.6, 9.0)
    assert drafted([Chance(5, right, right)], costs, most=8) == [n]


def test_rows_share_what_a_pass_may_have_by_what_they_promise():
    costs, half = measured(1.0, *[1.0] * 8, n_rows=3), Chance(4, 0.5, 0.5)
    assert drafted([Chance(), Chance(4, 0.9, 0.9), half], costs, most=8) == [0, 4, 1]
    assert drafted([half, half, Chance(4, 0.6, 1.0)], costs, most=8) == [1, 0, 4]
    assert drafted([Chance(9, 1.0, 1.0)] * 3, costs, most=3) == [0, 0, 0]


def test_the_first_pass_of_a_width_and_those_that_were_held_up_count_nothing():
    costs = measured(1.0, 1.1)
    costs.record(1, 2, 100.0)
    assert costs.seconds(1, 2) == 1.1
    for _ in range(LATEST):
        costs.record(1, 2, 1.5)  # behind a longer prompt
    assert costs.seconds(1, 2) == 1.5
    assert costs.seconds(2, 2) is None


def test_widths_that_were_not_measured_lie_between_those_that_were():
    costs = measured(1.0)
    assert costs.seconds(1, 5) == pytest.approx(1 + 4 * FIRST_SLOPE)
    for _ in range(2):
        costs.record(1, 5, 2.0)
    assert costs.seconds(1, 3) == pytest.approx(1.5)
    assert costs.seconds(1, 7) == pytest.approx(2.25)  # hoped for


def test_what_is_not_drafted_is_tried_again_ever_more_seldom():
    rates, kind, tries = Rates(), ("lookup", 1), []
    for i in range(20 * BACKOFF):
        if rates.is_due(kind):
            tries.append(i)
            rates.record(kind, 0, 1)
    gaps = [b - a for a, b in pairwise(tries)]
    assert gaps[0] > BACKOFF
    assert all(b > 1.9 * a for a, b in pairwise(gaps))
    assert max(rates.right(kind)) < 0.9
    assert rates.right(kind)[0] < 0.3
    rates.record(kind, 3, 3)
    assert not any(rates.is_due(kind) for _ in range(BACKOFF))


def test_what_must_be_computed_is_tried_ever_more_seldom_over_all_answers():
    before, kind, tries = Rates(), ("model", 3), 0
    for _ in range(40):  # answers, each of a few tokens more than the first try waits for
        rates = Rates(before)
        for _ in range(BACKOFF + 4):
            if rates.is_due(kind, is_costly=True):
                rates.record(kind, 0, 1)
                tries += 1
    assert 3 <= tries <= 6  # of what is looked up, one in each answer


def test_what_a_draft_takes_to_compute_counts():
    costs = measured(*[1.0 + 0.01 * n for n in range(1, 9)])
    free, dear = (drafted([Chance(7, 0.8, 0.8, x)], costs, most=8) for x in (0.0, 0.2))
    assert free == [7]
    assert 0 < dear[0] < 7
    assert drafted([Chance(7, 0.8, 0.8, 0.9)], costs, most=8) == [0]


def test_a_try_is_as_long_as_it_may_be_right():
    assert tried(Chance(5, 0.05, 0.5), most=8) == 1
    assert tried(Chance(5, 0.05, 0.5), most=8, at_least=0) == 0
    assert tried(Chance(5, 1.0, 1.0), most=8) == 5
    assert tried(Chance(9, 1.0, 1.0), most=3) == 3


def test_a_text_learns_from_those_before_it():
    model = Rates()
    first = Rates(model)
    for _ in range(40):
        first.record(("lookup", 2), 0, 4)
    assert Rates(model).right(("lookup", 2))[0] < 0.05


def test_what_is_proposed_and_not_drafted_is_learned_from():
    drafts = Drafts([Lookup([1, 2, 3, 4] * 3)])
    for token in (1, 2):  # of the second kind, with 8 and 9 tokens in common
        drafts.propose(3)
        drafts.propose(3)  # asked for twice
        drafts.add(token)
    assert drafts.rates.right(("lookup", 2)) == pytest.approx((1 - 0.4 * 3 / 5, 0.85))
    found = drafts.propose(3)
    assert isinstance(found, Proposal) and found.kind == 3
    drafts.record(found, 3, 0)
    drafts.add(9)  # has been counted
    assert drafts.rates.right(("lookup", 3)) == pytest.approx((0.75 * 3 / 4, 0.85))


def lines(*numbers: int) -> list[int]:
    """Lines of a list: a token that is another in each, and twelve that are not."""
    return [x for n in numbers for x in (*range(6), 1000 + n, *range(6, 12))]


def followed(text: Sequence[int], answer: Sequence[int]) -> list[int]:
    """What is proposed behind a text and an answer, its tokens given one by one."""
    lookup = Lookup(text)
    drafts = Drafts([lookup, Following(lookup)])
    for token in answer:
        drafts.propose(5)
        drafts.add(token)
    found = drafts.propose(5)
    return found.tokens if isinstance(found, Proposal) else []


def test_a_place_is_followed_where_one_token_is_another():
    assert followed(lines(1, 2), [*range(6), 1007]) == [6, 7, 8, 9, 10]


def test_a_place_is_followed_where_tokens_are_left_out_or_added():
    assert followed(lines(1, 2), [*range(6), 7]) == [8, 9, 10, 11, 0]
    assert followed(lines(1, 2), [*range(6), 1007, 1008]) == [6, 7, 8, 9, 10]


def test_a_place_that_has_little_in_common_is_not_followed():
    assert followed([1, 2, 3, 4, 5, 6], [1, 2, 3, 9]) == []
    assert followed(lines(1, 2), [*range(6), *range(50, 62)]) == []


def test_what_followed_two_tokens_goes_before_what_followed_one():
    short = Short([1, 2, 3, 9, 2, 4, 8, 1, 2])
    found = short.propose(2)
    assert found is not None and (found.tokens, found.kind) == ([3, 9], FIRST_KIND + 1)
    short.add(9)
    assert (found := short.propose(9)) is not None and found.kind == FIRST_KIND
    assert found.tokens == [2, 4, 8, 1, 2, 9]
    assert Short([1, -1]).propose(9) is None
    assert Short([1, -1, 2, 1]).propose(9) is None


def test_what_came_behind_a_forced_name_is_proposed_behind_the_next():
    behind = BehindForced()
    assert behind.behind([1, 2], 4) is None
    for token in (1, 2, 8, 9, 5):  # a mark and a space came behind the name, then a value
        behind.add(token)
    for _ in range(2):  # it is asked while a step is under way, and once more behind it
        found = behind.behind([3, 4, 6], 2)
        assert found is not None and found.tokens == [8, 9]
    assert behind.propose(4) is None


def test_lookups_see_tokens_that_have_not_come_yet():
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 1, 2])
    found = lookup.behind([3, 4], 2)
    assert found is not None and (found.tokens, found.kind) == ([5, 6], 1)
    assert lookup.behind([9], 2) is None and proposed(lookup) == []
    short = Short([7, 4, 5, 6, 7])
    assert (found := short.behind([4], 1)) is not None and found.tokens == [5]


def test_forced_tokens_are_certain_and_say_nothing_of_guesses():
    found = Proposal([1, 2, 3, 4], "lookup", 8, forced=2)
    assert [found.is_only(i) for i in range(4)] == [True, True, False, False]
    assert Chance(4, 0.5, 0.5, forced=2).gains(4) == [1.0, 1.0, 0.5, 0.25]
    drafts = Drafts([])
    drafts.record(found, 4, 3)
    assert drafts.counts.by == {GRAMMAR: (2, 2), "lookup": (2, 1)}
    first, further = drafts.rates.right(("lookup", 8))
    assert first > 0.2 and further < 0.85
    drafts.record(found.first(2), 2, 2)
    assert drafts.rates.right(("lookup", 8)) == (first, further)


def test_tokens_that_come_where_those_before_them_do_are_worth_as_much():
    found = Proposal([1, 2, 3, 4, 5], "lookup", 8, sure=3)
    assert [found.first(n).sure for n in (5, 3, 2, 1)] == [3, 1, 0, 0]
    assert Chance(5, 0.5, 0.5, sure=3).gains(4) == [0.5, 0.25, 0.25, 0.25]
    drafts = Drafts([])
    drafts.record(found, 5, 5)  # says nothing of tokens that are forced
    assert drafts.rates.right(("lookup", 8)) == pytest.approx((0.2 + 0.8 / 4, 0.85 + 0.15 / 4))
