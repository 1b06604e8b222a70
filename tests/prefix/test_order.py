from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxkv.prefix.eviction import SLACK_BYTES, Room, Scan, Stored, eviction_order
from mlxkv.prefix.on_disk.format import ROOT, PageFile, PageKey
from mlxkv.prefix.on_disk.writer import PageFiles
from tests.support.page_writer import (
    FINGERPRINT,
    aged,
    chain,
    folder_bytes,
    limits,
    opened,
    path_of,
    same,
    stored,
    stored_keys,
)


def entries(pages: Sequence[PageFile], used: int, model: str = "m") -> list[Stored]:
    return [Stored(model, page.key, 10, used) for page in pages]


def order(
    pages: Sequence[Stored],
    near: int | None = 0,
    wanted: Sequence[Stored] = (),
    named: dict[tuple[str, str], bool] | None = None,
) -> list[PageKey]:
    return [page.key for page in eviction_order(pages, wanted, {"m": near}, named or {})]


def keys(*pages: PageFile) -> list[PageKey]:
    return [page.key for page in pages]


def test_the_least_recently_used_goes_first_and_a_chain_from_its_end():
    old, new = chain(0, 3), chain(1, 2)
    assert order(entries(new, 5) + entries(old, 4)) == keys(*old[::-1], *new[::-1])


def test_a_trunk_counts_as_used_when_a_page_behind_it_was():
    trunk = chain(0, 2)
    leaf, other = chain(1, 1, after=trunk[-1]), chain(2, 2)
    pages = entries(trunk, 1) + entries(leaf, 9) + entries(other, 5)
    assert order(pages) == keys(*other[::-1], *leaf, *trunk[::-1])


def test_of_one_page_the_window_part_goes_first():
    pages = chain(0, 2, parts=("full", "window"))
    full, window = pages[::2], pages[1::2]
    assert order(entries(pages, 1), near=9) == keys(window[1], full[1], window[0], full[0])


@pytest.mark.parametrize("near", [0, 1, 2])
def test_window_parts_that_no_tip_or_fork_needs_go_before_all_else(near):
    trunk = chain(0, 6, parts=("full", "window"))
    fork = trunk[5]  # the window part of the third page: two go on behind it
    branch = chain(1, 4, parts=("full", "window"), after=fork)
    windows, branch_windows = trunk[1::2], branch[1::2]
    first = order(entries(trunk, 1) + entries(branch, 9), near=near)
    expected = [
        *windows[3 : 5 - near],  # in front of one tip: the least recently used
        *branch_windows[: 3 - near],  # in front of the other
        *windows[: 2 - near],  # in front of the fork: used as lately as what is behind it
    ]
    n = len(expected)
    assert set(first[:n]) == set(keys(*expected))
    assert all(key.part == "full" or key in keys(*windows, *branch_windows) for key in first[n:])
    assert first[:n][: len(windows[3 : 5 - near])] == keys(*windows[3 : 5 - near][::-1])


def test_window_parts_of_a_model_whose_reach_is_not_known_are_all_needed():
    pages = chain(0, 3, parts=("full", "window"))
    assert order(entries(pages, 1), near=None) == order(entries(pages, 1), near=99)


def test_named_kv_goes_last_and_pinned_never():
    plain, named, pinned = chain(0, 1), chain(1, 2), chain(2, 2)
    names = {("m", page.key.file_name): False for page in named}
    names |= {("m", page.key.file_name): True for page in pinned}
    pages = entries(pinned, 1) + entries(named, 2) + entries(plain, 99)
    assert order(pages, named=names) == keys(*plain, *named[::-1])
    other_model = entries(chain(1, 1), 1, model="n")
    assert order(other_model, named=names) == keys(*chain(1, 1))


def test_what_is_written_does_not_push_out_what_it_continues():
    trunk = chain(0, 3, parts=("full", "window"))
    leaf, other = chain(1, 1, after=trunk[-1]), chain(2, 1)
    gone = order(entries(trunk, 1) + entries(other, 5), near=0, wanted=entries(leaf, 9))
    far = [page for page in trunk if page.key.part == "window"][::-1]
    assert gone == keys(*far, *other), "only window parts that it does not need"


