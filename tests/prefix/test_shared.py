"""Prefixes that many sequences share: evicted last, in RAM and on disk, also after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxkv.kv.types import STEP, CacheSpec
from mlxkv.prefix.eviction import SHARED_PART, eviction_order, shared_pages
from mlxkv.prefix.layout import FULL, WINDOW, Kinds, Link
from mlxkv.prefix.on_disk.disk import PageDisk
from mlxkv.prefix.on_disk.folder import SHARED_FILE
from mlxkv.prefix.on_disk.writer import PageFiles
from mlxkv.prefix.pages import Pages
from mlxkv.prefix.shared import MAX_NAMES, SharedPrefixes, chain_to
from mlxkv.saved_kv.gc import gc
from tests.prefix.test_order import entries, keys, order
from tests.prefix.test_pages import Sequence_, fork, new_pages, page_bytes, specs, told
from tests.support.page_writer import FINGERPRINT, chain, limits
from tests.support.tiny import tokens as random_tokens

SHAPES = {"full": (None,), "window": (512, 512), "mixed": (512, None, 512)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def whole(links: list[Link]) -> list[Link]:
    return [link for link in links if link.n_tokens == STEP]


# In RAM.


@every_shape
def test_a_shared_prefix_outlives_what_is_used_later(shape):
    pages, head = new_pages(shape), random_tokens(4 * STEP)
    pages.share("client", whole(told(pages, shape, head)))
    pages.room.budget_bytes = 10 * page_bytes(shape)
    for seed in range(1, 8):
        told(pages, shape, random_tokens(1200, seed=seed))
        assert pages.nbytes <= pages.room.budget_bytes
    assert Sequence_(pages, shape).restore([*head, 1, 2]).n_tokens == 4 * STEP


@every_shape
def test_it_goes_where_memory_is_needed_for_a_request(shape):
    pages, head = new_pages(shape), random_tokens(4 * STEP)
    pages.share("client", whole(told(pages, shape, head)))
    assert pages.give_back(pages.nbytes) > 0 and pages.nbytes == 0


@every_shape
def test_what_is_spared_is_bounded(shape):
    pages, head = new_pages(shape), random_tokens(8 * STEP)
    links = whole(told(pages, shape, head))
    shared = SharedPrefixes(pages.kinds)
    shared.put("client", links)
    budget = 8 * page_bytes(shape)
    spared = shared.spared(pages.ram.size, budget)
    sizes = {(x.name, part): pages.ram.size(x, part) or 0 for x in links for part in (FULL, WINDOW)}
    assert 0 < sum(sizes[key] for key in spared) <= SHARED_PART * budget < sum(sizes.values())
    assert (links[0].name, FULL) in spared or not pages.kinds.full


def test_a_name_that_gets_another_prefix_gives_up_the_first():
    shape = (None,)
    pages = new_pages(shape)
    old, new = random_tokens(4 * STEP, seed=1), random_tokens(4 * STEP, seed=2)
    pages.share("client", whole(told(pages, shape, old)))
    pages.share("client", whole(told(pages, shape, new)))
    pages.room.budget_bytes = 8 * page_bytes(shape)
    for seed in (3, 4, 5):
        told(pages, shape, random_tokens(1200, seed=seed))
    left = [pages.match([*tokens, 1], 1024).n_tokens for tokens in (old, new)]
    assert left == [0, 4 * STEP]


def test_the_latest_names_are_kept():
    shape = (None,)
    pages = new_pages(shape)
    links = whole(told(pages, shape, random_tokens(2 * STEP)))
    for i in range(MAX_NAMES + 3):
        pages.share(str(i), links)
    assert list(pages.shared) == [str(i) for i in range(3, MAX_NAMES + 3)]


# On disk.


def test_shared_pages_go_after_all_others_and_before_named_kv():
    shared, named, other = chain(0, 2), chain(1, 2), chain(2, 2)
    pages = entries(shared, 1) + entries(named, 2) + entries(other, 9)
    spared = {("m", key) for key in keys(*shared)}
    kept = {("m", key.file_name): False for key in keys(*named)}
    found = [page.key for page in eviction_order(pages, (), {"m": 0}, kept, spared)]
    assert found == keys(*other[::-1], *shared[::-1], *named[::-1])
    assert order(pages) == keys(*shared[::-1], *named[::-1], *other[::-1])


def test_of_a_shared_prefix_only_what_is_needed_behind_it_is_spared():
    pages = chain(0, 5, parts=("full", "window"))
    tail = chain(1, 3, parts=("full", "window"), after=pages[-1])
    here = entries([*pages, *tail], 1)
    found = shared_pages(here, {"m": 1}, {"m": [pages[-1].key.name]}, 1 << 30)
    assert {key for _, key in found} == {*keys(*pages[::2]), *keys(pages[7], pages[9])}


def test_of_a_shared_prefix_that_is_too_large_the_beginning_is_spared():
    old, new = chain(0, 3), chain(1, 3)
    ends = {"m": [old[-1].key.name, new[-1].key.name]}
    found = shared_pages(entries([*old, *new], 1), {"m": 0}, ends, 45)
    assert {key for _, key in found} == set(keys(*new, old[0]))


def test_names_in_a_circle_and_pages_that_are_gone_make_no_prefix():
    a, b, c = ("a" * 32, "b" * 32, "c" * 32)
    assert chain_to(a, {a: b, b: a}) == []
    assert chain_to(a, {a: b}) == []
    assert chain_to(a, {}) == []
    root = "0" * 32
    assert chain_to(c, {a: root, b: a, c: b}) == [
        Link(root, a, 0),
        Link(a, b, 256),
        Link(b, c, 512),
    ]
    assert chain_to(root, {root: root}) == []


def disk_pages(root: Path, shape=(None, 512), cap: int = 1 << 30) -> Pages:
    kinds = Kinds.of([CacheSpec(1, 2, 2, window) for window in shape])
    assert kinds is not None and specs(shape)

    def open_disk() -> PageDisk:
        files = PageFiles(root, FINGERPRINT, limits(cap), window_pages=3)
        return PageDisk(files, kinds, "float32")

    return Pages(kinds, 1 << 30, open_disk=open_disk)


def test_a_restart_knows_the_shared_prefixes(tmp_path: Path):
    shape, head = (None, 512), random_tokens(4 * STEP)
    pages = disk_pages(tmp_path / "kv")
    links = whole(told(pages, shape, [*head, *random_tokens(300, seed=9)]))[:4]
    pages.share("client", links)
    pages.close()
    again = disk_pages(tmp_path / "kv")
    match = again.match(fork(head, 4 * STEP), 4 * STEP)
    assert match.n_tokens == 4 * STEP
    assert list(again.shared["client"]) == links
    again.close()


def test_a_full_folder_keeps_the_shared_prefix(tmp_path: Path):
    shape, head = (None,), random_tokens(4 * STEP)
    cap = 400_000
    pages = disk_pages(tmp_path / "kv", shape, cap)
    pages.share("client", whole(told(pages, shape, head)))
    assert pages.disk is not None
    pages.disk.flush()
    pages.note_shared()
    for seed in range(1, 30):
        pages.keep(whole(told(pages, shape, random_tokens(1024, seed=seed))), wait=True)
        pages.disk.flush()
        pages.clear()
    assert pages.disk.files.usage().n_bytes <= cap
    pages.close()
    again = disk_pages(tmp_path / "kv", shape, cap)
    assert again.match([*head, 1], 4 * STEP).n_tokens == 4 * STEP
    assert again.match([*random_tokens(1024, seed=1), 1], 4 * STEP).n_tokens == 0
    again.close()


@pytest.mark.parametrize("content", ["", "[]", "7", '{"a": 1}', '{"a": "../../x"}', '{"a": ["b"]}'])
def test_a_damaged_file_is_no_error(tmp_path: Path, content: str):
    shape, head = (None, 512), random_tokens(4 * STEP)
    pages = disk_pages(tmp_path / "kv")
    pages.share("client", whole(told(pages, shape, head)))
    pages.close()
    (file,) = (tmp_path / "kv" / "pages").glob(f"*/{SHARED_FILE}")
    file.write_text(content)
    again = disk_pages(tmp_path / "kv")
    assert again.match([*head, 1], 4 * STEP).n_tokens == 4 * STEP
    assert again.shared == {}
    again.share("other", whole(told(again, shape, random_tokens(4 * STEP, seed=1))))
    again.close()
    assert json.loads(file.read_text()).keys() == {"other"}


def test_a_cleared_folder_keeps_no_file_of_prefixes(tmp_path: Path):
    shape = (None, 512)
    pages = disk_pages(tmp_path / "kv")
    pages.share("client", whole(told(pages, shape, random_tokens(4 * STEP))))
    pages.close()
    gc(tmp_path / "kv", limits(0))
    assert list((tmp_path / "kv" / "pages").iterdir()) == []
