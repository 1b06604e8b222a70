"""Pages keep to their room at every moment, whichever way they come into RAM."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxkv.kv.types import STEP
from mlxkv.prefix.on_disk.disk import PageDisk
from mlxkv.prefix.on_disk.writer import PageFiles
from mlxkv.prefix.pages import Pages
from mlxkv.prefix.ram import RamPages
from tests.prefix.test_pages import BIG, Sequence_, new_pages, page_bytes, told
from tests.support.page_writer import FINGERPRINT, limits
from tests.support.tiny import tokens as random_tokens

SHAPE = (512, None, 512)
every_way = pytest.mark.parametrize("is_fetched", [False, True], ids=["read", "fetched"])
TALK = random_tokens(4 * STEP, seed=1)


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    """`TALK` on disk alone, and RAM full of the pages of others, with room for six."""
    pages = new_pages(SHAPE)
    files = PageFiles(tmp_path / "kv", FINGERPRINT, limits())
    pages._open_disk = lambda: PageDisk(files, pages.kinds, "float32")
    pages.keep(told(pages, SHAPE, TALK), wait=True)
    files.flush()
    pages.clear()
    pages.room.budget_bytes = 6 * page_bytes(SHAPE) + 100
    for seed in range(2, 6):
        told(pages, SHAPE, random_tokens(2 * STEP, seed=seed))
    assert pages.nbytes > pages.room.budget_bytes - page_bytes(SHAPE)
    return pages


@pytest.fixture
def most(pages, monkeypatch) -> list[int]:
    """The largest number of bytes that RAM and the fetcher have had together, once it is asked."""
    seen = [0]

    def watched(ram: RamPages, name: str, value: object) -> None:
        object.__setattr__(ram, name, value)
        if name == "nbytes":
            seen[0] = max(seen[0], pages.nbytes)

    monkeypatch.setattr(RamPages, "__setattr__", watched)
    return seen


def fetch(pages: Pages, tokens: list[int]) -> None:
    assert pages.disk is not None
    pages.fetch(pages.match([*tokens, 1], len(tokens)).links, BIG)
    pages.disk.fetcher.settle()
    assert pages.disk.fetcher.nbytes > 0


def restore(pages: Pages, tokens: list[int]) -> int | None:
    """Tokens that came from disk; all are restored, and hold what they held."""
    one = Sequence_(pages, SHAPE)
    match = pages.match([*tokens, 1], len(tokens))
    assert match.n_tokens == len(tokens)
    n = pages.load(match, one.caches)
    one.tokens = tokens
    one.check()
    return n


@every_way
def test_others_make_way_before_pages_come_from_disk(pages, most, is_fetched):
    if is_fetched:
        fetch(pages, TALK)
        told(pages, SHAPE, random_tokens(STEP, seed=9))  # beside what was fetched
    assert restore(pages, TALK) == len(TALK)
    assert 0 < most[0] <= pages.room.budget_bytes
    assert restore(pages, TALK) == 0, "what there was room for is kept"


@every_way
def test_what_has_no_room_beside_the_rest_of_its_prompt_is_not_kept(pages, most, is_fetched):
    pages.room.budget_bytes = 5 * page_bytes(SHAPE) // 2
    pages.room.fit()
    most[0] = 0
    if is_fetched:
        fetch(pages, TALK)
    assert restore(pages, TALK) == len(TALK)
    assert page_bytes(SHAPE) < most[0] <= pages.room.budget_bytes
    assert restore(pages, TALK) is not None and most[0] <= pages.room.budget_bytes


def test_a_shared_prefix_does_not_make_way_for_what_is_read(pages):
    shared = random_tokens(2 * STEP, seed=7)
    pages.share("head", told(pages, SHAPE, shared))
    assert restore(pages, TALK) == len(TALK)
    assert restore(pages, shared) == 0


def test_what_is_computed_makes_others_go_before_it_counts(pages, most):
    told(pages, SHAPE, random_tokens(8 * STEP, seed=8))
    assert 0 < most[0] <= pages.room.budget_bytes


def test_a_smaller_room_is_kept_to_at_once_by_what_was_fetched_too(pages):
    fetch(pages, TALK)
    pages.room.budget_bytes = STEP
    pages.room.fit()
    assert pages.nbytes == 0


def test_pinned_pages_over_their_room_are_walked_through_once(monkeypatch):
    pages = new_pages(SHAPE)
    pages.ram.pin(link.name for link in told(pages, SHAPE, TALK))
    shrunk, shrink = list[int](), RamPages.shrink

    def noted(ram: RamPages, budget_bytes: int, *args, **more) -> None:
        shrunk.append(budget_bytes)
        shrink(ram, budget_bytes, *args, **more)

    monkeypatch.setattr(RamPages, "shrink", noted)
    pages.room.budget_bytes = n_pinned = pages.nbytes // 2
    for _ in range(5):
        pages.room.fit()
    assert shrunk == [n_pinned]
    told(pages, SHAPE, random_tokens(STEP, seed=3))
    assert pages.nbytes == 2 * n_pinned, "another makes way at once"
