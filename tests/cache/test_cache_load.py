"""A cache that is loaded from slices goes on as the one that they were read from."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings

from mlxkv.errors import UsageError
from mlxkv.kv.layout import Slice
from mlxkv.kv.types import CacheSpec, KVFormat
from tests.support.cache_drive import (
    GROWING,
    Drive,
    assert_untouched,
    every_kind,
    rotating,
    snapshot,
)


def slices(drive: Drive, start: int, cuts: list[int]) -> list[Slice]:
    """What the cache holds from `start` on, cut into slices as pages are."""
    bounds = sorted({start, drive.offset, *(c for c in cuts if start < c < drive.offset)})
    return [drive.cache.read(a, b) for a, b in itertools.pairwise(bounds)]


def spec_of(drive: Drive) -> CacheSpec:
    return drive.kind.spec(drive.H, drive.k_dim, drive.v_dim)


def reload(drive: Drive, parts: list[Slice], spec: CacheSpec | None = None, room: int = 0) -> None:
    """Goes on with a new cache that has been loaded."""
    drive.cache = drive.kind.make(spec or spec_of(drive))
    drive.cache.load(parts, room)
    window = drive.kind.window
    n_held = drive.offset if window is None else min(drive.offset - parts[0].start, window)
    drive.held_from = drive.offset - n_held
    drive.check_books()
    assert drive.cache.first == drive.held_from
    drive.check_read(drive.held_from, drive.offset)


@every_kind
@given(
    before=st.lists(st.sampled_from([1, 2, 3, 7, 255, 256, 257, 300]), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 1200), max_size=4),
    after=st.lists(st.sampled_from([1, 1, 2, 5, 256, 257]), min_size=1, max_size=5),
    room=st.sampled_from([0, 1, 200, 256]),
)
@settings(max_examples=25)
def test_a_loaded_cache_goes_on_like_the_reference(kind, before, cuts, after, room):
    drive = Drive(kind).feed_all(before)
    reload(drive, slices(drive, drive.cache.first, cuts), room=room)
    drive.feed_all(after)


@every_kind
def test_rows_older_than_the_window_may_be_missing(kind):
    drive = Drive(kind).feed_all([700])
    needed = 0 if kind.window is None else max(0, 700 - (kind.window - 1))
    if needed == 700:  # a window of one token sees itself alone
        needed = 699
    reload(drive, slices(drive, needed, [512]))
    drive.feed_all([1, 1, 30, 1])


@every_kind
def test_a_loaded_cache_allocates_what_its_spec_says(kind):
    spec = kind.spec(2, 4, 6)
    for n in (1, 255, 256, 257, 700):
        drive = Drive(kind, H=2, k_dim=4, v_dim=6, spec=spec).feed_all([n])
        reload(drive, slices(drive, drive.cache.first, [200, 400]), spec)
        assert drive.cache.nbytes == spec.nbytes(n, KVFormat(kind.kv_type, 4))


@every_kind
def test_what_comes_next_has_room(kind):
    spec = kind.spec(2, 4, 6)
    for n, room in ((200, 56), (200, 57), (255, 256), (512, 1)):
        drive = Drive(kind, H=2, k_dim=4, v_dim=6, spec=spec).feed_all([n])
        reload(drive, slices(drive, drive.cache.first, []), spec, room)
        assert drive.cache.nbytes == spec.nbytes(n + room, KVFormat(kind.kv_type, 4))
        drive.feed_all([1] * min(room, 60))
        assert drive.cache.nbytes == spec.nbytes(n + room, KVFormat(kind.kv_type, 4))


@every_kind
def test_loading_replaces_what_was_held(kind):
    drive = Drive(kind, spec=kind.spec(1, 2, 2)).feed_all([300, 1])
    parts = slices(drive, drive.cache.first, [256])
    drive.cache.update(mx.zeros((1, 1, 20, 2)), mx.zeros((1, 1, 20, 2)))
    drive.cache.load(parts)
    drive.check_read(drive.cache.first, drive.offset)
    drive.held_from = drive.cache.first
    drive.feed_all([1, 3])


@every_kind
def test_what_was_loaded_stays_as_it_was(kind):
    """A page may be loaded many times: no cache writes into it."""
    drive = Drive(kind).feed_all([256])
    parts = slices(drive, drive.cache.first, [])
    before = [np.array(x) for part in parts for x in part.arrays]
    for _ in range(2):
        cache = kind.make(spec_of(drive))
        cache.load(parts)
        for L in (1, 2, 1):
            cache.update(mx.ones((1, 1, L, 2)), mx.ones((1, 1, L, 2)))
            mx.eval(cache.state)
        if cache.offset > 256:
            cache.rewind(cache.offset)
    for x, then in zip((x for part in parts for x in part.arrays), before, strict=True):
        np.testing.assert_array_equal(np.array(x), then)


@pytest.mark.parametrize("kind", [GROWING, rotating(8)], ids=lambda kind: kind.name)
def test_gaps_and_foreign_shapes_are_refused(kind):
    drive = Drive(kind).feed_all([40])
    late = [drive.cache.read(36, 38), drive.cache.read(39, 40)]
    short = [drive.cache.read(36, 40)]
    cache = kind.make(kind.spec(1, 2, 2))
    for parts, words in ((late, "go on from 38"), (short, "missing")):
        with pytest.raises(UsageError, match=words):
            cache.load(parts)
    with pytest.raises(UsageError, match="do not fit"):
        kind.make(kind.spec(2, 2, 2)).load(
            [Slice((mx.zeros((1, 1, 9, 2)), mx.zeros((1, 1, 9, 2))), 0, 9)]
        )


def test_a_refused_load_changes_nothing():
    drive = Drive(rotating(8)).feed_all([40])
    before = snapshot(drive.cache)
    with pytest.raises(UsageError, match="missing"):
        drive.cache.load([drive.cache.read(36, 40)])
    assert_untouched(drive.cache, before)
