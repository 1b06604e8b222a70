"""The contract of a KV cache, run on every kind against attention that forgets nothing:
schedules, rewind, read. test_cache_books.py has the rest of the contract.
"""

from __future__ import annotations

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings

from mlxkv.errors import UsageError
from mlxkv.kv.layout import windowed_mask
from mlxkv.kv.storage import dense
from mlxkv.nn.attention import attend
from tests.support.cache_drive import (
    GROWING,
    Drive,
    assert_untouched,
    every_kind,
    every_window,
    rotating,
    snapshot,
)


def split(total: int, chunk: int) -> list[int]:
    return [min(chunk, total - i) for i in range(0, total, chunk)]


# Every schedule crosses several steps of 256; together they stop before, at and after the wrap of
# every window in KINDS.
SCHEDULES = {
    "whole": [1000],
    "whole-then-singles": [700] + [1] * 12,
    "chunks-of-7": split(700, 7),
    "chunks-of-255": [255] * 5,
    "chunks-of-256": [256] * 5,
    "chunks-of-257": [257] * 5,
    "chunks-of-2": [2] * 12 + [600] + [2] * 12,
    "mixed": [3, 1, 1, 250, 1, 1, 1, 7, 300, 2, 1, 256, 1, 1, 5, 5, 1, 600, 1, 1, 255, 257, 1],
    "turns": ([30] + [1] * 9) * 4 + ([200] + [1] * 7) * 3,
    "single-then-whole": [1, 700, 1, 1],
    "at-the-step": [254, 1, 1, 1, 253, 1, 1, 1, 255, 1, 256, 1, 1],
}


