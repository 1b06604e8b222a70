"""Pages of models with layers that keep a state: where prompts go on, and what gives way first.

No model: a token's KV is its position and id, and a state says how many tokens it has seen and a
number made of all of them, so that a test sees *what* came back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.cache import RecurrentCache, make_caches
from mlxkv.kv.types import STEP, CacheSpec, RecurrentSpec
from mlxkv.prefix.capture import Cutter
from mlxkv.prefix.eviction import DiskLimits
from mlxkv.prefix.layout import (
    FULL,
    GRID,
    WINDOW,
    Kinds,
    Link,
    is_on_grid,
    n_states,
)
from mlxkv.prefix.marks import NEAR, end_marks, until
from mlxkv.prefix.match import Match
from mlxkv.prefix.on_disk.disk import PageDisk
from mlxkv.prefix.on_disk.writer import PageFiles
from mlxkv.prefix.pages import Pages
from tests.support.tiny import tokens as random_tokens

STATE = RecurrentSpec(n_channels=2, n_tail=1, n_heads=1, key_dim=1, value_dim=2)
SPECS: list[CacheSpec | None] = [STATE, CacheSpec(1, 2, 2), STATE]
STATE_BYTES = 2 * 4 * (2 + 2)


def spec_of_state() -> RecurrentSpec:
    assert isinstance(SPECS[0], RecurrentSpec)
    return SPECS[0]


@pytest.fixture
def heavy(monkeypatch):
    """States that take as much as the keys and values of 2,000 tokens."""
    spec = RecurrentSpec(n_channels=2, n_tail=1, n_heads=1, key_dim=1, value_dim=4000)
    monkeypatch.setitem(globals(), "SPECS", [spec, SPECS[1], spec])


def opened(folder: Path) -> Pages:
    files = PageFiles(folder, "f" * 64, DiskLimits(2**30, 0, 2**30))
    return Pages(kinds(), 2**30, None, lambda: PageDisk(files, kinds(), "float32"))


def kinds() -> Kinds:
    found = Kinds.of(SPECS)
    assert found is not None
    return found


class Sequence_:
    """A sequence that computes nothing."""

    def __init__(self, pages: Pages):
        self.pages, self.caches = (
            pages,
            make_caches(type("", (), {"cache_specs": lambda _: SPECS})()),
        )
        self.cutter = Cutter(pages, self.caches)
        self.tokens: list[int] = []

    def restore(self, tokens: list[int]) -> Match:
        match = self.pages.match(tokens, len(tokens) - 1)
        if match.n_tokens:
            assert self.pages.load(match, self.caches) is not None
        self.tokens = tokens[: match.n_tokens]
        self.cutter.restart(self.tokens)
        self.check()
        return match

    def feed(self, tokens: Sequence[int], marks: Sequence[int] = ()) -> Sequence_:
        """As a session does: chunks end at marks and on the grid."""
        done, self.cutter._marks = 0, marks
        while done < len(tokens):
            at = len(self.tokens)
            n = until(at, min(STEP, len(tokens) - done), marks)
            self._step(tokens[done : done + n])
            done += n
            self.cutter.advance(self.tokens, at + n)
        return self

    def _step(self, piece: Sequence[int]) -> None:
        at = len(self.tokens)
        self.tokens += piece
        kv = mx.array(np.array([[at + i, t] for i, t in enumerate(piece)], np.float32)[None, None])
        for cache in self.caches:
            if isinstance(cache, RecurrentCache):
                cache.store(self._state(), len(piece))
            else:
                cache.update(kv, -kv)

    def _state(self) -> tuple[mx.array, mx.array]:
        n, mixed = len(self.tokens), sum(t * (i % 97) for i, t in enumerate(self.tokens)) % 9973
        values = mx.array([float(n), float(mixed)])
        state = mx.concatenate([values, mx.zeros(spec_of_state().value_dim - 2)])
        return values[None, None], state[None, None, None]

    def finish(self) -> list[Link]:
        return self.cutter.finish(self.tokens, len(self.tokens))

    def check(self) -> None:
        """Every cache holds what these tokens make, and nothing else."""
        n = len(self.tokens)
        assert {cache.offset for cache in self.caches} == {n}
        if not n:
            return
        assert self.caches[1].read(0, n).k[0, 0, :, 1].tolist() == self.tokens
        for cache in (self.caches[0], self.caches[2]):
            for found, wanted in zip(cache.state, self._state(), strict=True):
                assert mx.array_equal(found, wanted)


def new_pages(budget: int = 2**30) -> Pages:
    return Pages(kinds(), budget)


def test_kinds_tell_states_from_windows():
    found = kinds()
    assert (found.full, found.window, found.states) == ((1,), (0, 2), True)
    assert Kinds.of([STATE, STATE]) is None
    assert Kinds.of([STATE, CacheSpec(1, 2, 2, 64), CacheSpec(1, 2, 2)]) is None


@pytest.mark.parametrize("n", [1, 100, STEP - 1, STEP, STEP + 1, 5 * STEP, 5 * STEP + 70])
def test_a_sequence_that_ended_is_gone_on_from_at_its_end(n):
    pages, tokens = new_pages(), random_tokens(n + 40)
    Sequence_(pages).feed(tokens[:n]).finish()
    assert Sequence_(pages).restore(tokens).n_tokens == n


@pytest.mark.parametrize("shared", [300, 512, 700, 701, 900, 1300])
def test_a_prompt_goes_on_at_the_deepest_state_that_it_shares(shared):
    """States at 10 and 700 tokens, where turns end, and at 1300, the end."""
    pages, tokens = new_pages(), random_tokens(1300)
    Sequence_(pages).feed(tokens, marks=(10, 700)).finish()
    other = tokens[:shared] + [t + 1000 for t in random_tokens(80)]
    expected = max(n for n in (10, 700, 1300) if n <= shared)
    one = Sequence_(pages)
    assert one.restore(other).n_tokens == expected
    one.feed(other[expected:]).finish()
    one.check()
    assert Sequence_(pages).restore([*other, 5]).n_tokens == len(other)
    assert Sequence_(pages).restore([*tokens, 5]).n_tokens == 1300


def test_a_turns_end_stays_when_the_page_around_it_is_complete():
    pages, tokens = new_pages(), random_tokens(2 * STEP)
    Sequence_(pages).feed(tokens, marks=(300,)).finish()
    fork = tokens[:310] + [7] * 50
    assert Sequence_(pages).restore(fork).n_tokens == 300


def test_the_grid_doubles_its_distance():
    assert [n for n in range(1, 40) if is_on_grid(n * GRID, 16 * GRID)] == [
        8,
        12,
        14,
        15,
        16,
        *range(17, 40),
    ]
    assert not is_on_grid(GRID + 1, GRID + 1) and not is_on_grid(0, GRID)
    assert n_states(16 * GRID + 5) == 2 + 5


def test_a_long_sequence_keeps_the_states_of_the_grid_and_goes_on_from_them():
    pages, tokens = new_pages(), random_tokens(6 * GRID + 9)
    links = Sequence_(pages).feed(tokens).finish()
    kept = [link.stop for link in links if pages.holds(link, WINDOW)]
    assert kept == [4 * GRID, 5 * GRID, 6 * GRID, len(tokens)]
    edited = tokens[: 4 * GRID + 700] + [3] * 900
    assert Sequence_(pages).restore(edited).n_tokens == 4 * GRID


def test_states_between_a_root_and_a_leaf_give_way_before_anything_else():
    pages, tokens = new_pages(), random_tokens(2 * GRID + 9)
    links = Sequence_(pages).feed(tokens).finish()
    pages.room.budget_bytes = pages.nbytes - 1
    pages.add(links[0], b"", {})
    assert [link.stop for link in links if pages.holds(link, WINDOW)] == [2 * GRID, len(tokens)]
    assert all(pages.holds(link, FULL) for link in links)


def test_states_come_back_from_disk(tmp_path):
    tokens = random_tokens(3 * STEP + 50)
    pages = opened(tmp_path)
    pages.match(tokens, len(tokens))
    Sequence_(pages).feed(tokens, marks=(2 * STEP, 600)).finish()
    pages.close()
    again = opened(tmp_path)
    assert Sequence_(again).restore([*tokens, 9]).n_tokens == len(tokens)
    assert Sequence_(again).restore([*tokens[:650], 9]).n_tokens == 600
    assert Sequence_(again).restore([*tokens[:550], 9]).n_tokens == 2 * STEP
    again.close()


def conversation(pages: Pages, tokens: list[int], ends: Sequence[int]) -> None:
    """Turns that end at these tokens, each in caches of its own."""
    for n in ends:
        one = Sequence_(pages)
        at = one.restore(tokens[: n + 1]).n_tokens
        one.feed(tokens[at:n]).finish()


def states_on_disk(pages: Pages) -> list[int]:
    assert pages.disk is not None
    pages.disk.flush()
    found = pages.disk.files.at.present()
    return sorted(key.n_tokens for key in found if key.part == WINDOW)


def test_a_killed_process_loses_less_than_a_page_of_a_conversation(tmp_path, heavy):
    tokens = random_tokens(1500)
    pages = opened(tmp_path)
    conversation(pages, tokens, [300])
    for n in (500, 530, 900, 1010, 1300):
        conversation(pages, tokens, [n])
        assert len(states_on_disk(pages)) <= 3  # the first, and two ends
        after_kill = Sequence_(opened(tmp_path)).restore(tokens)
        assert n - STEP < after_kill.n_tokens <= n
    before = states_on_disk(pages)
    conversation(pages, tokens, [1400])
    assert states_on_disk(pages) == before  # a state is near
    pages.close()


def test_an_end_that_two_conversations_went_on_from_stays_on_disk(tmp_path, heavy):
    tokens, ends = random_tokens(1500), (300, 600, 900, 1200, 1500)
    pages = opened(tmp_path)
    conversation(pages, tokens, ends[:2])
    other = [*tokens[:600], *random_tokens(100, seed=5)]
    conversation(pages, other, [650])
    for n in ends[2:]:
        conversation(pages, tokens, [n])
        states_on_disk(pages)
    assert Sequence_(opened(tmp_path)).restore([*tokens[:600], 7]).n_tokens == 600
    assert Sequence_(opened(tmp_path)).restore([*tokens[:900], 7]).n_tokens == 600
    pages.close()


def test_of_answers_that_were_left_nothing_stays_and_a_restart_goes_on(tmp_path, heavy):
    """As where a client leaves out what was thought: turns go on behind the last question."""
    tokens, pages = random_tokens(2000), opened(tmp_path)
    asked = range(300, 1900, 100)
    for i, n in enumerate(asked):
        one = Sequence_(pages)
        at = one.restore([*tokens[:n], -1]).n_tokens
        assert at == (asked[i - 1] if i else 0)
        thought = random_tokens(50, seed=i + 1)
        one.feed([*tokens[at:n], *thought], marks=(200, n)).finish()
        assert len(states_on_disk(pages)) <= 4
    pages.close()
    after = opened(tmp_path)
    # The system prompt's, that of the last question, and that of its answer.
    assert len(states_on_disk(after)) == 3
    assert Sequence_(after).restore([*tokens[:1850], 7]).n_tokens == 1800
    assert Sequence_(after).restore([*tokens[:250], 7]).n_tokens == 200
    after.close()


def test_one_prompt_is_not_written_at_its_end(tmp_path):
    tokens, pages = random_tokens(900), opened(tmp_path)
    conversation(pages, tokens, [600])
    assert not states_on_disk(pages)
    for i in range(3):  # questions behind a system prompt, which is at 600
        conversation(pages, [*tokens[:600], *random_tokens(300, seed=i + 1)], [900])
        # The first could be the next turn of a conversation.
        assert states_on_disk(pages) == [600 - 2 * STEP, 900 - 3 * STEP]
    pages.close()


def test_states_of_passed_turns_make_way_before_others(heavy):
    tokens, ends = random_tokens(1500), (300, 400, 500, 600, 700)
    pages = new_pages()
    conversation(pages, tokens, ends)
    other = random_tokens(300, seed=9)
    Sequence_(pages).feed(other).finish()
    conversation(pages, tokens, [800])
    pages.room.budget_bytes = pages.nbytes - 3 * 2 * 4 * 4000
    pages.room.fit()
    assert Sequence_(pages).restore([*other, 1]).n_tokens == 300
    assert [Sequence_(pages).restore([*tokens[:n], 7]).n_tokens for n in (300, 400, 800)] == [
        300,
        300,
        800,
    ]


def test_a_state_near_another_is_written_when_a_second_sequence_goes_on_from_it(tmp_path):
    pages, tokens = opened(tmp_path), random_tokens(3 * STEP)
    pages.match(tokens, len(tokens))
    Sequence_(pages).feed(tokens, marks=(580, 600)).finish()
    assert Sequence_(pages).restore([*tokens[:590], 0]).n_tokens == 580
    for n_loads in (1, 2):
        assert Sequence_(pages).restore([*tokens[:650], n_loads]).n_tokens == 600
        expected = [580 - 2 * STEP, 600 - 2 * STEP][:n_loads]
        assert [n for n in states_on_disk(pages) if n < STEP] == expected
    pages.clear()
    assert Sequence_(pages).restore([*tokens[:650], 9]).n_tokens == 600
    pages.close()


def test_marks_are_behind_the_first_and_the_last_turn_of_a_prompt():
    tokens = [1, 2, 9, 3, 9, 4, 9, 5]
    assert end_marks(tokens, {9}) == {3, 7}
    assert end_marks(tokens, ()) == {7}
    assert end_marks([9, *[1] * NEAR], {9}) == {1}
    assert end_marks([9, *[1] * (NEAR + 1)], {9}) == {1, NEAR + 1}
    assert end_marks([1, 2, 9], {9}) == {2}


def test_ends_of_turns_between_are_marks_at_distances_that_double():
    tokens = ([1] * 199 + [9]) * 20 + [1] * 5
    assert end_marks(tokens, {9}) == {200, 1800, 3000, 3600, 4000}


def test_chunks_end_at_marks_and_on_the_grid():
    assert until(0, 5000, {10, 3000}) == 10
    assert until(10, 5000, {10, 3000}) == GRID - 10
    assert until(GRID, 5000, {10, 3000}) == 3000 - GRID
    assert until(3000, 20, {10, 3000}) == 20
