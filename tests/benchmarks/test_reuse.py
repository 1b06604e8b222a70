"""The arithmetic behind the reuse benchmark: what is sent, what is least possible, what is met."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reuse import drop_from_memory, plan
from benchmarks.reuse_engines import LRU, MLXKV, PROMPT_CACHE, SAVED, SERVER, Answer
from benchmarks.reuse_report import ANEW, Run, Verdict, rows_of, verdicts
from benchmarks.reuse_scenarios import (
    Markup,
    Scenario,
    Shared,
    Sizes,
    Turn,
    Writer,
    least_tokens,
    longest_shared,
)
from benchmarks.reuse_worker import Transcript

SIZES = Sizes(turns=4, start=80, history=300, document=300, alternate=3, restart=400)


def scenarios(sizes: Sizes = SIZES) -> dict[str, Scenario]:
    """Written for a tokenizer of one token a word, with markers."""
    markup = Markup.of(lambda token: token == "<end_of_turn>")
    return Writer(lambda text: len(text.split()), markup, sizes).all()


def prompts(scenario: Scenario) -> list[str]:
    """What is sent where the answer of turn i is [i]."""
    answers = [f"[{i}]" for i in range(len(scenario.turns))]
    return [turn.prompt(answers[:i]) for i, turn in enumerate(scenario.turns)]


def test_the_longest_prefix_counts_wherever_it_was_seen():
    known = [[1, 2, 9], [1, 2, 3, 4], [7, 1, 2, 3]]
    assert longest_shared([1, 2, 3, 5, 6], known) == Shared(3, 4)


def test_of_equal_prefixes_the_sequence_that_went_least_far_counts():
    assert longest_shared([1, 2, 8], [[1, 2, 3, 4], [1, 2, 3]]) == Shared(2, 3)


def test_nothing_in_common_is_no_sequence():
    assert longest_shared([5, 6], [[1, 2], []]) == Shared(0, 0)


@pytest.mark.parametrize(
    ("prompt", "known", "least"),
    [
        ([1, 2, 3], [], 3),
        ([1, 2, 3], [[1, 2]], 1),
        ([1, 2, 3], [[1, 2, 3]], 1),
        ([1, 2, 3], [[1, 2, 3, 4]], 1),
        ([1, 2, 3, 4], [[1, 9, 3, 4]], 3),
    ],
)
def test_the_least_is_what_no_one_has_seen_and_at_least_one(
    prompt: list[int], known: list[list[int]], least: int
):
    assert least_tokens(prompt, known) == least


def test_the_agents_prompts_go_on_from_the_engines_own_answers():
    sent = prompts(scenarios()["agent"])
    for i, (before, after) in enumerate(pairwise(sent)):
        assert after.startswith(f"{before}[{i}]<end_of_turn>\n<start_of_turn>user\n")


def test_rewritten_answers_are_never_the_engines_and_never_change():
    scenario = scenarios()["rewritten"]
    sent = prompts(scenario)
    assert all(isinstance(piece, str) for turn in scenario.turns for piece in turn.pieces)
    for before, after in pairwise(sent):
        assert after.startswith(before)
        assert len(after) > len(before)


def test_an_edit_leaves_the_first_half_and_is_taken_back():
    original, edited, continued, back = prompts(scenarios(Sizes())["edit"])
    least = least_tokens(list(edited.encode()), [list(original.encode())])
    assert least / len(edited) == pytest.approx(0.5, abs=0.1)
    assert continued.startswith(edited + "[1]")
    assert back.startswith(original + "[0]")


def test_questions_share_the_document_and_nothing_behind_it():
    scenario = scenarios()["document"]
    sent = prompts(scenario)
    assert scenario.fork is not None
    assert len(sent) == SIZES.questions + 1
    assert len({text.removeprefix(scenario.fork) for text in sent}) == len(sent)
    assert all(text.startswith(scenario.fork) for text in sent)


def test_each_of_two_conversations_holds_its_own_answers():
    turns = scenarios()["two"].turns
    assert [turn.conversation for turn in turns] == ["A", "B"] * SIZES.alternate
    for number, turn in enumerate(turns):
        own = [piece for piece in turn.pieces if isinstance(piece, int)]
        assert own == list(range(number % 2, number - 1, 2))


def test_the_process_restarts_before_the_last_turn_of_the_wanted_length():
    sizes = Sizes(restart=2000)
    scenario = scenarios(sizes)["restart"]
    assert scenario.restart == len(scenario.turns) - 1
    assert len(prompts(scenario)[-1].split()) == pytest.approx(2000, rel=0.1)


def test_the_agents_history_grows_by_what_is_asked_for():
    sizes = Sizes(turns=6, start=300, grow_low=100, grow_high=150)
    lengths = [len(text.split()) for text in prompts(scenarios(sizes)["agent"])]
    assert lengths[0] == pytest.approx(300, rel=0.2)
    # A line of a dozen words over, a marker and the answer.
    assert all(100 <= b - a <= 170 for a, b in pairwise(lengths))


def test_scenarios_are_the_same_every_time_and_survive_json():
    for name, scenario in scenarios().items():
        assert scenario == scenarios()[name]
        assert Scenario.from_dict(json.loads(json.dumps(asdict(scenario)))) == scenario


def test_a_transcript_knows_what_an_earlier_process_sent(tmp_path: Path):
    first = Transcript([], [])
    turn = Turn("a", "a", ("...",))
    first.measure(0, turn, Answer("said", (1, 2, 3, 4), 3, 3, 0.1, 0.2))
    first.write(tmp_path / "transcript.json")
    second = Transcript.read(tmp_path / "transcript.json")
    measured = second.measure(1, turn, Answer("", (1, 2, 3, 4, 5, 6), 5, 5, 0.1, 0.2))
    assert second.answers == ["said", ""]
    assert (measured.least_tokens, measured.computed_tokens) == (1, 5)
    assert (measured.held_tokens, measured.answer_tokens) == (4, 1)


def turn(number: int, computed: int, first_s: float, **other: Any) -> dict[str, Any]:
    """A measured turn: 2000 tokens, 100 of them new, behind a sequence of 1900."""
    return {
        "turn": number,
        "label": f"turn {number + 1}",
        "prompt_tokens": 2000,
        "least_tokens": 100,
        "computed_tokens": computed,
        "ssd_tokens": 0,
        "held_tokens": 1900,
        "first_token_s": first_s,
        "total_s": first_s,
        "answer_tokens": 16,
        "prompt_sha256": "",
    } | other


def run(engine: str, turns: Sequence[dict[str, Any]], index: int = 0, window: int = 512) -> Run:
    return Run(engine, "agent", index, "", window, [], list(turns))


def verdict(runs: Sequence[Run], of: str) -> Verdict:
    return next(v for v in verdicts(rows_of(runs)) if of in v.target)


@pytest.mark.parametrize(("computed", "met"), [(356, True), (357, False)])
def test_256_tokens_over_the_least_are_allowed_in_every_run(computed: int, met: bool):
    runs = [run(MLXKV, [turn(0, n, 1)], i) for i, n in enumerate((100, computed, 100))]
    assert verdict(runs, "over the least").met is met


@pytest.mark.parametrize(("slower", "met"), [(10.0, True), (9.9, False)])
def test_every_turn_behind_a_wrapped_window_must_be_ten_times_faster(slower: float, met: bool):
    ours = run(MLXKV, [turn(0, 100, 1), turn(1, 100, 1)])
    theirs = run(PROMPT_CACHE, [turn(0, 2000, 50), turn(1, 2000, slower)])
    found = verdict([ours, theirs], "mlx-lm, windows wrapped: all")
    assert found.met is met
    assert found.measured.startswith("2 of 2" if met else "1 of 2")


def test_turns_on_which_the_rival_lost_its_kv_are_told_apart():
    ours = run(MLXKV, [turn(0, 100, 1), turn(1, 100, 1)])
    theirs = run(SERVER, [turn(0, 356, 2), turn(1, 357, 20)])
    assert verdict([ours, theirs], "windows wrapped: all").met is False
    lost = verdict([ours, theirs], "where it lost its KV")
    assert (lost.met, lost.measured[:6]) == (True, "1 of 1")


def test_turns_whose_window_has_not_wrapped_do_not_count():
    ours = run(MLXKV, [turn(0, 100, 1, held_tokens=511), turn(1, 100, 1, held_tokens=512)])
    theirs = run(SERVER, [turn(0, 100, 1), turn(1, 2000, 20)])
    assert [row.wrapped for row in rows_of([ours, theirs])] == [False, True]
    assert verdict([ours, theirs], "windows wrapped: all").measured.startswith("1 of 1")


def test_a_model_without_windows_has_no_verdict_on_them():
    ours = Run(MLXKV, "agent", 0, "", None, [], [turn(0, 100, 1)])
    theirs = replace(ours, engine=SERVER, turns=[turn(0, 2000, 20)])
    assert verdict([ours, theirs], "windows wrapped").met is None


def test_ratios_are_of_pairs_and_then_the_median():
    ours = [run(MLXKV, [turn(0, 100, s)], i) for i, s in enumerate((1, 2, 10))]
    theirs = [run(SERVER, [turn(0, 100, s)], i) for i, s in enumerate((5, 40, 10))]
    (row,) = rows_of(ours + theirs)
    assert row.ratios == {SERVER: [5, 20, 1]}
    assert row.ratio(SERVER) == 5
    assert row.first_token_s == {MLXKV: 2, SERVER: 10}


@pytest.mark.parametrize(("anew_s", "met"), [(5.0, True), (4.9, False)])
def test_a_restart_is_compared_with_the_same_prompt_anew(anew_s: float, met: bool):
    ours = run(MLXKV, [turn(2, 120, 1, ssd_tokens=1880)])
    anew = run(ANEW, [turn(2, 2000, anew_s)])
    assert verdict([ours, anew], "restart to first token").met is met


def test_prompts_that_differ_between_engines_are_told():
    ours = run(MLXKV, [turn(0, 100, 1, prompt_sha256="a"), turn(1, 100, 1)])
    theirs = run(SERVER, [turn(0, 100, 1, prompt_sha256="b"), turn(1, 100, 1)])
    assert [row.same_prompts for row in rows_of([ours, theirs])] == [False, True]


def test_engines_take_turns_in_coming_first():
    args = argparse.Namespace(what=["agent"], engines=[MLXKV, LRU, SERVER], runs=3)
    order = [engine for engine, _, _ in plan(args)]
    assert order == [MLXKV, LRU, SERVER, LRU, SERVER, MLXKV, SERVER, MLXKV, LRU]


def test_a_saved_cache_runs_only_where_its_user_knows_what_to_save():
    what = ["agent", "document", "restart", "two"]
    args = argparse.Namespace(what=what, engines=[MLXKV, SAVED], runs=1)
    assert [name for engine, name, _ in plan(args) if engine == SAVED] == ["document", "restart"]


def test_dropping_files_from_memory_keeps_them(tmp_path: Path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a").write_bytes(b"kv" * 5000)
    n_bytes, _ = drop_from_memory(tmp_path)
    assert n_bytes == 10_000
    assert (tmp_path / "pages" / "a").read_bytes() == b"kv" * 5000