def test_pages_whose_trunk_is_gone_and_names_in_a_circle_are_ordered_too():
    pages = chain(0, 4)
    circle = [
        Stored("m", PageKey("a" * 32, "b" * 32, 256, "full"), 1, 3),
        Stored("m", PageKey("b" * 32, "a" * 32, 256, "full"), 1, 4),
        Stored("m", PageKey("c" * 32, "c" * 32, 256, "full"), 1, 5),
    ]
    some = order(entries(pages[2:], 1) + circle, wanted=circle[2:])
    assert some == [*keys(*pages[2:][::-1]), circle[0].key, circle[1].key]


@given(st.data())
def test_every_page_goes_before_those_it_continues_whatever_their_times(data):
    pages: list[PageFile] = []
    for seed in range(data.draw(st.integers(1, 12))):
        after = data.draw(st.sampled_from([None, *pages]))
        pages += chain(seed, 1, after=after)
    used = [data.draw(st.integers(0, 5)) for _ in pages]
    stored = [Stored("m", page.key, 1, at) for page, at in zip(pages, used, strict=True)]
    gone = order(stored)
    place = {key.name: i for i, key in enumerate(gone)}
    assert sorted(place) == sorted(page.key.name for page in pages)
    for page in pages:
        if page.key.parent != ROOT:
            assert place[page.key.name] < place[page.key.parent]


def test_pages_that_were_used_stay_and_the_others_go(root):
    a, b = chain(0, 3, n_values=5_000), chain(1, 3, n_values=5_000)
    files = stored(root, [*a, *b])
    aged(root, a, 100)
    aged(root, b, 50)
    files.used([page.key for page in a])
    small = opened(root, folder_bytes(root) + 40_000)
    small.write(chain(2, 2, n_values=5_000))
    small.flush()
    gone = [page for page in (*a, *b) if not path_of(root, page.key).exists()]
    assert gone and gone == b[-len(gone) :]


def test_how_far_windows_reach_is_known_to_other_processes(root):
    pages = chain(0, 6, parts=("full", "window"), n_values=5_000)
    stored(root, pages, window_pages=1)
    other = PageFiles(root, "c" * 64, limits(folder_bytes(root) + 40_000))
    other.write(chain(1, 2, n_values=5_000))
    other.flush()
    gone = [page.key for page in pages if not path_of(root, page.key).exists()]
    far = [page.key for page in pages if page.key.part == "window"][:4]
    assert gone and set(gone) <= set(far)


def test_pinned_pages_stay_and_new_ones_are_refused_instead(root):
    pages = chain(0, 8, n_values=5_000)
    files = stored(root, pages)
    manifest = {"fingerprint": FINGERPRINT, "pinned": True,
                "keys": [page.key.file_name for page in pages]}  # fmt: skip
    (root / "names" / "a.json").write_text(json.dumps(manifest))
    small = opened(root, folder_bytes(root))
    small.write(chain(1, 2, n_values=5_000))
    small.flush()
    assert small.usage().refused == {"cap": 2}
    assert all(same(files.read(page.key), page) for page in pages)
    (root / "names" / "a.json").write_text(json.dumps(manifest | {"pinned": False}))
    small.write(chain(1, 2, n_values=5_000))
    small.flush()
    assert all(page.key in stored_keys(root) for page in chain(1, 2, n_values=5_000))


def test_what_is_refused_costs_nothing_and_changes_no_order():
    old = [Stored("m", page.key, 1000, 1) for page in chain(0, 6)]
    room = Room(Scan(6000, tuple(old)), limits(6000 + SLACK_BYTES, free=900), 1000, 0, old)
    assert room.take(99_999) == "cap"
    assert room.take(200) is None and room.evicted == old[:1]
    assert room.take(900) is None and room.evicted == old[:2]
    assert room.take(99_999) == "cap"
    assert room.take(1000) is None and room.evicted == old[:3]
    assert room.written_bytes == 2100


def test_too_little_free_space_evicts_nothing():
    old = [Stored("m", page.key, 10, 1) for page in chain(0, 3)]
    scan = Scan(100, tuple(old))
    room = Room(scan, limits(1000 + SLACK_BYTES, free=50), 60, 0, old)
    assert room.take(11) == "free space" and room.take(10) is None
    full = Room(scan, limits(100 + SLACK_BYTES, free=50), 40, 0, old)
    assert full.take(31) == "cap"
    assert [full.take(n_bytes) for n_bytes in (5, 25)] == ["free space"] * 2
    assert room.evicted == full.evicted == []