@every_kind
@pytest.mark.parametrize("chunks", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_gives_windowed_attention(kind, chunks):
    Drive(kind).feed_all(chunks)


@every_kind
def test_single_tokens_give_windowed_attention_through_two_steps_and_the_wrap(kind):
    Drive(kind).feed_all([1] * 640)


@every_window
@pytest.mark.parametrize("around", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("L", [1, 2, 5, 256])
def test_a_chunk_just_before_at_and_after_the_wrap(kind, around, L):
    before = max(1, kind.window + around)
    Drive(kind).feed_all([before, L, 1, L, 1, 1])
    if before <= 8:
        Drive(kind).feed_all([1] * before + [L, 1, L, 1, 1])


@every_window
def test_a_chunk_onto_a_ring_that_wrapped_anywhere(kind):
    for turned in {0, 1, 2, kind.window // 2, kind.window - 1}:
        Drive(kind).feed_all([kind.window] + [1] * turned + [4, 1, 3])


@every_kind
def test_keys_and_values_of_different_width_and_two_sequences(kind):
    drive = Drive(kind, B=2, H=3, k_dim=6, v_dim=2)
    drive.feed_all([250, 1, 1, 7, 300, 1, 256, 2])
    last = drive.offset
    drive.check_read(last - 1, last)


@every_kind
def test_the_mask_hides_nothing_from_a_single_token(kind):
    drive = Drive(kind)
    for L in (1, 1, 300, 1, 300):
        assert drive.cache.mask(1) is None
        drive.feed(L)


@every_kind
def test_the_mask_fits_what_attention_takes(kind):
    drive = Drive(kind, B=2, H=1, k_dim=8, v_dim=8)
    drive.feed_all([300, 1])
    q, k, v = (mx.array(drive.rows(5, 8)) for _ in range(3))
    mask = drive.cache.mask(5)
    keys, values = drive.cache.update(k, v)
    out = attend(q, keys, values, 8**-0.5, mask)
    drive.reference.append(*kind.kept(np.array(k), np.array(v)))
    # float32 arithmetic here, so 1e-5 in place of TOLERANCE.
    np.testing.assert_allclose(np.array(out), drive.reference.attend(np.array(q)), atol=1e-5)


def test_a_windowed_mask_shows_the_last_window_keys_of_each_query():
    got = np.array(windowed_mask(3, 2, 3)).astype(int).tolist()
    assert got == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


# Rewind


@every_kind
@pytest.mark.parametrize("last", [1, 2, 5, 40], ids=lambda n: f"last-{n}")
def test_rewind_to_every_offset_answers_exactly_and_continues_like_the_reference(kind, last):
    # A window of W: full but not yet wrapped, just wrapped, and wrapped more than once.
    window = kind.window or 20
    wide = window > 20
    for total in sorted({last, last + 3, window, window + 1, 2 * window + 3}):
        # In a wide window the middle of a chunk is like its neighbours: its ends and both sides.
        near = (0, 1, 2, last - 1, last, last + 1) if wide else range(last + 4)
        far = (0, 1, total - window, total // 2)
        for offset in sorted({o for o in (*(total - n for n in near), *far) if 0 <= o <= total}):
            drive = Drive(kind)
            for L in (total - last, last):
                if L > 0:  # the same for every offset, and compared by the schedules above
                    drive.feed(L, compare=False)
            drive.rewind(offset)
            drive.feed_all([1, 3, 1])


@every_window
def test_rewind_gives_back_the_whole_of_a_chunk_that_went_past_the_window(kind):
    for L in (2, 9, 300):
        drive = Drive(kind).feed_all([kind.window + 5, L])
        start = drive.offset - L
        assert drive.rewind(start)
        drive.feed_all([1, 1, L, 1])


@every_window
def test_rewind_twice_within_a_chunk(kind):
    drive = Drive(kind).feed_all([kind.window + 5, 1, 1, 30])
    assert drive.rewind(drive.offset - 10)
    drive.feed(1) if kind.window < 3 else None
    drive.rewind(drive.offset - 5)
    drive.feed_all([2, 1, 1, 4])


@every_window
def test_rewind_by_one_after_a_single_token_and_no_further(kind):
    drive = Drive(kind).feed_all([kind.window + 5] + [1] * 9)
    if kind.window > 1:  # a window of 1 needs no earlier token, wherever it stands
        assert not drive.rewind(drive.offset - 2)
        assert not drive.rewind(1)
    assert drive.rewind(drive.offset - 1)
    drive.feed_all([1, 1, 6, 1])


@every_kind
def test_rewind_to_zero_always_works_and_starts_afresh(kind):
    drive = Drive(kind).feed_all([700, 1, 1])
    assert drive.rewind(0)
    assert drive.cache.state == []
    assert len(drive.cache) == 0
    drive.feed_all([5, 1, 300, 1])


@every_kind
def test_rewind_to_where_it_stands_changes_nothing(kind):
    drive = Drive(kind).feed_all([300, 1, 1])
    before = snapshot(drive.cache)
    assert drive.cache.rewind(drive.offset)
    assert_untouched(drive.cache, before)
    assert kind.make(None).rewind(0)


@every_kind
def test_rewind_ahead_or_below_zero_is_a_usage_error_and_changes_nothing(kind):
    drive = Drive(kind).feed_all([30, 1])
    before = snapshot(drive.cache)
    for offset in (-1, 32, 1000):
        with pytest.raises(UsageError, match=str(offset)):
            drive.cache.rewind(offset)
        assert_untouched(drive.cache, before)


# Read


@every_kind
def test_read_returns_what_was_given_wherever_it_is_held(kind):
    drive = Drive(kind, k_dim=3, v_dim=2)
    for L in [5, 1, 1, 300, 1, 1, 1, 9, 256, 1, 1]:
        drive.feed(L)
        stop = drive.offset
        first = 0 if kind.window is None else max(0, stop - kind.window)
        middle = (first + stop) // 2
        for piece in [(first, stop), (middle, stop), (first, middle), (stop - 1, stop)]:
            drive.check_read(*piece)
        if kind.window is not None and L > 1:
            drive.check_read(max(0, stop - L - (kind.window - 1)), stop)


@every_kind
def test_read_of_tokens_that_are_gone_or_ahead_is_a_usage_error(kind):
    drive = Drive(kind).feed_all([700, 1])
    for start, stop in [(700, 702), (701, 702), (-1, 3), (5, 4), (-3, -1)]:
        with pytest.raises(UsageError):
            drive.cache.read(start, stop)
    if kind.window is not None:
        with pytest.raises(UsageError):
            drive.cache.read(drive.offset - kind.window - 1, drive.offset)
        with pytest.raises(UsageError):
            drive.cache.read(0, 1)
    drive.check_read(drive.offset - 1, drive.offset)


@every_kind
def test_read_after_rewind_ends_at_the_new_offset(kind):
    drive = Drive(kind).feed_all([20, 10])
    assert drive.rewind(25)
    with pytest.raises(UsageError):
        drive.cache.read(25, 26)
    drive.check_read(24, 25)


@every_kind
def test_reading_nothing_is_allowed_on_an_empty_cache(kind):
    piece = kind.make(kind.spec(2, 4, 3)).read(0, 0)
    assert [x.shape[2] for x in piece.arrays] == [0] * len(piece.arrays)
    with pytest.raises(UsageError):
        kind.make(None).read(0, 1)


@every_kind
def test_what_was_handed_out_stays_as_it_was_when_the_cache_moves_on(kind):
    for chunks in ([256], [1] * 3, [40], [600, 1], [300, 20]):
        drive = Drive(kind, k_dim=3).feed_all(chunks)
        k, v = drive.rows(1, 3), drive.rows(1, 2)
        returned = drive.cache.update(mx.array(k), mx.array(v))
        drive.reference.append(*kind.kept(k, v))
        stop = drive.offset
        piece = drive.cache.read(stop - 1, stop)
        whole = drive.cache.read(stop - len(drive.cache), stop)
        handed = [*returned, *drive.cache.state, *piece.arrays, *whole.arrays]
        then = [np.array(dense(a)) for a in handed]
        drive.feed_all([1, 1, 3, 1])
        for array, before in zip(handed, then, strict=True):
            np.testing.assert_array_equal(np.array(dense(array)), before)


@every_kind
def test_what_was_handed_in_is_never_written_to(kind):
    cache = kind.make(None)
    given = [mx.random.normal((1, 1, L, 2)) for L in (300, 4, 1)]
    then = [np.array(a) for a in given]
    for a in given:
        cache.update(a, a)
    for _ in range(3):
        cache.update(mx.zeros((1, 1, 1, 2)), mx.zeros((1, 1, 1, 2)))
    for array, before in zip(given, then, strict=True):
        np.testing.assert_array_equal(np.array(array), before)


# Random schedules

feeds = st.tuples(st.just("feed"), st.one_of(st.just(1), st.integers(2, 12), st.integers(200, 300)))
rewinds = st.tuples(st.just("rewind"), st.floats(0, 1))
rewinds_by = st.tuples(st.just("back"), st.integers(0, 12))
resets = st.tuples(st.just("reset"), st.integers(1, 2))
schedules = st.lists(st.one_of(feeds, feeds, feeds, rewinds, rewinds_by, resets), max_size=14)
windows = st.one_of(st.none(), st.integers(1, 12), st.sampled_from([255, 256, 257, 300]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(window=windows, schedule=schedules)
def test_any_schedule_of_feeds_rewinds_and_resets_gives_windowed_attention(window, schedule):
    drive = Drive(GROWING if window is None else rotating(window))
    for action, n in schedule:
        if action == "feed":
            drive.feed(n)
        elif action == "rewind":
            drive.rewind(round(n * drive.offset))
        elif action == "back":
            drive.rewind(max(0, drive.offset - n))
        else:
            drive.reset(B=n)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    window=st.one_of(st.none(), st.integers(1, 12), st.just(257)),
    chunks=st.lists(st.one_of(st.just(1), st.integers(2, 20), st.just(256)), max_size=8),
    data=st.data(),
)
def test_any_held_range_reads_back_exactly(window, chunks, data):
    drive = Drive(GROWING if window is None else rotating(window)).feed_all(chunks)
    stop = data.draw(st.integers(0, drive.offset))
    start = data.draw(st.integers(max(0, min(stop, drive.held_from)), stop))
    if start < stop:
        drive.check_read(start, stop)
