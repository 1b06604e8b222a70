"""Which of several prompts the next chunk is of."""

from __future__ import annotations

import pytest

from mlxkv.engine.queue.policy import Pace, Paces, PendingPrompt, next_prompt

A, B = list(range(1000)), list(range(5000, 6000))


def test_every_other_chunk_is_the_oldest_ones():
    prompts = [PendingPrompt(A, 10), PendingPrompt(B[:5])]
    assert [next_prompt(prompts, oldest) for oldest in (True, False)] == [0, 1]


def test_the_other_is_of_the_one_that_ends_soonest():
    assert (
        next_prompt([PendingPrompt(A), PendingPrompt(B[:500]), PendingPrompt(B, 600)], False) == 2
    )
    assert next_prompt([PendingPrompt(A, 700), PendingPrompt(B[:500])], False) == 0


def test_of_equal_ones_the_oldest_comes_first():
    assert next_prompt([PendingPrompt(A), PendingPrompt(B)], False) == 0


def test_a_prompt_waits_while_its_beginning_is_computed():
    first = A[:800]
    waits = [PendingPrompt([*first, *B], 256, "me"), PendingPrompt([*first, 1], None, "me")]
    assert next_prompt(waits, False) == 0
    past = [PendingPrompt([*first, *B], 800, "me"), PendingPrompt([*first, 1], None, "me")]
    assert next_prompt(past, False) == 1


def test_nobody_waits_for_what_another_owner_computes():
    for theirs, mine in (("you", "me"), (None, None)):
        prompts = [PendingPrompt([*A, *B], 256, theirs), PendingPrompt([*A, 1], None, mine)]
        assert next_prompt(prompts, False) == 1


def test_a_chunk_comes_to_take_what_it_may_whatever_it_costs_by_itself():
    for fixed, each in ((0.17, 0.004), (0.0, 0.002), (0.4, 0.01)):
        pace = Pace(0.5, 16, 2048)
        for _ in range(60):
            pace.record(pace.n_tokens, fixed + each * pace.n_tokens)
        assert abs(pace.n_tokens - (0.5 - fixed) / each) <= 2 or pace.n_tokens == 16


def test_a_chunk_may_take_as_long_as_some_steps_of_the_answers_within_bounds():
    paces = Paces(16, 2048)
    for each_s, allowed_s in ((0.05, 0.15), (0.001, 0.1), (5.0, 0.5)):
        for _ in range(99):
            paces.stepped(each_s)
        assert paces.of(False).allowed_s == pytest.approx(allowed_s, rel=1e-3)


def test_a_few_steps_that_were_held_up_are_not_what_a_step_takes():
    paces = Paces(16, 2048)
    for each_s in (0.4, *[0.06] * 20, 0.5, 0.5, 0.06, 0.06):
        paces.stepped(each_s)
    assert paces.of(False).allowed_s < 1.3 * 3 * 0.06


def test_a_prompt_of_one_key_holds_the_answers_of_another_up_for_one_step():
    paces = Paces(16, 2048)
    for each_s, allowed_s in ((0.05, 0.1), (0.2, 0.2), (5.0, 0.5)):
        for _ in range(299):
            paces.stepped(each_s)
        assert paces.of(False, others_wait=True).allowed_s == pytest.approx(allowed_s, rel=1e-3)


def test_scored_prompts_do_not_shorten_the_chunks_of_others():
    paces = Paces(16, 2048)
    for n in (16, 32, 64, 128):
        paces.of(False).record(n, 0.1)
    paces.of(True).record(16, 0.5)
    assert (paces.of(False).n_tokens, paces.of(True).n_tokens) == (256, 16)


def test_chunks_grow_by_twice_at_most_and_shrink_at_once():
    pace = Pace(0.5, 16, 256)
    pace.record(16, 1e-6)
    assert pace.n_tokens == 32
    for _ in range(9):
        pace.record(pace.n_tokens, 1e-6)
    assert pace.n_tokens == 256
    pace.record(256, 5.0)
    assert pace.n_tokens == 26
    pace.record(256, 50.0)
    assert pace.n_tokens == 16


def test_the_rest_of_a_prompt_does_not_shorten_chunks():
    pace = Pace(0.5, 16, 256)
    pace.record(256, 0.5)
    pace.record(1, 0.2)
    assert pace.n_tokens == 256
    pace.record(100, 0.6)
    assert pace.n_tokens == 83
