"""Prefix pages in RAM: what is found, what comes back, what is given up first.

No model: the KV of a token is its position and id, so that a test sees *what* came back.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxkv.cache import make_cache
from mlxkv.kv.types import KV_TYPES, STEP, CacheSpec
from mlxkv.prefix.capture import Cutter
from mlxkv.prefix.layout import FULL, WINDOW, Kinds, Link, n_common, token_bytes
from mlxkv.prefix.match import WORTH, Match
from mlxkv.prefix.pages import Pages
from mlxkv.prefix.ram import SPARE
from tests.support.tiny import tokens as random_tokens

BIG = 2**30
ROW = 2 * 2 * 4
"""Bytes of one token in one layer here: one head, two values of 4 bytes in key and value."""

SHAPES = {
    "full": (None, None),
    "window": (512, 512),
    "window-of-a-page": (256,),
    "odd-window": (300,),
    "mixed": (512, None, 512),
    "small-window": (None, 24),
    "two-windows": (40, None, 600),
    "window-of-one": (None, 1),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def specs(shape: Sequence[int | None]) -> list[CacheSpec]:
    return [CacheSpec(1, 2, 2, window) for window in shape]


def new_pages(shape: Sequence[int | None], budget: int = BIG) -> Pages:
    kinds = Kinds.of(specs(shape))
    assert kinds is not None
    return Pages(kinds, budget)


class Sequence_:
    """A sequence that computes nothing: its KV says which token it is of."""

    def __init__(self, pages: Pages, shape: Sequence[int | None]):
        self.pages = pages
        self.caches = [make_cache(spec) for spec in specs(shape)]
        self.cutter = Cutter(pages, self.caches)
        self.tokens: list[int] = []

    def restore(self, tokens: list[int], limit: int | None = None) -> Match:
        match = self.pages.match(tokens, len(tokens) - 1 if limit is None else limit)
        if match.n_tokens:
            assert self.pages.load(match, self.caches) == 0
        self.tokens = tokens[: match.n_tokens]
        rows = self.pages.rows_before(match.links[-1], match.n_tokens) if match.links else None
        self.cutter.restart(self.tokens, rows)
        self.check()
        return match

    def feed(self, tokens: Sequence[int], chunk: int = STEP) -> Sequence_:
        for start in range(0, len(tokens), chunk):
            piece = list(tokens[start : start + chunk])
            at = len(self.tokens)
            self.tokens += piece
            kv = np.array([[at + i, token] for i, token in enumerate(piece)], np.float32)
            for cache in self.caches:
                cache.update(mx.array(kv[None, None]), mx.array(-kv[None, None]))
            n = len(self.tokens)
            if chunk > 1 or self.cutter.is_due(n):
                self.cutter.advance(self.tokens, n)
        return self

    def finish(self) -> list[Link]:
        return self.cutter.finish(self.tokens, len(self.tokens))

    def check(self) -> None:
        """Every cache holds the KV of exactly these tokens, as far back as its window needs."""
        n = len(self.tokens)
        for cache in self.caches:
            spec = cache.spec
            assert spec is not None
            assert cache.offset == n
            first = 0 if spec.window is None else max(0, n - (spec.window - 1))
            if first == n:
                continue
            held = cache.read(first, n)
            expected = np.array(
                [[i, token] for i, token in enumerate(self.tokens)][first:], np.float32
            )
            np.testing.assert_array_equal(np.array(held.k)[0, 0], expected)
            np.testing.assert_array_equal(np.array(held.v)[0, 0], -expected)


def told(pages: Pages, shape, tokens: Sequence[int], chunk: int = STEP) -> list[Link]:
    """A sequence computed from the start, or from what is known, and given away."""
    one = Sequence_(pages, shape)
    n = one.restore(list(tokens)).n_tokens
    return one.feed(tokens[n:], chunk).finish()


def fork(tokens: Sequence[int], at: int, n: int = 30) -> list[int]:
    return [*tokens[:at], *(token + 1000 for token in random_tokens(n, seed=at))]


def given_back(at: int) -> int:
    """Tokens that come back of `at` shared ones."""
    return at if at % STEP >= WORTH else at // STEP * STEP


# What is found.


@every_shape
@pytest.mark.parametrize("chunk", [1, 7, 256, 300, 2048])
def test_any_divergence_gives_back_all_that_is_shared(shape, chunk):
    pages, tokens = new_pages(shape), random_tokens(1400)
    told(pages, shape, tokens, chunk)
    for at in (1, 15, 16, 255, 256, 257, 511, 512, 700, 1023, 1024, 1025, 1280, 1399):
        match = Sequence_(pages, shape).restore(fork(tokens, at))
        assert match.n_tokens == given_back(at)
        assert match.shared == at


@every_shape
def test_a_sequence_goes_on_from_its_tip_to_the_token(shape):
    pages, tokens = new_pages(shape), random_tokens(900)
    for n in (90, 256, 300, 301, 600, 900):
        before = Sequence_(pages, shape)
        match = before.restore(tokens[:n], limit=n)
        before.feed(tokens[match.n_tokens : n], 40).finish()
        assert Sequence_(pages, shape).restore([*tokens[:n], 5, 6]).n_tokens == n


@every_shape
def test_one_token_is_left_to_compute(shape):
    pages, tokens = new_pages(shape), random_tokens(600)
    told(pages, shape, tokens)
    assert Sequence_(pages, shape).restore(tokens[:512]).n_tokens == 511
    assert Sequence_(pages, shape).restore(tokens[:513]).n_tokens == 512
    assert Sequence_(pages, shape).restore(tokens).n_tokens == 599
    assert Sequence_(pages, shape).restore([*tokens, 1]).n_tokens == 600


@every_shape
@given(
    turns=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 400), st.sampled_from([1, 64, 256, 2048])),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=15)
def test_what_comes_back_is_what_was_computed(shape, turns):
    """Sequences that fork off one another anywhere: `restore` checks every row."""
    pages = new_pages(shape)
    known: list[list[int]] = [[]]
    for parent, n, chunk in turns:
        trunk = known[parent % len(known)]
        tokens = [*trunk[: len(trunk) * 2 // 3 + n % 7], *random_tokens(n, seed=n)]
        one = Sequence_(pages, shape)
        shared = max(
            (n_common(token_bytes(tokens), token_bytes(other)) for other in known), default=0
        )
        match = one.restore(tokens)
        assert min(shared, len(tokens) - 1) - match.n_tokens < WORTH
        one.feed(tokens[match.n_tokens :], chunk).finish()
        known.append(tokens)


def test_nothing_is_found_where_nothing_is_known():
    assert new_pages((None,)).match([1, 2, 3] * 200, 599) == Match()


def test_a_page_of_another_chain_is_not_taken_for_this_ones():
    shape = (None, 512)
    pages, tokens = new_pages(shape), random_tokens(800)
    told(pages, shape, tokens)
    other = [7] * 256 + tokens[256:]
    assert Sequence_(pages, shape).restore(other).n_tokens == 0


def test_no_more_is_shared_than_is_stable():
    kinds = Kinds.of(specs((None,)))
    assert kinds is not None
    pages, tokens = Pages(kinds, BIG, stable=600), random_tokens(900)
    told(pages, (None,), tokens)
    assert Sequence_(pages, (None,)).restore([*tokens, 1]).n_tokens == 600


# Where a prompt left what is known.


def test_a_match_says_where_the_prompt_left_what_is_known():
    shape = (None, 512)
    pages, tokens = new_pages(shape), random_tokens(900)
    told(pages, shape, tokens)
    match = pages.match(fork(tokens, 610), 639)
    assert (match.n_tokens, match.shared, match.n_known) == (610, 610, 900)
    assert list(match.held) == tokens[610:900]


@every_shape
def test_a_prompt_that_leaves_at_a_page_is_told_what_was_there(shape):
    pages, tokens = new_pages(shape), random_tokens(900)
    told(pages, shape, tokens)
    match = pages.match(fork(tokens, 512), 541)
    assert (match.n_tokens, match.shared, match.n_known) == (512, 512, 900)
    assert list(match.held) == tokens[512:900]


def test_the_closest_of_several_sequences_is_the_one_it_is_compared_with():
    shape = (None,)
    pages, tokens = new_pages(shape), random_tokens(700)
    for at in (20, 300, 340, 290):
        told(pages, shape, fork(tokens, at))
    assert pages.match(tokens, 699).shared == 340


# What is given up.


def page_bytes(shape) -> int:
    return len(shape) * STEP * ROW


def test_bytes_are_those_of_the_arrays_held():
    shape = (512, None, 512)
    pages, tokens = new_pages(shape), random_tokens(1000)
    told(pages, shape, tokens)
    assert pages.nbytes == len(shape) * 1000 * ROW
    before = pages.nbytes
    told(pages, shape, tokens)
    assert pages.nbytes == before


def test_shared_pages_are_held_once():
    shape = (None,)
    pages, tokens = new_pages(shape), random_tokens(1024)
    told(pages, shape, tokens)
    told(pages, shape, fork(tokens, 1024, 256))
    assert pages.nbytes == (1024 + 256) * ROW


def test_far_window_parts_are_given_up_first_and_tips_still_resume():
    shape = (None, 512, 512, 512)
    pages = new_pages(shape)
    old, new = random_tokens(3000, seed=1), random_tokens(3000, seed=2)
    told(pages, shape, old)
    told(pages, shape, new)
    pages.room.budget_bytes = pages.nbytes * 6 // 10
    told(pages, shape, random_tokens(10, seed=3))
    assert pages.nbytes <= pages.room.budget_bytes
    for tokens in (old, new):
        assert Sequence_(pages, shape).restore([*tokens, 1, 2]).n_tokens == 3000


def test_a_fork_keeps_the_window_parts_before_it():
    shape = (None, 512, 512, 512)
    pages, tokens = new_pages(shape), random_tokens(3000)
    told(pages, shape, tokens)
    told(pages, shape, fork(tokens, 1536, 600))
    pages.room.budget_bytes = pages.nbytes * 6 // 10
    told(pages, shape, [1] * 10)
    assert Sequence_(pages, shape).restore(fork(tokens, 1540, 31)).n_tokens == 1536
    assert Sequence_(pages, shape).restore(fork(tokens, 1500, 31)).n_tokens == 1500
    assert Sequence_(pages, shape).restore(fork(tokens, 800)).n_tokens < 768


def test_of_the_window_parts_of_a_long_trunk_some_stay_till_last():
    shape = (None, 512, 512, 512)
    pages, tokens = new_pages(shape), random_tokens(12_000)
    told(pages, shape, tokens)
    full = 12_000 * ROW
    pages.room.budget_bytes = full + (pages.nbytes - full) // 4
    told(pages, shape, [1] * 10)
    restored = [
        Sequence_(pages, shape).restore(fork(tokens, at)).n_tokens
        for at in range(1000, 12_000, 1000)
    ]
    lost = [at - n for at, n in zip(range(1000, 12_000, 1000), restored, strict=True)]
    assert max(lost) <= 8 * 512 + STEP
    assert max(lost) > STEP, "the budget is not tight"


@every_shape
def test_the_least_recently_used_sequence_goes_first(shape):
    pages = new_pages(shape)
    talks = [random_tokens(900, seed=seed) for seed in range(6)]
    for tokens in talks[:4]:
        told(pages, shape, tokens)
    pages.room.budget_bytes = pages.nbytes // 2
    Sequence_(pages, shape).restore([*talks[0], 1])
    for tokens in talks[4:]:
        told(pages, shape, tokens)
    assert pages.nbytes <= pages.room.budget_bytes
    left = [Sequence_(pages, shape).pages.match([*t, 1], 900).n_tokens for t in talks]
    in_order_of_use = [left[i] for i in (1, 2, 3, 0, 4, 5)]
    assert in_order_of_use == sorted(in_order_of_use)
    assert left[5] == 900


def test_leaves_go_before_their_trunk():
    shape = (None,)
    pages, tokens = new_pages(shape), random_tokens(2048)
    told(pages, shape, tokens)
    pages.room.budget_bytes = 5 * page_bytes(shape)
    told(pages, shape, [1] * 5)
    n = Sequence_(pages, shape).restore([*tokens, 1]).n_tokens
    assert n == 4 * STEP  # the small sequence has a page of its own, of five tokens


def test_pinned_pages_stay():
    shape = (None, 512)
    pages = new_pages(shape, 9 * page_bytes((None, 512)))
    kept = random_tokens(900, seed=1)
    pages.ram.pin(link.name for link in told(pages, shape, kept))
    for seed in range(2, 8):
        told(pages, shape, random_tokens(900, seed=seed))
    assert Sequence_(pages, shape).restore([*kept, 1]).n_tokens == 900


def arrays_in(value: object) -> set[int]:
    """Every MLX array that a page holds, by identity."""
    if isinstance(value, mx.array):
        return {id(value)}
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return set().union(*map(arrays_in, value))
    names = getattr(type(value), "__dataclass_fields__", ())
    return set().union(*(arrays_in(getattr(value, name)) for name in names))


@pytest.mark.parametrize("kv_type", KV_TYPES)
@every_shape
def test_a_page_holds_one_array_a_part(shape, kv_type):
    pages = new_pages(shape)
    caches = [make_cache(spec, kv_type) for spec in specs(shape)]
    cutter = Cutter(pages, caches)
    tokens = random_tokens(600)
    for start in range(0, 600, 100):
        kv = mx.zeros((1, 1, 100, 2), mx.bfloat16)
        for cache in caches:
            cache.update(kv, kv)
        cutter.advance(tokens, start + 100)
    cutter.finish(tokens, 600)
    held = [page for page in pages.ram if page.parts]
    assert len(held) == 3
    assert all(len(arrays_in(page)) == len(page.parts) <= 2 for page in held)
    assert pages.ram.n_arrays == sum(len(page.parts) for page in held)


@every_shape
def test_arrays_are_given_up_by_count_as_well(shape):
    """Tips of three tokens, which take next to no bytes."""
    pages = new_pages(shape)
    n_parts = len(pages.kinds.parts)
    pages.room.max_arrays = 10 * n_parts
    talks = [random_tokens(3, seed=seed) for seed in range(30)]
    for n_known, tokens in enumerate(talks, start=1):
        told(pages, shape, tokens)
        assert pages.ram.n_arrays == n_parts * min(n_known, 10)
    known = [len(pages.match([*tokens, 1], 3).links) > 0 for tokens in talks]
    assert known == [False] * 20 + [True] * 10


def test_of_many_arrays_some_more_than_must_are_given_up_at_once():
    shape = (None,)
    pages = new_pages(shape)
    pages.room.max_arrays = 2 * SPARE
    for seed in range(2 * SPARE + 1):
        told(pages, shape, random_tokens(3, seed=seed))
    assert pages.ram.n_arrays == 2 * SPARE - 2


@every_shape
def test_a_bound_of_no_arrays_keeps_nothing(shape):
    pages = new_pages(shape)
    pages.room.max_arrays = 0
    told(pages, shape, random_tokens(900))
    assert (pages.nbytes, pages.ram.n_arrays, len(pages.ram)) == (0, 0, 0)


@every_shape
def test_a_budget_of_nothing_keeps_nothing(shape):
    pages = new_pages(shape, 0)
    told(pages, shape, random_tokens(900))
    assert (pages.nbytes, len(pages.ram)) == (0, 0)
    assert Sequence_(pages, shape).restore(random_tokens(900)).n_tokens == 0


@pytest.mark.parametrize("shape", [(None,), (None, 512, 512, 512, 512, 512)], ids=["full", "mixed"])
def test_two_long_conversations_in_turn_keep_their_hits(shape):
    """50 turns of 150 tokens, every second one another conversation's.

    The budget holds both histories' full parts and a third of all window parts: what each turn
    computes is its own new tokens, at least 98% of all that it could have restored.
    """
    longest = 25 * 150
    full, window = shape.count(None), len(shape) - shape.count(None)
    pages = new_pages(shape, 2 * (longest + STEP) * ROW * full + 2 * longest * ROW * window // 3)
    talks = [random_tokens(longest, seed=1), random_tokens(longest, seed=2)]
    restored = possible = 0
    for turn in range(50):
        tokens = talks[turn % 2][: (turn // 2 + 1) * 150]
        one = Sequence_(pages, shape)
        match = one.restore(tokens)
        one.feed(tokens[match.n_tokens : -20]).feed(tokens[-20:], 1).finish()
        restored += match.n_tokens
        possible += (turn // 2) * 150
        assert pages.nbytes <= pages.room.budget_bytes
    assert restored >= 0.98 * possible


def test_a_dropped_window_part_costs_a_hit_and_never_a_wrong_one():
    shape = (None, 512)
    pages, tokens = new_pages(shape), random_tokens(1500)
    links = told(pages, shape, tokens)
    page = pages.ram.get(links[2].name)
    assert page is not None
    pages.ram.drop(page, [WINDOW])
    assert set(page.parts) == {FULL}
    # Page 2 is in the window of [512, 1280): from there on it is not needed.
    for at, expected in (
        (500, 500),
        (600, 512),
        (800, 512),
        (1100, 512),
        (1290, 1280),
        (1400, 1400),
    ):
        assert Sequence_(pages, shape).restore(fork(tokens, at)).n_tokens == expected


@pytest.mark.parametrize("n_tokens", [STEP, 300, 20])
@pytest.mark.parametrize("heads", [1, 2])
def test_what_was_loaded_keeps_no_page_alive(heads, n_tokens):
    """Up to 16 KiB an array, below which MLX's `contiguous` makes no copy."""
    wide = [CacheSpec(heads, 64, 64, window) for window in (None, 40, None)]
    kinds = Kinds.of(wide)
    assert kinds is not None
    before = mx.get_active_memory()
    pages, tokens = Pages(kinds, BIG), random_tokens(n_tokens)
    caches = [make_cache(spec) for spec in wide]
    cutter = Cutter(pages, caches)
    kv = mx.random.normal((1, heads, n_tokens, 64))
    for start in range(0, n_tokens, STEP):
        for cache in caches:
            cache.update(kv[:, :, start : start + STEP], kv[:, :, start : start + STEP])
        cutter.advance(tokens, caches[0].offset)
    cutter.finish(tokens, n_tokens)
    for cache in caches:
        cache.reset()
    del kv, cutter
    assert mx.get_active_memory() - before <= pages.nbytes + 2**14
    match = pages.match([*tokens, 1], n_tokens)
    assert match.n_tokens == n_tokens and pages.load(match, caches) == 0
    pages.clear()
    assert mx.get_active_memory() - before <= sum(cache.nbytes for cache in caches) + 2**14


def test_pages_of_other_shapes_are_dropped_and_not_loaded():
    pages, tokens = new_pages((None,)), random_tokens(600)
    told(pages, (None,), tokens)
    match = pages.match(tokens, 599)
    foreign = [make_cache(CacheSpec(3, 2, 2))]
    assert pages.load(match, foreign) is None
    assert pages.match(tokens, 599).n_tokens == 0


def test_a_state_that_is_no_kv_has_no_pages():
    assert Kinds.of([CacheSpec(1, 2, 2), CacheSpec(0, 0, 0)]) is None
    assert Kinds.of([None, None]) is None
